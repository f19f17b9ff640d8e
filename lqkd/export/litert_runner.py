"""Running a TFLite file in LiteRT's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lqkd.errors import UsageError, first_line
from lqkd.export.litert_file import packed, unpacked


class Interpreted:
    """A file in the interpreter, on one thread.

    Args:
        content: the file.
        delegated: with XNNPACK, as the interpreter runs it unless told otherwise; or with its own kernels alone.
        tensors: names of further tensors that are wanted.

    Raises:
        UsageError: when the interpreter does not take the file.
    """

    def __init__(self, content: bytes, *, delegated: bool = True, tensors: Sequence[str] = ()) -> None:
        import ai_edge_litert
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kinds = OpResolverType
        try:
            self._interpreter: Any = Interpreter(
                model_content=_watched(content, tensors) if delegated else content,
                num_threads=1,
                experimental_op_resolver_type=kinds.AUTO if delegated else kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=not delegated,
            )
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            version = getattr(ai_edge_litert, "__version__", "")
            raise UsageError(f"ai-edge-litert {version} does not take the file ({first_line(error)})") from error
        self.taken = [entry["index"] for entry in self._interpreter.get_input_details()]
        details = self._interpreter.get_tensor_details()
        returned = {entry["name"]: entry["index"] for entry in self._interpreter.get_output_details()}
        places = {entry["name"]: entry["index"] for entry in details} | returned
        self._read = {name: places[name] for name in dict.fromkeys([*returned, *tensors])}

    def __call__(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs and further tensors by name, of one batch, as the file has them."""
        for index, array in zip(self.taken, arrays, strict=True):
            self._interpreter.set_tensor(index, np.ascontiguousarray(array))
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index) for name, index in self._read.items()}


def _watched(content: bytes, tensors: Sequence[str]) -> bytes:
    """The file with further outputs: what a delegate computes on its way is seen nowhere else."""
    if not tensors:
        return content
    model = unpacked(content)
    graph = model.subgraphs[0]
    places = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
    graph.outputs = [*graph.outputs, *(places[name] for name in tensors if places[name] not in graph.outputs)]
    model.signatureDefs = None
    return packed(model)
