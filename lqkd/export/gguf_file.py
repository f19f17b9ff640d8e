"""A language model as a GGUF file, written from the codes and steps that were trained, and read back as proof."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError, first_line
from lqkd.export import gguf_llama
from lqkd.export.deploy import deployable_copy
from lqkd.export.gguf_names import Sizes, architecture, check_known, describe, layers, sizes, vocabulary
from lqkd.export.gguf_tokenizer import add_tokenizer
from lqkd.export.language_weights import check_unfolded, check_weights_alone, quantized_weights
from lqkd.models import GPT
from lqkd.quantization import quantizers
from lqkd.quantization.codes import check_finite, check_fitted
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers.blocks import Q4_0, Q8_0, TQ2_0, BlockFormat
from lqkd.utils.files import atomic_path

GGUF = "gguf"
"""The name of the format."""
FLOAT = "F32"
_PREFIX = "lqkd."
_OWN = ("version", "sizes")
"""What a file tells by itself under that prefix."""


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if find_spec(GGUF) is None:
        raise UsageError("--format gguf needs gguf: pip install 'lqkd[gguf]'")


def to_gguf(
    model: nn.Module, path: str | Path, *, about: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> dict[str, str]:
    """Write a language model as a GGUF file for llama.cpp, and prove that the file holds what was trained.

    Weights on the grid of ``q4_0``, ``q8_0`` or ``tq2_0`` are written as their codes and float16 steps, nothing is
    quantised again; all others as float32. The file is then read by the package ``gguf``, and every tensor must decode
    to the bits of the weight that the student computes with. Queries and keys of a Llama have their rows in another
    order in the file, as llama.cpp's converter writes them.

    llama.cpp quantizes the inputs of each layer to 8 bits as it computes, and its GELU is ``GPT(gelu="tanh")``: its
    logits are near those of the student, not equal.

    Args:
        model: a :class:`~lqkd.models.GPT`, or a Llama of :func:`~lqkd.models.causal_lm`, trained at ``bits="q4_0"``,
            ``"q8_0"`` or ``"tq2_0"``; it is left alone.
        path: of the file, complete or not there; an existing one is replaced.
        about: what the file shall also say about itself, JSON values, under ``lqkd.NAME``.
        tokenizer: of Hugging Face, as :class:`~lqkd.data.TextFiles` takes it: one in a GGUF file is copied, one of
            GPT-2's or SmolLM's kind is written. None for the 256 bytes; of another vocabulary the file has none then,
            and takes numbers of tokens.

    Returns:
        Name of each tensor to its type in the file: ``Q4_0``, ``Q8_0``, ``TQ2_0`` or ``F32``.

    Raises:
        UsageError: when the network is another, a grid has no type in the file, the training has failed, or ``about``
            or ``tokenizer`` is not possible.
        ParityError: when the file decodes to something else; nothing is written then.
    """
    require()
    if not isinstance(tokenizer, str | None):
        raise UsageError(
            f"tokenizer of type {type(tokenizer).__name__} is not possible: give a folder, a .gguf file or a name"
        )
    _check_about(about or {})
    student = gguf_student(model)
    encoded = dict(_encoded(student))
    with atomic_path(path) as temporary:
        _write(encoded, student, temporary, about or {}, tokenizer)
        check_gguf(temporary, student)
    return {name: kind for name, (kind, _) in encoded.items()}


def _check_about(about: Mapping[str, Any]) -> None:
    for key in _OWN:
        if key in about:
            raise UsageError(f"about[{key!r}] is not possible: the file says {', '.join(_OWN)} by itself")
    try:
        json.dumps(dict(about), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"about is not possible: a file keeps JSON values ({first_line(error)})") from error


def gguf_student(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that a file is made of.

    Raises:
        UsageError: when no file can be.
    """
    student = check_known(deployable_copy(model))
    check_gguf_grids(student)
    return student


def check_gguf_grids(student: nn.Module) -> None:
    """Refuse grids that a GGUF file has no type for, whatever quantizers know yet.

    Raises:
        UsageError: for the first one.
    """
    check_known(student)
    for name, layer, quantizer in quantized_weights(student):
        if not isinstance(quantizer, BlockFormat):
            raise UsageError(
                f"the weight of {name} is on the grid of {type(quantizer).__name__}, which a GGUF file has no "
                "type for: train with quantization.bits=q4_0, q8_0 or tq2_0"
            )
        check_unfolded(name, layer, "a GGUF file")
    check_weights_alone(
        student,
        "a GGUF file does not have (llama.cpp measures its own): train with 32 activation bits, as "
        "quantization.bits=q4_0 does",
    )


def of_gguf(student: nn.Module) -> bool:
    """Whether a weight is on the grid of a GGUF file, and so of no other."""
    return any(isinstance(quantizer, BlockFormat) for quantizer in quantizers(student).values())


def check_gguf(path: str | Path, model: nn.Module) -> None:
    """Decode every tensor of a file by the package ``gguf`` and compare it with what ``model`` computes with.

    Raises:
        ParityError: when a tensor is missing or is another, or one decodes to other bits.
    """
    expected = {name: values for name, (_, _, values) in _decoded(check_known(model))}
    found = dict(_tensors(path))
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ParityError(f"the file and the student differ in the tensors that they have: {', '.join(odd[:3])}")
    for name, values in expected.items():
        if found[name].shape != values.shape or found[name].tobytes() != values.tobytes():
            raise ParityError(f"tensor {name} of the file decodes to other numbers than the student computes with")


