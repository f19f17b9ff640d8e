"""A TFLite flatbuffer, put together tensor by tensor and operator by operator.

The layout is TensorFlow Lite's ``schema.fbs``, whose generated classes come with ai-edge-litert.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lqkd.errors import UsageError

METADATA = "lqkd.json"
"""The name, within the file, of what it says about itself."""
_IDENTIFIER = b"TFL3"
_SCHEMA_VERSION = 3
_LARGEST = 2**31
"""Bytes of a file, whose offsets are signed numbers of 32 bits."""
_LARGEST_OLD_CODE = 127
"""Operators beyond it have their code in a second field alone."""


@dataclass
class Builder:
    """Collects the tensors and operators of one graph.

    Args:
        taken: names that no tensor shall have by itself.

    Attributes:
        tensors: of the schema, in the order in which they were added; an operator names them by position.
        operators: likewise, in the order in which they run.

    Example:
        >>> from lqkd.export.litert_file import Builder
        >>> from lqkd.export.litert_runner import Interpreted
        >>> import numpy as np
        >>> builder = Builder()
        >>> x = builder.tensor("x", [1, 2], "float32")
        >>> codes = builder.tensor("codes", [1, 2], "int8", scale=np.float32(0.5), zero_point=-128)
        >>> _ = builder.operator("QUANTIZE", [x], codes, "QuantizeOptions")
        >>> Interpreted(builder.finish([x], [codes]))([np.array([[1, 2]], np.float32)])["codes"]
        array([[-126, -124]], dtype=int8)
    """

    taken: set[str] = field(default_factory=set)
    tensors: list[Any] = field(default_factory=list)
    operators: list[Any] = field(default_factory=list)
    _buffers: list[Any] = field(default_factory=lambda: [schema().BufferT()])  # the first is empty by definition
    _held: dict[bytes, int] = field(default_factory=dict)
    _codes: dict[tuple[int, int], int] = field(default_factory=dict)

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str,
        scale: Any = None,
        zero_point: int = 0,
        data: np.ndarray | None = None,
        axis: int = 0,
    ) -> int:
        """Add a tensor and return its position.

        Args:
            name: a number is put behind it where it is taken.
            shape: of its axes, the batch among them.
            dtype: ``float32``, ``int8`` or ``int32``.
            scale: () or (channels,) float32, of numbers on a grid.
            zero_point: the code of zero.
            data: of a constant, in the shape.
            axis: of the channels.
        """
        s = schema()
        own, number = name, 1
        while own in self.taken:
            number += 1
            own = f"{name}_{number}"
        self.taken.add(own)
        tensor = s.TensorT(name=own.encode(), shape=list(shape), type=getattr(s.TensorType, dtype.upper()))
        tensor.buffer = 0 if data is None else self.buffer(np.ascontiguousarray(data, dtype))
        if scale is not None:
            scales = np.atleast_1d(np.asarray(scale, np.float32))
            points = np.full(scales.shape, zero_point, np.int64)
            tensor.quantization = s.QuantizationParametersT(scale=scales, zeroPoint=points, quantizedDimension=axis)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def buffer(self, array: np.ndarray) -> int:
        """The position of a buffer with the numbers of ``array``; what several tensors hold is there once."""
        data = array.tobytes()
        if data not in self._held:
            self._held[data] = len(self._buffers)
            self._buffers.append(schema().BufferT(data=np.frombuffer(data, np.uint8)))
        return self._held[data]

    def operator(
        self, kind: str, inputs: Sequence[int], output: int, options: str = "", version: int = 1, **settings: Any
    ) -> int:
        """Add an operator with one output and return the output's position.

        Args:
            kind: of the schema's ``BuiltinOperator``.
            inputs: positions of tensors.
            output: likewise.
            options: the schema's table of its settings; empty where it has none.
            version: the first of the operator that can do what is asked of it.
            **settings: fields of that table.
        """
        s = schema()
        code = (getattr(s.BuiltinOperator, kind), version)
        position = self._codes.setdefault(code, len(self._codes))
        added = s.OperatorT(opcodeIndex=position, inputs=list(inputs), outputs=[output])
        if options:
            added.builtinOptionsType = getattr(s.BuiltinOptions, options)
            added.builtinOptions = getattr(s, f"{options}T")(**settings)
        self.operators.append(added)
        return output

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file; ``inputs`` and ``outputs`` are positions of tensors, which callers ask for by their names."""
        s = schema()
        graph = s.SubGraphT(
            name=b"lqkd", tensors=self.tensors, inputs=list(inputs), outputs=list(outputs), operators=self.operators
        )
        signature = s.SignatureDefT(
            signatureKey=b"serving_default",
            inputs=[s.TensorMapT(name=self.tensors[i].name, tensorIndex=i) for i in inputs],
            outputs=[s.TensorMapT(name=self.tensors[i].name, tensorIndex=i) for i in outputs],
        )
        codes = [
            s.OperatorCodeT(deprecatedBuiltinCode=min(code, _LARGEST_OLD_CODE), builtinCode=code, version=version)
            for code, version in self._codes
        ]
        model = s.ModelT(
            version=_SCHEMA_VERSION,
            operatorCodes=codes,
            subgraphs=[graph],
            description=b"lqkd",
            buffers=self._buffers,
            signatureDefs=[signature],
        )
        return packed(model)


def schema() -> Any:
    """The generated classes of the schema."""
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


def unpacked(content: bytes) -> Any:
    """The ``ModelT`` of a file, to be read or changed."""
    return schema().ModelT.InitFromPackedBuf(content, 0)


def packed(model: Any) -> bytes:
    """The file of a ``ModelT``.

    Raises:
        UsageError: when it would be too large.
    """
    import flatbuffers

    size = sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    if size >= _LARGEST:
        raise UsageError(
            f"--format litert is not possible: a TFLite file has less than 2 GB, and this network {size:,} bytes of "
            "numbers: --format portable puts them into a second file"
        )
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def described(content: bytes, about: dict[str, Any]) -> bytes:
    """The same file with ``about``, JSON values, in its metadata."""
    model = unpacked(content)
    told = json.dumps(about).encode()
    model.metadata = [schema().MetadataT(name=METADATA.encode(), buffer=len(model.buffers))]
    model.buffers.append(schema().BufferT(data=np.frombuffer(told, np.uint8)))
    return packed(model)


def description(content: bytes) -> dict[str, Any]:
    """What :func:`described` put there; nothing where it did not."""
    model = unpacked(content)
    for entry in model.metadata or ():
        if entry.name == METADATA.encode():
            found: dict[str, Any] = json.loads(bytes(model.buffers[entry.buffer].data))
            return found
    return {}
