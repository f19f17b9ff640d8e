"""Networks as a command names them, and as a configuration does."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from lqkd.errors import UsageError, first_line
from lqkd.models import load_weights
from lqkd.pipelines.asked import PRETRAINED
from lqkd.pipelines.found import SMALL_FCOS
from lqkd.pipelines.published import HUB, architecture, published
from lqkd.runs.folder import CONFIG
from lqkd.utils.files import write_safetensors
from lqkd.utils.suggest import nearest
from lqkd.utils.yaml_text import load_yaml

_FILES = (".yaml", ".yml")
TRAINED = "network.safetensors"
GPT = "gpt"
DETECTOR = "small_fcos"
TOPICS = "builtin:topics_gpt"


@dataclass(frozen=True)
class Network:
    """A network, and what it starts from.

    Attributes:
        name: as it is told.
        config: ``class_path`` and ``init_args``, with the number of classes.
        weights: the file that it starts from; None for random weights.
        told: which these are, in words.
        knows: whether it knows the classes already, so that it need not be trained first.
        mean: channel means in [0, 1] of the images that it was trained with; None for those of ImageNet.
        std: likewise.
        image_size: the only one that it takes, in pixels; None for any.
    """

    name: str
    config: dict[str, Any]
    weights: str | None = None
    told: str = "random weights"
    knows: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None

    def build(self) -> nn.Module:
        """It with random weights.

        Raises:
            UsageError: when the configuration is not possible.
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--network", type=nn.Module)
        try:
            network = parser.instantiate_classes(parser.parse_object({"network": self.config})).network
        except Exception as error:  # what jsonargparse and constructors raise, of many types
            raise UsageError(f"network {self.name!r} cannot be built: {_last_line(error)}") from error
        assert isinstance(network, nn.Module)
        return network


def named(name: str, classes: int, setting: str, pixels: bool = False) -> Network:
    """The network that a user names.

    Args:
        name: ``resnet18``, ``torchvision/NAME``, ``timm/NAME``, ``hf-hub:OWNER/NAME``, or a YAML file with
            ``class_path`` and ``init_args``.
        classes: their number.
        setting: for messages, such as ``student``.
        pixels: whether it is one that gives every pixel a class, of which torchvision alone has some.

    Raises:
        UsageError: when there is no such network.
    """
    if name.lower().endswith(_FILES):
        return Network(name, _read(Path(name), classes, setting))
    if name.startswith(HUB):
        found, options = architecture(name)
        network = _of_library(found, classes, options)
        return replace(network, name=name)
    return _of_library(_full_name(name, setting, pixels), classes, {})


def language_model(name: str, weights: str | None, setting: str) -> tuple[Network, str | None]:
    """The network that a user names for texts as bytes, and the weights that it starts from.

    Args:
        name: ``gpt`` for :class:`~lqkd.models.GPT`, which starts from what it has read already unless other weights are
            given, or a YAML file with ``class_path`` and ``init_args``.
        weights: a file or ``builtin:NAME``; None for these.
        setting: for messages.

    Raises:
        UsageError: when there is no such network.
    """
    if name == GPT:
        served = {"gelu": "tanh"}  # as llama.cpp computes it
        return Network(name, {"class_path": "lqkd.models.GPT", "init_args": served}), weights or TOPICS
    if not name.lower().endswith(_FILES):
        accepted = f"{GPT} (lqkd.models.GPT, of bytes), or a YAML file with class_path and init_args"
        raise UsageError(f"{setting}={name!r} is no network for texts that is known: give {accepted}")
    return Network(name, _read(Path(name), None, setting)), weights


def detector(name: str, classes: int, setting: str) -> Network:
    """The network that a user names for boxes.

    Args:
        name: ``small_fcos`` for :class:`~lqkd.models.SmallFCOS`, or a YAML file with ``class_path`` and ``init_args``.
        classes: their number.
        setting: for messages.

    Raises:
        UsageError: when there is no such network.
    """
    if name == DETECTOR:
        return Network(name, {"class_path": SMALL_FCOS, "init_args": {"num_classes": classes}})
    if not name.lower().endswith(_FILES):
        accepted = f"{DETECTOR} (lqkd.models.SmallFCOS), or a YAML file with class_path and init_args"
        raise UsageError(f"{setting}={name!r} is no network for boxes that is known: give {accepted}")
    return Network(name, _read(Path(name), classes, setting))


def _of_library(name: str, classes: int, options: Mapping[str, Any]) -> Network:
    arguments: dict[str, Any] = {"name": name, "num_classes": classes}
    if options:
        arguments["options"] = dict(options)
    network = Network(name, {"class_path": "lqkd.models.build_model", "init_args": arguments})
    if not name.startswith("timm/"):
        return network
    import timm

    known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    return replace(network, image_size=known.input_size[-1]) if known and known.fixed_input_size else network


