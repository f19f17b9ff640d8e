"""torchvision's detectors as networks that return maps: a graph that can be quantised, traced and exported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.weight_files import read_weights

_PYRAMID = (8, 16, 32, 64, 128)
_COARSEST = ("extra_blocks.p6", "extra_blocks.p7")
"""What torchvision's pyramid calls the modules of its two last levels."""
_SSDLITE = "ssdlite320_mobilenet_v3_large"
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class LevelNorms(nn.ModuleList):
    """A batch norm for each level, whose statistics differ, behind a convolution that all levels share."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels) for _ in range(levels))


class TorchvisionDetector(nn.Module):
    """Backbone, pyramid and heads of a detector of torchvision, with its names of parameters.

    ``fcos_RESNET_fpn`` (Tian et al., arXiv 1904.01355) and ``retinanet_RESNET_fpn`` (Lin et al., arXiv 1708.02002),
    RESNET one of resnet18, resnet34, resnet50 and resnet101, have a pyramid of five levels; ``ssdlite320_mobilenet_v3
    _large`` (Sandler et al., arXiv 1801.04381, section 6.2) has a head of its own on each of six. All modules are
    torchvision's own, so that a state dict of its ``fcos_resnet50_fpn`` fits, say. Not in here are its transform
    (images are resized, normalised and padded by the data), its anchors and losses, decoding and non-maximum
    suppression, which :class:`lqkd.tasks.TorchvisionDetection` has: data-dependent Python, which no graph holds.

    For each stride S it returns ``classes_S`` (B, A * C, H, W), logits, ``boxes_S`` (B, 4 * A, H, W) and, FCOS,
    ``centerness_S`` (B, 1, H, W), as torchvision's heads compute them before they reorder them; A anchors are at each
    position. Input (B, 3, H, W) float; H and W multiples of 32, or of 16 for SSDlite, which is meant for 320.

    Attributes:
        strides: of its levels, in pixels.
        last_layers: the layers whose results it returns, which keep 8 bits by default in a detection.

    Args:
        name: see above.
        num_classes: number of classes, without the background; SSDlite has logits of one more, which come first.
        norm: of FCOS' and RetinaNet's heads: null for torchvision's own, group norm and none; ``batch_per_level`` for a
            batch norm for each level (Chen et al., "AQD", arXiv 2007.06919), which an integer file can have, unlike
            group norm.
        width: channels of the pyramid and of FCOS' and RetinaNet's heads; 256 in torchvision, fewer for small devices.
            Group norm has 32 groups: a multiple of 32 from 64 on.
        frozen_norm: whether the batch norms of the ResNet are ``FrozenBatchNorm2d``, whose statistics and parameters
            stay as they are in the weights that are loaded.
        backbone_weights: a file with torchvision's weights of the ResNet for ImageNet, whose last layer is left out;
            null for random ones. It is for a training from there: weights of a whole detector are loaded over them.

    Raises:
        UsageError: when a setting is not possible.

    Examples:
        >>> import torch
        >>> network = TorchvisionDetector("retinanet_resnet18_fpn", num_classes=3).eval()
        >>> maps = network(torch.zeros(1, 3, 64, 64))
        >>> maps["classes_8"].shape, maps["boxes_128"].shape  # 9 anchors at each position
        (torch.Size([1, 27, 8, 8]), torch.Size([1, 36, 1, 1]))
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        norm: Literal["batch_per_level"] | None = None,
        frozen_norm: bool = False,
        width: int = 256,
        backbone_weights: str | None = None,
    ) -> None:
        super().__init__()
        if type(num_classes) is not int or num_classes < 1:
            raise UsageError(f"num_classes={num_classes!r} is not possible for TorchvisionDetector: at least 1")
        if norm not in (None, "batch_per_level"):
            raise UsageError(f"norm={norm!r} is not possible for TorchvisionDetector: null or batch_per_level")
        if type(width) is not int or width < 1:
            raise UsageError(f"width={width!r} is not possible for TorchvisionDetector: a whole number of at least 1")
        pyramid = re.fullmatch(rf"(fcos|retinanet)_({'|'.join(_RESNETS)})_fpn", name)
        self.name, self.num_classes = name, num_classes
        self.strides = _PYRAMID if pyramid else tuple(2 * stride for stride in (8, 16, 32, 64, 128, 256))
        if pyramid:
            if pyramid[1] == "fcos" and norm is None and (width % 32 or width < 64):
                raise UsageError(f"width={width} is not possible with group norm: 64, 96, ..., or norm=batch_per_level")
            self.backbone = _resnet_pyramid(pyramid[2], frozen_norm, width)
            if backbone_weights is not None:
                _load_body(cast(Any, self.backbone).body, backbone_weights, pyramid[2])
            self.head = (_fcos_head if pyramid[1] == "fcos" else _retinanet_head)(num_classes, norm is not None, width)
        elif name == _SSDLITE:
            if norm is not None or frozen_norm or width != 256:
                setting = "norm" if norm else "frozen_norm" if frozen_norm else "width"
                raise UsageError(
                    f"{setting} is not possible with {_SSDLITE}, which has no pyramid: its levels have layers and "
                    "batch norms of their own"
                )
            if backbone_weights is not None:
                raise UsageError(f"backbone_weights is not possible with {_SSDLITE}: it is of a ResNet")
            self.backbone, self.head = _ssdlite(num_classes)
        else:
            raise UsageError(
                f"name={name!r} is no detector that is known: fcos_RESNET_fpn or retinanet_RESNET_fpn, with "
                f"{', '.join(_RESNETS)} as RESNET, or {_SSDLITE}"
            )
        ends = ("cls_logits", "bbox_reg", "bbox_ctrness")
        last = rf"head\.\w+\.({'|'.join(ends)}|module_list\.\d+\.1)"
        self.last_layers = tuple(at for at, module in self.named_modules() if re.fullmatch(last, at))

    @property
    def family(self) -> str:
        """``fcos``, ``retinanet`` or ``ssdlite``."""
        return "ssdlite" if self.name == _SSDLITE else self.name.partition("_")[0]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        of_level = {"fcos": self._fcos, "retinanet": self._retinanet, "ssdlite": self._ssdlite}[self.family]
        maps: dict[str, Tensor] = {}
        for number, (stride, level) in enumerate(zip(self.strides, self.backbone(images).values(), strict=True)):
            maps |= {f"{name}_{stride}": values for name, values in of_level(level, number).items()}
        return maps

    def _fcos(self, level: Tensor, number: int) -> dict[str, Tensor]:
        classes, boxes = self._towers(level, number)
        head = cast(Any, self.head).regression_head
        return {
            "classes": cast(Any, self.head).classification_head.cls_logits(classes),
            "boxes": nn.functional.relu(head.bbox_reg(boxes)),
            "centerness": head.bbox_ctrness(boxes),
        }

    def _retinanet(self, level: Tensor, number: int) -> dict[str, Tensor]:
        classes, boxes = self._towers(level, number)
        head = cast(Any, self.head)
        return {
            "classes": head.classification_head.cls_logits(classes),
            "boxes": head.regression_head.bbox_reg(boxes),
        }

    def _ssdlite(self, level: Tensor, number: int) -> dict[str, Tensor]:
        head = cast(Any, self.head)
        return {
            "classes": head.classification_head.module_list[number](level),
            "boxes": head.regression_head.module_list[number](level),
        }

    def _towers(self, level: Tensor, number: int) -> tuple[Tensor, Tensor]:
        head = cast(Any, self.head)
        return _through(head.classification_head.conv, level, number), _through(
            head.regression_head.conv, level, number
        )

    def class_logits_from(self, tap: str) -> Callable[[Tensor], Tensor]:
        """What follows behind a module on the way to the logits of a level: from (B, C, H, W) to (B, A * C, H, W).

        Args:
            tap: ``backbone.fpn.layer_blocks.LEVEL``, ``backbone.fpn.extra_blocks.p6`` or ``p7``, or, with
                ``batch_per_level``, a norm of the tower for classes, ``head.classification_head.conv.PLACE.LEVEL``.

        Raises:
            UsageError: when it is none of these, or of SSDlite, whose classes are no probabilities by themselves.
        """
        if self.family == "ssdlite":
            raise UsageError(f"{self.name} has a softmax over classes and background: take fcos or retinanet")
        head = cast(Any, self.head).classification_head
        levels = [f"backbone.fpn.{name}" for name in (*(f"layer_blocks.{n}" for n in range(3)), *_COARSEST)]
        if tap in levels:
            number = levels.index(tap)
            return lambda features: head.cls_logits(_through(head.conv, features, number))
        path, _, level = tap.rpartition(".")
        layers = [(f"head.classification_head.conv.{name}", layer) for name, layer in head.conv.named_modules()]
        tower = [(name, layer) for name, layer in layers if isinstance(layer, (nn.Conv2d, nn.ReLU, LevelNorms))]
        at = next((n for n, (name, of) in enumerate(tower) if name == path and isinstance(of, LevelNorms)), None)
        if at is None or not level.isdecimal():
            raise UsageError(
                f"tap {tap!r} of {self.name} is not on the way to the classes of one level: {', '.join(levels)} are, "
                "and with norm: batch_per_level the norms of a level in head.classification_head.conv"
            )
        rest = nn.Sequential(*(layer for _, layer in tower[at + 1 :]))
        return lambda features: head.cls_logits(_through(rest, features.clone(), int(level)))

    def adapted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``state``, or of torchvision's weights for COCO the rows of its 80 categories, where the network has 80.

        torchvision numbers them as COCO does, from 1 to 90 with gaps, and 0 is the background, which only SSDlite
        keeps; classes of :class:`lqkd.data.CocoDetection` are in the same order.

        Args:
            state: of a whole network, by name.
        """
        from torchvision.models._meta import _COCO_CATEGORIES as CATEGORIES

        rows = [row for row, name in enumerate(CATEGORIES) if name not in ("__background__", "N/A")]
        if self.num_classes != len(rows):
            return state
        kept = [0, *rows] if self.family == "ssdlite" else rows
        adapted = dict(state)
        for layer in (at for at in self.last_layers if "classification" in at):
            for name in (f"{layer}.weight", f"{layer}.bias"):
                given = state.get(name)
                if given is not None and len(given) * len(kept) == len(self.get_parameter(name)) * len(CATEGORIES):
                    adapted[name] = given.unflatten(0, (-1, len(CATEGORIES)))[:, kept].flatten(0, 1)  # of each anchor
        return adapted


def whole_detector(network: nn.Module) -> str | None:
    """What to do with a whole detector of torchvision, whose forward no graph holds; None where it is none."""
    if not any(type(module).__name__ == "GeneralizedRCNNTransform" for module in network.modules()):
        return None
    return (
        f"{type(network).__name__} of torchvision resizes images (GeneralizedRCNNTransform) and decides by their data "
        "which objects it returns: take lqkd.models.TorchvisionDetector, which loads its state dict and returns what "
        "its heads say"
    )


def _through(tower: nn.Sequential, level: Tensor, number: int) -> Tensor:
    for layer in tower:
        if isinstance(layer, nn.Sequential):
            level = _through(layer, level, number)
        else:
            level = (layer[number] if isinstance(layer, LevelNorms) else layer)(level)
    return level


def _resnet_pyramid(name: str, frozen: bool, width: int) -> nn.Module:
    from torchvision.models import resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    body = getattr(resnet, name)(weights=None, norm_layer=FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    finest = body.inplanes // 4  # on stride 8, of what the last stage has
    levels = {f"layer{stage}": str(number) for number, stage in enumerate((2, 3, 4))}
    extra = LastLevelP6P7(width, width)
    made: nn.Module = BackboneWithFPN(body, levels, [finest, 2 * finest, 4 * finest], width, extra_blocks=extra)
    return made


def _load_body(body: nn.Module, source: str, name: str) -> None:
    held = {key: value for key, value in read_weights(source)[0].items() if not key.startswith("fc.")}
    own = {key: value.shape for key, value in body.state_dict().items()}
    wrong = [key for key in own if key not in held and not key.endswith("num_batches_tracked")]
    wrong += [key for key, value in held.items() if value.shape != own.get(key) and not key.endswith("tracked")]
    if wrong:
        raise UsageError(f"backbone_weights={source!r} are not those of torchvision's {name}: {wrong[0]!r} differs")
    body.load_state_dict({key: value for key, value in held.items() if key in own}, strict=False)


def _fcos_head(num_classes: int, per_level: bool, width: int) -> nn.Module:
    from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

    norms = partial(LevelNorms, levels=len(_PYRAMID)) if per_level else None
    head = nn.Module()
    head.classification_head = FCOSClassificationHead(width, 1, num_classes, norm_layer=norms)
    head.regression_head = FCOSRegressionHead(width, 1, norm_layer=norms)
    return head


def _retinanet_head(num_classes: int, per_level: bool, width: int) -> nn.Module:
    from torchvision.models.detection.retinanet import RetinaNetHead

    norms: Callable[..., nn.Module] | None = partial(LevelNorms, levels=len(_PYRAMID)) if per_level else None
    head: nn.Module = RetinaNetHead(width, 9, num_classes, norm_layer=norms)  # 3 sizes of 3 shapes
    return head


def _ssdlite(num_classes: int) -> tuple[nn.Module, nn.Module]:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    whole = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    return whole.backbone, whole.head
