"""Weights that torchvision, timm and Hugging Face publish."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lqkd.errors import UsageError, first_line

_PATIENCE = 5.0
"""Seconds for a host to answer at all."""
HUB = "hf-hub:"


@dataclass(frozen=True)
class Published:
    """Weights, and what images they were trained with.

    Attributes:
        state: tensors by name.
        told: which ones, in words.
        mean: channel means in [0, 1]; None for those of ImageNet.
        std: likewise.
    """

    state: Mapping[str, Tensor] = field(repr=False)
    told: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def published(name: str) -> Published:
    """The weights of a network.

    Args:
        name: ``torchvision/NAME``, ``timm/NAME`` or ``hf-hub:OWNER/NAME``.

    Raises:
        UsageError: when there are none, or they are not on this machine and cannot be downloaded.
    """
    library, _, model = name.partition("/")
    if library == "torchvision":
        return _of_torchvision(name, model)
    return _of_timm(name, name if name.startswith(HUB) else model)


def architecture(name: str) -> tuple[str, dict[str, Any]]:
    """The name in timm, and the arguments, of a network that ``hf-hub:OWNER/NAME`` describes.

    Raises:
        UsageError: when its description is not on this machine and cannot be downloaded, or timm is not installed.
    """
    try:
        from timm.models import load_model_config_from_hf
    except ImportError:
        raise UsageError(f"{name!r} needs timm: pip install 'lqkd[timm]'") from None
    with _told(name, "the description"), _of_hub():
        _, found, arguments = load_model_config_from_hf(name.removeprefix(HUB))
    return f"timm/{found}", dict(arguments or {})


def _of_torchvision(name: str, model: str) -> Published:
    from torchvision import models

    weights = getattr(models.get_model_weights(model), "DEFAULT", None)
    if weights is None:
        raise UsageError(f"torchvision publishes no weights of {name}")
    with _told(name, "weights"):
        return Published(weights.get_state_dict(progress=False, check_hash=True), str(weights))


def _of_timm(name: str, model: str) -> Published:
    import timm

    if not name.startswith(HUB):
        known = timm.get_pretrained_cfg(model)
        if known is None or not known.has_weights:
            raise UsageError(f"timm publishes no weights of {name}")
    with _told(name, "weights"), _of_hub():
        network = timm.create_model(model, pretrained=True)
    about: Any = network.pretrained_cfg
    told = str(about.get("hf_hub_id") or about.get("url") or about.get("tag") or name)
    return Published(network.state_dict(), told, tuple(about["mean"]), tuple(about["std"]))


@contextmanager
def _told(name: str, what: str) -> Iterator[None]:
    """What a download raises, of whatever type, is one sentence."""
    try:
        yield
    except Exception as error:
        why = first_line(error).partition(". ")[0]  # what follows is advice
        raise UsageError(f"{what} of {name} cannot be downloaded ({why})") from error


@contextmanager
def _of_hub() -> Iterator[None]:
    """Without a connection the Hub's client looks at what it has kept only, in place of a minute of trying."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_PATIENCE).close()
    except urllib.error.HTTPError:  # it answers
        return True
    except OSError:
        return False
    return True