def _full_name(name: str, setting: str, pixels: bool) -> str:
    """``torchvision/NAME`` or ``timm/NAME``; torchvision's where both have it."""
    if name.startswith(("torchvision/", "timm/")):
        return name
    from torchvision import models

    known = models.list_models(module=models.segmentation if pixels else models)
    if name in known:
        return f"torchvision/{name}"
    if pixels:
        raise UsageError(
            f"{setting}={name!r} is no network for masks that is known: give one of torchvision's "
            f"({', '.join(known)}), or a YAML file with class_path and init_args"
        )
    timm = importlib.import_module("timm") if importlib.util.find_spec("timm") is not None else None
    if timm is not None and timm.is_model(name):
        return f"timm/{name}"
    known = sorted({*known, *(timm.list_models() if timm is not None else ())})
    other = "" if timm is not None else " (timm, which has more, is not installed)"
    near = nearest(name, known)
    accepted = f"a network of torchvision or timm, {HUB}OWNER/NAME, or a YAML file with class_path and init_args"
    raise UsageError(f"{setting}={name!r} is unknown{other}{near or f': give {accepted}'}")


def _read(path: Path, classes: int | None, setting: str) -> dict[str, Any]:
    """A network's configuration in a file, with the number of classes where its class takes ``num_classes``.

    That is ``classes`` of some; it is None of what has none.
    """
    if not path.is_file():
        raise UsageError(f"{setting}={str(path)!r} does not exist: give a YAML file with class_path and init_args")
    config = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(config, dict) or not isinstance(config.get("class_path"), str):
        raise UsageError(
            f"{setting}={str(path)!r} names no class: it must hold class_path, and init_args as it takes them"
        )
    own = config.get("init_args") or {}
    number = {_name_of_classes(config["class_path"]): classes} if classes is not None else {}
    return {"class_path": config["class_path"], "init_args": {**number, **own}}


def _name_of_classes(class_path: str) -> str:
    """What a class calls the number of classes."""
    module, _, name = class_path.rpartition(".")
    try:
        known = [*inspect.signature(getattr(importlib.import_module(module), name)).parameters]
    except (ImportError, AttributeError, ValueError, TypeError):  # which is told when it is to be built
        known = []
    return "classes" if "classes" in known and "num_classes" not in known else "num_classes"


def trained(place: Path, setting: str) -> Network:
    """The float network of a run of lqkd, which knows its classes.

    Args:
        place: the run's folder, or its ``network.safetensors``.
        setting: for messages.

    Raises:
        UsageError: when it is none.
    """
    folder = place if place.is_dir() else place.parent
    file = folder / TRAINED if place.is_dir() else place
    if not (folder / CONFIG).is_file() or not file.is_file():
        raise UsageError(
            f"{setting}={str(place)!r} is no run with {CONFIG} and {TRAINED}, which say what network it is: "
            f"name the network with {setting} and give the file with {setting}_weights"
        )
    config = load_yaml((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG))
    network = config["model"].get("init_args", {}).get("network")
    if network is None:
        raise UsageError(f"{setting}={str(place)!r} is the run of a low-bit student: give one in floating point")
    data = config["data"].get("init_args", {})
    mean, std = (tuple(data[key]) if data.get(key) else None for key in ("mean", "std"))
    return Network(
        name=str(place),
        config=network,
        weights=str(file.resolve()),
        told=f"weights of {file}",
        knows=True,
        mean=mean,
        std=std,
        image_size=data.get("image_size") if isinstance(data.get("image_size"), int) else None,
    )


def starting_from(network: Network, weights: str | None, setting: str, file: Path, final: Path) -> Network:
    """The same with weights.

    Args:
        network: with random weights.
        weights: a file, ``builtin:NAME`` or ``pretrained``; None for what its library publishes, and random ones where
            that cannot be had.
        setting: for messages, such as ``student_weights``.
        file: written with what is published.
        final: what its name will be.

    Raises:
        UsageError: when they do not exist or are of another network, or published ones are asked for and cannot be had.
    """
    built = network.build()
    if weights not in (None, PRETRAINED):
        assert weights is not None
        knows = _load(built, weights, network, setting)
        source = weights if weights.startswith("builtin:") else str(Path(weights).expanduser().resolve())
        return replace(network, weights=source, told=f"weights of {weights}", knows=knows)
    if not network.name.startswith(("torchvision/", "timm/", HUB)):
        if weights == PRETRAINED:
            raise UsageError(f"{setting}={PRETRAINED!r} is not possible for {network.name!r}: give a file")
        return network
    try:
        found = published(network.name)
        write_safetensors(file, found.state)
        _load(built, str(file), network, setting)
    except UsageError as error:
        file.unlink(missing_ok=True)
        if weights == PRETRAINED:
            raise UsageError(
                f"{setting}={PRETRAINED!r} is not possible: {error}; give a file (.safetensors, or of torch.save)"
            ) from error
        return replace(network, told=f"random weights: {error}")
    told = f"weights of {found.told}"
    return replace(network, weights=str(final), told=told, mean=found.mean, std=found.std)


def _load(built: nn.Module, weights: str, network: Network, setting: str) -> bool:
    """Whether the weights know the classes: nothing has to start anew."""
    try:
        load_weights(built, weights)
        return True
    except UsageError:
        try:
            load_weights(built, weights, replace_head=True)
        except UsageError as error:
            raise UsageError(f"{setting} do not fit {network.name}: {error}") from error
        return False


def _last_line(error: BaseException) -> str:
    """The innermost reason of what jsonargparse raises."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return str(inner).strip().splitlines()[-1].strip(" -") if str(inner).strip() else first_line(inner)
