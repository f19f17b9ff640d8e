"""Loading float weights from a file into a network."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lqkd.errors import UsageError, first_line

BUILTIN = "builtin:"
"""Prefix of weights that come with the package, e.g. ``builtin:digits_teacher``."""
COMPILED = "_orig_mod."
"""What :func:`torch.compile` puts into the names of a network that was saved from inside its wrapper."""


def load_weights(network: nn.Module, source: str, replace_head: bool | None = False) -> str | None:
    """Load ``source`` into ``network``, every tensor or none.

    Args:
        network: the network as it will be used, before quantization.
        source: ``builtin:NAME``, a ``.safetensors`` file, or a file of :func:`torch.save` with a state dict;
            environment variables such as ``$LQKD_DATA`` are replaced.
        replace_head: whether a last layer for another number of classes is left as it is; None where the network must
            know its classes already.

    Returns:
        What was left as it is, in a sentence; None when everything was loaded.

    Raises:
        UsageError: when there is no such file, or its tensors are not those of ``network``.
    """
    state = _read(source)
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in state if key in own and state[key].shape != own[key].shape]
    told = None
    if not missing and not unexpected and (classes := _classes(state, own, shapes)) is not None:
        layers = " and ".join(sorted({repr(key.rpartition(".")[0]) for key in shapes}))
        told = f"weights={source!r} are for {classes[0]} classes and the network has {classes[1]}"
        if not replace_head:
            raise UsageError(told + _REMEDIES[replace_head].format(layers))
        told = f"{told}: its last layer {layers} starts anew"
        state = {key: value for key, value in state.items() if key not in shapes}
        shapes = []
    for problem, keys in (
        ("they lack", missing),
        ("it has no place for", unexpected),
        ("they have another shape for", shapes),
    ):
        if keys:
            kind, more = type(network).__name__, f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UsageError(
                f"weights={source!r} are of another network than {kind}: {problem} {keys[0]!r}{more}; its "
                "arguments (depth, width, num_classes) must be those of the run that wrote the file"
            )
    network.load_state_dict(state, strict=False)
    return told


_REMEDIES = {
    False: ": give the model replace_head: true to start its last layer {} anew",
    None: ": a teacher must know its classes, so train it first with ClassifierModule, these weights and replace_head: "
    "true",
}
"""What to do about a last layer for other classes."""


def _classes(state: dict[str, Tensor], own: dict[str, Tensor], keys: list[str]) -> tuple[int, int] | None:
    """Numbers of classes in the file and of the network, where ``keys`` differ in nothing else."""
    if not keys or not all(own[key].ndim and own[key].shape[1:] == state[key].shape[1:] for key in keys):
        return None
    numbers = {(len(state[key]), len(own[key])) for key in keys}
    return numbers.pop() if len(numbers) == 1 else None


def weights_exist(source: str) -> bool:
    """Whether ``source``, as :func:`load_weights` takes it, is there to be read."""
    if source.startswith(BUILTIN):
        return source.removeprefix(BUILTIN) in builtin_weights()
    return Path(os.path.expandvars(source)).expanduser().is_file()


def builtin_weights() -> list[str]:
    """Names of the weights that come with the package."""
    folder = resources.files("lqkd") / "weights"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".safetensors"))


def _read(source: str) -> dict[str, Tensor]:
    if source.startswith(BUILTIN):
        name = source.removeprefix(BUILTIN)
        if name not in builtin_weights():
            raise UsageError(f"weights={source!r} do not exist: built in are {', '.join(builtin_weights())}")
        with resources.as_file(resources.files("lqkd") / "weights" / f"{name}.safetensors") as path:
            return load_file(path)
    path = Path(os.path.expandvars(source)).expanduser()
    if "$" in str(path):
        raise UsageError(f"weights={source!r} name an environment variable that is not set: set it, or give a path")
    if not path.is_file():
        raise UsageError(f"weights={source!r} do not exist: give a .safetensors or .pt file, or {BUILTIN}NAME")
    try:
        if path.suffix == ".safetensors":
            return {key.replace(COMPILED, ""): value for key, value in load_file(path).items()}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise many types for a damaged file
        raise UsageError(
            f"weights={source!r} cannot be read as {path.suffix or 'torch'} file ({first_line(error)})"
        ) from error
    if not isinstance(state, dict):
        raise UsageError(f"weights={source!r} hold a {type(state).__name__}: a state dict is needed")
    tensors = {key: value for key, value in state.get("state_dict", state).items() if isinstance(value, Tensor)}
    return {key.replace(COMPILED, ""): value for key, value in tensors.items()}
