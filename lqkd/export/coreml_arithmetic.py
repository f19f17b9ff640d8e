"""What an ML Program computes by the definitions of its operators, in PyTorch: Core ML runs on Apple's systems alone.

Quantize divides by the scale, rounds half to even, adds the zero point and clamps to the type; dequantize subtracts the
zero point and multiplies; all else is in float32. In which order Core ML adds, and how it rounds a middle, is not told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.export.coreml_file import read
from lqkd.export.deploy import Deployed
from lqkd.export.runtimes import Runner
from lqkd.models.calls import Inputs

_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_MAXIMA: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


class ProgramRunner(Runner):
    """Runs files on samples, one at a time.

    Args:
        files: by their paths.
        deployed: the network that they were made of.
        grids: names for the codes of all quantize operators, in the order of the program; returned, too.

    Raises:
        UsageError: for an operator that is not defined here.
    """

    def __init__(self, files: dict[str, bytes], deployed: Deployed, grids: Sequence[str] = ()) -> None:
        self._deployed = deployed
        self._function = read(files)
        self.outputs = list(deployed.outputs)
        self._operations = [op for op in self._function.operations if op.op_type != "const"]
        unknown = next((op.op_type for op in self._operations if op.op_type not in _OPERATORS), None)
        if unknown is not None:
            raise UsageError(f"--format coreml cannot verify operator {unknown} of Core ML: use portable")
        quantized = [op.outputs[0].name for op in self._operations if op.op_type == "quantize"]
        returned = [value.name for value in self._function.outputs]
        self._returned = dict(zip(self.outputs, returned, strict=True)) | dict(zip(grids, quantized, strict=False))
        self._constants: dict[int, Any] = {}

    @torch.no_grad()
    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        assert isinstance(given, Inputs)
        tensors = self._deployed.in_order(given)
        parts = [self._run([tensor[i : i + 1] for tensor in tensors]) for i in range(len(given))]
        return {name: torch.cat([part[value] for part in parts]).numpy() for name, value in self._returned.items()}

    def _run(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        values: dict[str, Any] = dict(zip(self._function.inputs, tensors, strict=True))

        def value_of(variable: Any) -> Any:
            if isinstance(variable, list | tuple):
                return [value_of(one) for one in variable]
            return values[variable.name] if variable.name in values else self._constant(variable)

        for op in self._operations:
            given = SimpleNamespace(**{key: value_of(variable) for key, variable in op.inputs.items()})
            found = _OPERATORS[op.op_type](given)
            for variable, value in zip(op.outputs, found if isinstance(found, tuple) else (found,), strict=True):
                values[variable.name] = value
        return values

    def _constant(self, variable: Any) -> Any:
        """The tensor of constant numbers; truths and words as they are."""
        if id(variable) not in self._constants:
            held = variable.val
            is_tensor = isinstance(held, np.ndarray | np.generic) and held.dtype.kind in "fiu"
            self._constants[id(variable)] = torch.from_numpy(np.array(held)) if is_tensor else held
        return self._constants[id(variable)]


def _whole(values: Any) -> list[int]:
    return [int(value) for value in values]


def _padded(i: Any, value: float) -> Tensor:
    """``x`` with what ``pad_type`` and ``pad`` ask for on its last axes."""
    assert i.pad_type in ("custom", "valid"), "the others are not written"
    pads = _whole(i.pad) if i.pad_type == "custom" else [0] * 2 * (i.x.ndim - 2)
    return _on_axes(i.x, pads, value)


def _on_axes(x: Tensor, pads: list[int], value: float) -> Tensor:
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    return F.pad(x, [one for pair in reversed(pairs) for one in pair], value=value)


def _quantize(i: Any) -> Tensor:
    dtype = getattr(torch, i.output_dtype)
    zero = int(getattr(i, "zero_point", 0))
    limits = torch.iinfo(dtype)
    return torch.clamp(torch.round(i.input / i.scale) + zero, limits.min, limits.max).to(dtype)


def _dequantize(i: Any) -> Tensor:
    return (i.input.float() - int(getattr(i, "zero_point", 0))) * i.scale


def _conv(i: Any) -> Tensor:
    x, function = _padded(i, 0.0), _CONVOLUTIONS[i.x.ndim - 3]
    bias = getattr(i, "bias", None)
    return function(x, i.weight, bias, _whole(i.strides), 0, _whole(i.dilations), int(i.groups))  # type: ignore[no-any-return]


def _max_pool(i: Any) -> Tensor:
    x, function = _padded(i, -torch.inf), _MAXIMA[i.x.ndim - 3]
    return function(x, _whole(i.kernel_sizes), _whole(i.strides), ceil_mode=bool(i.ceil_mode))  # type: ignore[no-any-return]


def _avg_pool(i: Any) -> Tensor:
    assert i.x.ndim == 4, "one-dimensional means are not written"
    pad = _whole(i.pad)[::2] if i.pad_type == "custom" else 0
    counted = not bool(i.exclude_padding_from_average)
    return F.avg_pool2d(i.x, _whole(i.kernel_sizes), _whole(i.strides), pad, bool(i.ceil_mode), counted)


def _sliced(i: Any) -> Tensor:
    """Masks say which limits are none, and which axes go."""
    axes = range(i.x.ndim)
    none = [False] * i.x.ndim
    first, last, gone = (getattr(i, f"{name}_mask", none) for name in ("begin", "end", "squeeze"))
    steps = _whole(i.stride) if hasattr(i, "stride") else [1] * i.x.ndim
    begin, end = _whole(i.begin), _whole(i.end)
    taken = [
        begin[a] if gone[a] else slice(None if first[a] else begin[a], None if last[a] else end[a], steps[a])
        for a in axes
    ]
    return i.x[tuple(taken)]  # type: ignore[no-any-return]


def _matmul(i: Any) -> Tensor:
    x = i.x.transpose(-1, -2) if bool(getattr(i, "transpose_x", False)) else i.x
    y = i.y.transpose(-1, -2) if bool(getattr(i, "transpose_y", False)) else i.y
    return x @ y  # type: ignore[no-any-return]


def _layer_norm(i: Any) -> Tensor:
    shape = [i.x.shape[axis] for axis in _whole(i.axes)]
    return F.layer_norm(i.x, shape, getattr(i, "gamma", None), getattr(i, "beta", None), float(i.epsilon))


def _split(i: Any) -> tuple[Tensor, ...]:
    if hasattr(i, "split_sizes"):
        return torch.split(i.x, _whole(i.split_sizes), int(i.axis))
    return torch.chunk(i.x, int(i.num_splits), int(i.axis))


def _gelu(i: Any) -> Tensor:
    assert i.mode == "EXACT", "approximations are other operators of the student"
    return F.gelu(i.x)


_OPERATORS: dict[str, Callable[[Any], Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "constexpr_blockwise_shift_scale": lambda i: i.data.float() * i.scale,
    "conv": _conv,
    "linear": lambda i: F.linear(i.x, i.weight, getattr(i, "bias", None)),
    "matmul": _matmul,
    "add": lambda i: i.x + i.y,
    "sub": lambda i: i.x - i.y,
    "mul": lambda i: i.x * i.y,
    "real_div": lambda i: i.x / i.y,
    "relu": lambda i: i.x.relu(),
    "thresholded_relu": lambda i: torch.where(i.x >= float(i.alpha), i.x, 0.0),
    "relu6": lambda i: F.relu6(i.x),
    "clip": lambda i: torch.clamp(i.x, float(i.alpha), float(i.beta)),
    "sigmoid": lambda i: i.x.sigmoid(),
    "sigmoid_hard": lambda i: torch.clamp(i.x * float(i.alpha) + float(i.beta), 0, 1),
    "silu": lambda i: F.silu(i.x),
    "tanh": lambda i: i.x.tanh(),
    "leaky_relu": lambda i: F.leaky_relu(i.x, float(i.alpha)),
    "elu": lambda i: F.elu(i.x, float(i.alpha)),
    "gelu": _gelu,
    "softmax": lambda i: i.x.softmax(int(i.axis)),
    "scaled_dot_product_attention": lambda i: F.scaled_dot_product_attention(i.query, i.key, i.value),
    "layer_norm": _layer_norm,
    "reduce_mean": lambda i: i.x.mean(_whole(i.axes), bool(i.keep_dims)),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "pad": lambda i: _on_axes(i.x, _whole(i.pad), float(i.constant_val)),
    "reshape": lambda i: i.x.reshape(_whole(i.shape)),
    "transpose": lambda i: i.x.permute(_whole(i.perm)),
    "expand_dims": lambda i: i.x.unsqueeze(*_whole(i.axes)),
    "squeeze": lambda i: i.x.squeeze(_whole(i.axes)),
    "concat": lambda i: torch.cat(i.values, int(i.axis)),
    "split": _split,
    "slice_by_index": _sliced,
    "upsample_nearest_neighbor": lambda i: F.interpolate(
        i.x, scale_factor=(float(i.scale_factor_height), float(i.scale_factor_width)), mode="nearest"
    ),
}
"""By the names of Core ML."""