def from_gguf(path: str | Path) -> nn.Module:
    """The network of a file, in floating point and out of nothing but the file, as llama.cpp reads it.

    That of a Llama is read by transformers, which knows nothing of lqkd.

    Raises:
        UsageError: when it is no file of :func:`to_gguf`.
    """
    require()
    try:
        said = said_of(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no GGUF file that can be read ({first_line(error)})") from error
    if "version" not in said:
        raise UsageError(f"{str(path)!r} was not written by lqkd")
    if "sizes" not in said:
        return gguf_llama.read(path)
    told = Sizes(**said["sizes"])
    network = GPT(told.vocabulary, told.context, told.width, told.depth, told.heads, gelu="tanh")
    found = dict(_tensors(path))
    if "output.weight" not in found:
        network.head.weight = network.token.weight
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = told.epsilon
        for name, layer, _ in layers(network):
            for key, parameter in layer.named_parameters():
                parameter.copy_(torch.from_numpy(found[f"{name}.{key}"]))
    return network.eval()


def said_of(path: str | Path) -> dict[str, Any]:
    """What a file says about itself under ``lqkd.NAME``."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {
        key.removeprefix(_PREFIX): json.loads(field.contents())
        for key, field in fields.items()
        if key.startswith(_PREFIX)
    }


def _tensors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Name of each tensor of a file and its values, float32, in PyTorch's order of axes."""
    import gguf

    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, np.array(values, np.float32).reshape([int(size) for size in reversed(tensor.shape)])


@torch.no_grad()
def _decoded(student: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Tensor | None, np.ndarray]]]:
    """Name of each tensor, its layer, the order of its rows in the file, and its float32 values there."""
    for name, layer, order in layers(student):
        weight = layer.quantized_weight() if isinstance(layer, QuantizedLayer) else layer.weight
        for key, values in (("weight", weight), ("bias", getattr(layer, "bias", None))):
            if values is not None:
                values = cast(Tensor, values)
                yield f"{name}.{key}", (layer, order, (values if order is None else values[order]).numpy())


@torch.no_grad()
def _encoded(student: nn.Module) -> Iterator[tuple[str, tuple[str, np.ndarray]]]:
    """Name of each tensor, its type, and its bytes (uint8) or numbers (float32)."""
    for name, (layer, order, values) in _decoded(student):
        quantizer = getattr(layer, "weight_quantizer", None)
        if name.endswith(".weight") and isinstance(quantizer, BlockFormat):
            packed = _blocks(quantizer, cast(Tensor, layer.weight), name)
            yield name, (quantizer.format_name.upper(), packed if order is None else packed[order.numpy()])
        else:
            check_finite(torch.from_numpy(values), name, "number")
            yield name, (FLOAT, values)


def _blocks(quantizer: BlockFormat, weight: Tensor, place: str) -> np.ndarray:
    """The bytes (rows, bytes a row) of a weight: of each block the float16 step and its codes, in ggml's order."""
    check_fitted(quantizer, place)
    check_finite(weight, place, "weight")
    check_finite(quantizer.scale, place, "scale")  # which a step, within float16's range, would hide
    check_finite(quantizer.start, place, "start of a step")
    codes = quantizer.codes(weight).reshape(-1, quantizer.block_size).numpy()
    steps = quantizer.step().to(torch.float16).numpy().reshape(-1, 1).view(np.uint8)  # (blocks, 2)
    if isinstance(quantizer, Q4_0):  # a byte has a code of the first half and one of the second
        halves = (codes + 8).astype(np.uint8).reshape(len(codes), 2, -1)
        packed = halves[:, 0] | (halves[:, 1] << 4)
    elif isinstance(quantizer, TQ2_0):  # a byte has one of each quarter of 128, and the step is behind them
        quarters = (codes + 1).astype(np.uint8).reshape(len(codes), 2, 4, 32) << np.array(
            [[0], [2], [4], [6]], np.uint8
        )
        packed = np.bitwise_or.reduce(quarters, axis=2).reshape(len(codes), -1)
        return np.concatenate([packed, steps], axis=1).reshape(len(weight), -1)
    else:
        assert isinstance(quantizer, Q8_0)
        packed = codes.astype(np.int8).view(np.uint8)
    return np.concatenate([steps, packed], axis=1).reshape(len(weight), -1)


def _write(
    encoded: Mapping[str, tuple[str, np.ndarray]],
    student: nn.Module,
    path: Path,
    about: Mapping[str, Any],
    tokenizer: str | None,
) -> None:
    import gguf

    kinds = [kind for kind, _ in encoded.values() if kind != FLOAT]
    most = max(sorted(set(kinds)), key=kinds.count) if kinds else "F32"
    own = {"version": metadata.version("lqkd")} | ({"sizes": asdict(sizes(student))} if type(student) is GPT else {})
    writer = gguf.GGUFWriter(path, architecture(student))
    try:
        writer.add_name(str(about.get("name", "lqkd student")))
        describe(student, writer)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if most == "F32" else f"MOSTLY_{most}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, vocabulary(student), tokenizer)
        for key, value in {**own, **about}.items():
            writer.add_string(f"{_PREFIX}{key}", json.dumps(value))
        for name, (kind, values) in encoded.items():
            writer.add_tensor(name, values, raw_dtype=None if kind == FLOAT else gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
