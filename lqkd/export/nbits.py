"""A language model as ONNX for MatMulNBits of ONNX Runtime, written from the codes and steps that were trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export.deploy import OUTPUT, deployable_copy
from lqkd.export.language_weights import check_weights_alone, quantized_weights
from lqkd.export.metadata import PREFIX, read
from lqkd.export.nbits_graph import IN_FLOAT, OPSET, RUNTIME_DOMAIN, Graph, check_grid, unpack
from lqkd.export.nbits_networks import check_known, is_known, known_sizes, logits
from lqkd.export.parity import Parity, differences, judge_outputs
from lqkd.export.runtimes import session
from lqkd.models.outputs import Asked, main_tensor
from lqkd.quantization import Quantizer, quantizers
from lqkd.quantization.layers import QuantizedLayer
from lqkd.utils.files import atomic_path

NBITS = "nbits"
"""The name of the format."""
TOKENS = "input_ids"
"""What a file calls its input."""
_TOKENS = 8
"""That are put through a file as it is written."""
_LARGEST = 2**31 - 1
"""Bytes of a file of protocol buffers."""


def to_nbits(model: nn.Module, path: str | Path, *, about: Mapping[str, Any] | None = None) -> dict[int, int]:
    """Write a language model as ONNX whose matrices are multiplied by ONNX Runtime's ``MatMulNBits``.

    Weights in groups along the input axis are written as their codes, 2, 4 or 8 bits, and float32 steps; nothing is
    quantised again. The file is then read, and codes times steps must be the bits of every weight that the student
    computes with; ONNX Runtime's logits of a few tokens must be the student's, but for sums in another order. An
    embedding that is the head too is held once. Input is ``input_ids`` (B, T) int64, output ``logits`` (B, T, V)
    float32, for any B and T; sums are made in float32.

    Args:
        model: a :class:`~lqkd.models.GPT`, or a Llama of :func:`~lqkd.models.causal_lm`, with the grids of ``q4_0``,
            ``q8_0`` or ``tq2_0``, or of ``lsq`` in groups of 16 to 256, or of ``seq`` likewise up to 4 bits, and
            activations in float; it is left alone. The levels of ``seq`` lie around a zero that is no code, which
            ONNX Runtime reads from 1.27 on.
        path: of the file, complete or not there; an existing one is replaced.
        about: what the file shall also say about itself, JSON values.

    Returns:
        Bits to the number of layers that have as many.

    Raises:
        UsageError: when the network is another, MatMulNBits does not have a grid, the training has failed, or the file
            would be larger than ONNX allows.
        ParityError: when the file decodes to something else, or computes it; nothing is written then.
    """
    student = nbits_student(model)
    graph = Graph()
    output = logits(graph, TOKENS, student)
    graph.nodes.append(helper.make_node("Identity", [output], [OUTPUT]))
    shape: list[Any] = ["batch", "tokens"]
    made = helper.make_graph(
        graph.nodes,
        "lqkd",
        [helper.make_tensor_value_info(TOKENS, TensorProto.INT64, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [*shape, None])],
        list(graph.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(RUNTIME_DOMAIN, 1)]
    written = helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="lqkd")
    vocabulary, context = known_sizes(student)
    own = {"version": metadata.version("lqkd"), "format": NBITS, "vocabulary": vocabulary, "context": context}
    said = {**own, **(about or {})}
    helper.set_model_props(written, {f"{PREFIX}{key}": json.dumps(value) for key, value in said.items()})
    if written.ByteSize() > _LARGEST:
        raise UsageError(f"--format nbits is not possible: the file would have {written.ByteSize():,} bytes, of 2 GiB")
    with atomic_path(path) as temporary:
        temporary.write_bytes(written.SerializeToString())
        check_nbits(temporary, student)
        _check_logits(temporary, student)
    return dict(Counter(quantizer.bits for _, _, quantizer in quantized_weights(student)))


@torch.no_grad()
def _check_logits(path: Path, student: nn.Module) -> None:
    tokens = torch.arange(min(_TOKENS, *known_sizes(student)))[None]
    ours, theirs = ({OUTPUT: main_tensor(network(tokens), Asked("student", 1))} for network in (student, Runtime(path)))
    parity = Parity(outputs=differences(ours, theirs))
    judge_outputs(parity)
    if parity.problem is not None:
        raise ParityError(f"ONNX Runtime computes something else from the file: {parity.problem}")


def nbits_student(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that a file is made of.

    Raises:
        UsageError: when no file can be.
    """
    student = deployable_copy(model)
    check_nbits_grids(student)
    return student


