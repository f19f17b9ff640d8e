"""The student of a run, alone: its network and weights, without teacher, data or Lightning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from lqkd.errors import UsageError, first_line
from lqkd.origin import check_code
from lqkd.quantization import Recipe, quantize_model
from lqkd.quantization.residual import other_places

_FILES = {"student.safetensors": "student", "network.safetensors": "network"}
"""What a run leaves, and the key of the network in its metadata."""


def load_student(path: str | Path, allow_code: bool = False) -> nn.Module:
    """The trained network of a run, in eval mode and on the CPU, ready to be called.

    It takes images (B, C, H, W) float32, normalised with the mean and std that :func:`describe_student` tells, and
    returns logits (B, classes). The file names the class of the network, which is imported and built.

    Args:
        path: a run folder, or its ``student.safetensors``; ``network.safetensors`` of a float training likewise.
        allow_code: whether classes outside of lqkd, torch, lightning, torchvision and timm are imported that no
            training of this user has named: for files that you trust.

    Raises:
        UsageError: when there is no such file, it is damaged, does not say what network it belongs to, or names code
            that is not allowed.
    """
    file = student_file(path)
    described = describe_student(file)
    named = {key: described.get(key) for key in (*_FILES.values(), "quantization")}
    check_code(named, file, allow_code, "give --allow-code, or load_student(..., allow_code=True)")
    network, recipe = _build(described, file)
    if recipe is not None:
        network, _ = quantize_model(network, recipe)
    with safe_open(file, "pt") as stream:
        state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    try:
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        moved = other_places(network.state_dict(), state)
        raise UsageError(
            f"{str(file)!r} holds weights of another network than it names ({first_line(error)})"
            if moved is None
            else f"{str(file)!r} does not fit: {moved}"
        ) from error
    return network.eval()


def student_file(path: str | Path) -> Path:
    """The file with the network: ``path`` itself, or that in the run folder ``path``.

    Raises:
        UsageError: when there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = next((path / name for name in _FILES if (path / name).is_file()), None)
    if found is None:
        from lqkd.run_folder import CONFIG, run_within  # which needs Lightning

        if (path / CONFIG).is_file():
            raise UsageError(f"the run {str(path)!r} has not ended: finish it first with python -m lqkd resume {path}")
        exists = "has no student.safetensors, which a finished training leaves" if path.is_dir() else "does not exist"
        raise UsageError(
            f"{str(path)!r} {exists}: give the folder of a finished run, or its student.safetensors{run_within(path)}"
        )
    return found


def describe_student(path: str | Path) -> dict[str, Any]:
    """What the file says about itself: ``class_names``, ``mean``, ``std``, ``image_shape`` (C, H, W), settings.

    Raises:
        UsageError: when there is no such file or it is damaged.
    """
    file = student_file(path)
    try:
        with safe_open(file, "pt") as stream:
            return {key: json.loads(value) for key, value in (stream.metadata() or {}).items()}
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not a student that can be read ({first_line(error)})") from error


def _build(described: dict[str, Any], file: Path) -> tuple[nn.Module, Recipe | None]:
    from jsonargparse import ArgumentParser

    kind = next((key for key in _FILES.values() if key in described), None)
    if kind is None or described[kind] is None:
        raise UsageError(
            f"{str(file)!r} does not say which network it belongs to: the run was not made by python -m lqkd fit; "
            "build the network, quantise it and load the tensors with safetensors.torch.load_file"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    parser.add_argument("--quantization", type=Recipe | None)
    given = {"network": described[kind], "quantization": described.get("quantization") if kind == "student" else None}
    try:
        built = parser.instantiate_classes(parser.parse_object(given))
    except Exception as error:  # the parser and a network's own constructor raise many types
        cause = error.__cause__ if isinstance(error.__cause__, UsageError) else error
        raise UsageError(f"the network of {str(file)!r} cannot be built ({first_line(cause)})") from error
    return built.network, built.quantization
