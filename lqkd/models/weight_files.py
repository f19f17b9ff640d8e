"""Files of weights, read: what they hold, out of whatever they wrap it in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lqkd.errors import UsageError, first_line

BUILTIN = "builtin:"
"""Prefix of weights that come with the package, e.g. ``builtin:digits_teacher``."""
_COMPILED = "_orig_mod."
"""What :func:`torch.compile` puts into the names of a network that was saved from inside its wrapper."""
_AVERAGED = "n_averaged"
"""What :class:`torch.optim.swa_utils.AveragedModel` counts, beside the network that it wraps."""
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "ema", "state_dict_ema", "model_ema")
"""Names under which programs keep the state dict in what they save, those that are taken first before the others."""
_EXPORTED = (".onnx", ".tflite", ".pt2", ".gguf", ".ncnn", ".param", ".compressed-tensors")
"""Endings of exported files, and of folders of such."""
_INDEX = ".index.json"
"""How the file ends that says which of several files holds a tensor."""


def weights_exist(source: str) -> bool:
    """Whether ``source``, as :func:`lqkd.models.load_weights` takes it, is there to be read."""
    if source.startswith(BUILTIN):
        return source.removeprefix(BUILTIN) in builtin_weights()
    return _path(source).is_file()


def builtin_weights() -> list[str]:
    """Names of the weights that come with the package.

    Examples:
        >>> builtin_weights()
        ['crops_student', 'crops_teacher', 'digits_student', 'digits_teacher', 'scenes_detector', 'topics_gpt']
    """
    folder = resources.files("lqkd") / "weights"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".safetensors"))


def read_weights(source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file, and what was unwrapped to get at them, in clauses that can follow its name.

    Raises:
        UsageError: when there is no such file, or it holds no state dict.
    """
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        if name not in builtin_weights():
            raise UsageError(f"weights={source!r} do not exist: built in are {', '.join(builtin_weights())}")
        with resources.as_file(resources.files("lqkd") / "weights" / f"{name}.safetensors") as path:
            return load_file(path), []
    path = _path(source)
    if "$" in str(path):
        raise UsageError(f"weights={source!r} name an environment variable that is not set: set it, or give a path")
    if path.exists() and _is_exported(path):
        raise UsageError(
            f"weights={source!r} are an exported network, whose weights are integers: give the .safetensors or .pt "
            "file of a network in floating point"
        )
    if not path.is_file():
        wrong = "are a folder" if path.is_dir() else "do not exist"
        raise UsageError(f"weights={source!r} {wrong}: give a .safetensors or .pt file, or {BUILTIN}NAME")
    try:
        held = _shards(path) if path.name.endswith(_INDEX) else _file(path)
    except Exception as error:  # the libraries raise many types for a damaged file
        raise UsageError(
            f"weights={source!r} cannot be read as {path.suffix or 'torch'} file ({first_line(error)})"
        ) from error
    state, told = _unwrapped(held)
    if not state:
        raise UsageError(f"weights={source!r} hold {_kind(held)}: one state dict is needed")
    if any(_COMPILED in key for key in state):
        told.append(f"are read without {_COMPILED!r} in their names")
    return {key.replace(_COMPILED, ""): value for key, value in state.items()}, told


def _path(source: str) -> Path:
    return Path(os.path.expandvars(source)).expanduser()


def _is_exported(path: Path) -> bool:
    beside = path.suffix == ".bin" and path.with_suffix(".param").exists()  # ncnn's; others' are of PyTorch
    return path.suffix in _EXPORTED or beside


def _file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _shards(index: Path) -> dict[str, Tensor]:
    """All tensors of the files, beside ``index``, that it names."""
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if any(Path(name).name != name for name in names):
        raise ValueError("it names files in other folders")
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        state |= _file(index.parent / name)
    return state


def _unwrapped(held: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict within what a program saved, and where it was; empty when there is none."""
    told: list[str] = []
    while isinstance(held, Mapping) and not any(isinstance(value, Tensor) for value in held.values()):
        inner = [key for key, value in held.items() if isinstance(value, Mapping) and _has_tensors(value)]
        chosen = next((key for key in _HOLDERS if key in inner), inner[0] if len(inner) == 1 else None)
        if chosen is None:
            return {}, []
        others = [repr(key) for key in inner if key != chosen and key in _HOLDERS]
        told = [f"are taken from its entry {chosen!r}" + (f", not from {' or '.join(others)}" if others else "")]
        held = held[chosen]
    if not isinstance(held, Mapping):
        return {}, []
    tensors = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    if all(key.startswith("module.") for key in tensors if key != _AVERAGED):
        tensors.pop(_AVERAGED, None)
    return tensors, told


def _has_tensors(held: Mapping[Any, Any]) -> bool:
    """Whether ``held`` is a state dict, or a holder of one."""
    if any(isinstance(value, Tensor) for value in held.values()):
        return all(isinstance(key, str) for key in held)
    return any(key in held and isinstance(held[key], Mapping) and _has_tensors(held[key]) for key in _HOLDERS)


def _kind(held: Any) -> str:
    if not isinstance(held, Mapping):
        return f"a {type(held).__name__}"
    several = [repr(key) for key, value in held.items() if isinstance(value, Mapping) and _has_tensors(value)]
    return f"more than one state dict ({', '.join(several)})" if several else "no tensors"