def check_nbits_grids(student: nn.Module) -> None:
    """Refuse networks and grids that such a file does not have, whatever quantizers know yet.

    Raises:
        UsageError: for the first one.
    """
    check_known(student)
    found = list(quantized_weights(student))
    for name, layer, _ in found:
        check_grid(layer, name)
    if not found:
        raise UsageError(
            "--format nbits is not possible for a network in floating point: train a student below 32 bits"
        )
    check_weights_alone(student, f"a file of --format nbits does not have: {IN_FLOAT}")


def of_nbits(student: nn.Module) -> bool:
    """Whether it is a language model with weights in groups, of which other ONNX files have none."""
    return is_known(student) and any(quantizer.group_size for quantizer in quantizers(student).values())


@torch.no_grad()
def check_nbits(path: str | Path, model: nn.Module) -> None:
    """Decode every weight of a file and compare it with what ``model`` computes with.

    Raises:
        ParityError: when one is missing or decodes to other bits.
    """
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for name, layer, expected in _weights(model):
        found = _decoded(tensors, name, layer)
        if found is None or found.shape != expected.shape or found.tobytes() != expected.tobytes():
            raise ParityError(f"tensor {name} of the file decodes to other numbers than the student computes with")


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, np.ndarray]]:
    """Name, layer and values of every parameter, of a shared one once, and of a quantised one on its grid."""
    for place, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            quantized = key == "weight" and isinstance(module, QuantizedLayer)
            values = cast(QuantizedLayer, module).quantized_weight() if quantized else parameter
            tied = next(name for name, other in model.named_parameters() if other is parameter)
            if tied == f"{place}.{key}":
                yield tied, module, values.numpy()


def _decoded(tensors: Mapping[str, np.ndarray], name: str, layer: nn.Module) -> np.ndarray | None:
    """A parameter out of a file, float32: codes times steps, or numbers, which linear layers have the other way."""
    place = name.removesuffix(".weight")
    codes, scales, zero = (tensors.get(f"{place}.{kind}") for kind in ("codes", "scales", "zero"))
    values = tensors.get(name)
    if codes is not None and scales is not None:
        size = cast(int, cast(Quantizer, layer.weight_quantizer).group_size)
        bits = 8 * codes.shape[-1] // size
        numbers = unpack(codes, bits).astype(np.float32) - (np.float32(2 ** (bits - 1)) if zero is None else zero)
        return (numbers * scales[..., None]).reshape(len(codes), -1)
    transposed = values is not None and values.ndim == 2 and isinstance(layer, nn.Linear)
    return np.ascontiguousarray(values.T) if values is not None and transposed else values


class Runtime(nn.Module):
    """A file in ONNX Runtime: tokens (B, T) to logits (B, T, V).

    Attributes:
        vocabulary: the number of tokens.
        context: the longest text.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        model = onnx.load(path)
        said = read(model)
        self.vocabulary, self.context = said.get("vocabulary"), said.get("context")
        self._session = session(model, optimised=True, threads=torch.get_num_threads())

    def forward(self, tokens: Tensor) -> Tensor:
        (found,) = self._session.run([OUTPUT], {TOKENS: tokens.numpy()})
        return torch.from_numpy(found)
