"""The student of a run, alone: its network and weights, without teacher, data or Lightning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lqkd.errors import UsageError, first_line
from lqkd.models.bounds import no_larger_than
from lqkd.models.finite import not_finite
from lqkd.quantization import Recipe, quantize_model
from lqkd.quantization.residual import other_places
from lqkd.runs.provenance import check_code
from lqkd.utils.schema import NETWORK_FILE, check

_FILES = {"student.safetensors": "student", "network.safetensors": "network"}
"""What a run leaves, and the key of the network in its metadata."""
_NCNN = "ncnn runs it: load_param and load_model of an ncnn.Net take student.param and student.bin"
_OTHERS = {
    ".onnx": "ONNX Runtime runs it, as python -m lqkd predict {} IMAGE does",
    ".gguf": "llama.cpp runs it, and lqkd.export.from_gguf reads it",
    ".tflite": "LiteRT's interpreter runs it",
    ".pte": "ExecuTorch's runtime runs it",
    ".pt2": "torch.export.load loads it, and python -m lqkd predict {} IMAGE asks it",
    ".mlpackage": "Core ML runs it, on Apple's systems",
    ".ncnn": _NCNN,
    ".param": _NCNN,
    ".bin": _NCNN,
    ".compressed-tensors": "transformers loads it, and lqkd.export.from_compressed_tensors reads it",
    ".ckpt": "give the folder of its run, whose student.safetensors has the best weights",
}
"""What takes other files that lqkd writes, by their ending."""


def load_student(path: str | Path, allow_code: bool = False) -> nn.Module:
    """The trained network of a run, in eval mode and on the CPU, ready to be called.

    It takes images (B, C, H, W) float32, normalised with the mean and std that :func:`describe_student` tells, and
    returns logits (B, classes). The file names the class of the network, which is imported and built.

    Args:
        path: a run folder, or its ``student.safetensors``; ``network.safetensors`` of a float training likewise.
        allow_code: whether classes outside of lqkd, torch, lightning, torchvision and timm are imported that no
            training of this user has named: for files that you trust.

    Raises:
        UsageError: when there is no such file, it is damaged, does not say what network it belongs to, names one that
            is far larger than its tensors or code that is not allowed, or holds numbers that are not finite.
    """
    file = student_file(path)
    described = describe_student(file)
    named = {key: described.get(key) for key in (*_FILES.values(), "quantization")}
    check_code(named, file, allow_code, "give --allow-code, or load_student(..., allow_code=True)")
    state = load_file(file)
    with no_larger_than({key: value.shape for key, value in state.items()}):
        network, recipe = _build(described, file)
    if recipe is not None:
        network, _ = quantize_model(network, recipe)
    if (told := not_finite(state, dict(network.named_parameters()))) is not None:
        raise UsageError(f"{str(file)!r} is of a training that diverged: {told}")
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


HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"
"""What a folder for the Hugging Face Hub has of a student: its file, renamed, and what that says of itself."""


def from_pretrained(folder: str | Path, allow_code: bool = False) -> nn.Module:
    """The network of a folder that ``python -m lqkd export RUN --hub FOLDER`` has written, as :func:`load_student`.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, here or as downloaded from the Hub.
        allow_code: as of :func:`load_student`.

    Raises:
        UsageError: when a file is missing, both say different things of the network, or as of :func:`load_student`.
    """
    weights, config = (Path(folder) / name for name in (HUB_WEIGHTS, HUB_CONFIG))
    for file in (weights, config):
        if not file.is_file():
            raise UsageError(
                f"{str(file)!r} does not exist: give a folder that python -m lqkd export RUN --hub FOLDER has written; "
                "one of the Hub is downloaded first"
            )
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{str(config)!r} is damaged, it is no JSON file: {first_line(error)}") from error
    for key, value in describe_student(weights).items():
        if not isinstance(said, dict) or said.get(key) != value:
            raise UsageError(f"{str(config)!r} and {weights.name} differ in {key!r}: one of both has been changed")
    return load_student(weights, allow_code)


def student_file(path: str | Path) -> Path:
    """The file with the network: ``path`` itself, or that in the run folder ``path``.

    Raises:
        UsageError: when there is none.
    """
    path = Path(path)
    found = path if path.is_file() else next((path / name for name in _FILES if (path / name).is_file()), None)
    if path.suffix in _OTHERS and (found == path or (found is None and path.is_dir())):
        raise UsageError(f"{str(path)!r} is not a student for PyTorch alone: {_OTHERS[path.suffix].format(path)}")
    if found is None:
        from lqkd.runs.folder import CONFIG, resume_command, run_within

        if (path / CONFIG).is_file():
            raise UsageError(f"the run {str(path)!r} has not ended: finish it first with {resume_command(path)}")
        exists = "has no student.safetensors, which a finished training leaves" if path.is_dir() else "does not exist"
        raise UsageError(
            f"{str(path)!r} {exists}: give the folder of a finished run, or its student.safetensors{run_within(path)}"
        )
    return found


def describe_student(path: str | Path) -> dict[str, Any]:
    """What the file says about itself: ``class_names``, ``mean``, ``std``, ``image_shape`` (C, H, W), settings.

    Raises:
        UsageError: when there is no such file, it is damaged, or it says what cannot be.
    """
    file = student_file(path)
    try:
        with safe_open(file, "pt") as stream:
            said = {key: json.loads(value) for key, value in (stream.metadata() or {}).items()}
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not a student that can be read ({first_line(error)})") from error
    check(said, NETWORK_FILE, str(file))
    return said


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
