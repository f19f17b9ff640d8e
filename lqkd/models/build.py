"""Networks by name from torchvision, timm or lqkd itself."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

from torch import nn

from lqkd.errors import UsageError, first_line


def build_model(name: str, num_classes: int | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: ``torchvision/resnet18``, a network for segmentation such as ``torchvision/lraspp_mobilenet_v3_large``, or
            ``timm/mobilenetv3_small_100``. Any other class is written in a config as ``class_path`` instead.
        num_classes: number of outputs; null for the library's own default.
        options: further arguments of the library's constructor.

    Raises:
        UsageError: when the library or the name is unknown, or timm is not installed.

    Examples:
        >>> build_model("torchvision/resnet18", num_classes=10).fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    library, _, model = name.partition("/")
    arguments = dict(options or {}) | ({} if num_classes is None else {"num_classes": num_classes})
    if library == "torchvision":
        from torchvision import models

        if not any(model in models.list_models(module=module) for module in (models, models.segmentation)):
            raise UsageError(f"name={name!r} is unknown: see torchvision.models.list_models()")
        if "weights_backbone" in signature(models.get_model_builder(model)).parameters:
            arguments.setdefault("weights_backbone", None)  # which a network for segmentation would fetch otherwise
        return _construct(models.get_model, name, model, weights=None, **arguments)
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise UsageError(f"name={name!r} needs timm: pip install 'lqkd[timm]'") from None
        if not timm.is_model(model):
            raise UsageError(f"name={name!r} is unknown: see timm.list_models()")
        return _construct(timm.create_model, name, model, pretrained=False, **arguments)
    raise UsageError(f"name={name!r} is not understood: write torchvision/NAME or timm/NAME")


def _construct(make: Callable[..., nn.Module], name: str, *arguments: Any, **options: Any) -> nn.Module:
    try:
        return make(*arguments, **options)
    except TypeError as error:
        raise UsageError(f"options of {name!r} are not accepted ({first_line(error)})") from error
