"""Running the fake-quantization functions: one pass over memory where a compiler works, the same numbers elsewhere.

A :class:`Kernel` holds the two functions of a family and runs them inside one ``autograd.Function`` that keeps only
the input and the parameters for the backward pass. Large tensors run through ``torch.compile``, which fuses each
function, the reduction of the parameters' gradients included, into one pass over memory; small ones, and everything
where no compiler works or ``LQKD_COMPILE=0`` is set, run the same functions eagerly and give the same values bit for
bit. Mathematics runs in float32 (float64 for float64 inputs) and the result returns to the input's dtype, so that an
8-bit grid stays exact under bfloat16. ``torch.jit.trace`` records the functions themselves, for inference: their
straight-through gradients are not recorded. A family may have a third form, in C++
(:mod:`lqkd.quantization.native`), which takes the place of the compiled one for float32 on a CPU: its values and
gradients of ``x`` are the same bits too, those of parameters are sums in another order.

The functions see tensors as ``x`` (elements,) with 0-dim parameters, or ``x`` (channels, elements) with parameters
(channels, 1), in the order of memory. Every number that differs between layers is a 0-dim tensor: a Python float
would compile a graph for each of its values.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import _symbolic_trace

from lqkd.quantization import native

COMPILE_FROM = 2048
"""Number of elements from which a compiled function is faster than its eager form."""
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)
"""Whether :func:`torch.export.export` is at work, from PyTorch 2.7 on."""
_is_tracing: Callable[[], bool] = getattr(
    _symbolic_trace, "is_fx_symbolic_tracing", getattr(_symbolic_trace, "is_fx_tracing", lambda: False)
)
"""Whether a symbolic trace runs layers on real values, within which nothing compiled may be called."""
MOST_GRAPHS = 128
"""Compiled forms of one function that a process may have."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` is quantized: float64 stays float64, every other floating dtype becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Kernel:
    """Forward and backward of one family.

    Attributes:
        forward: ``(x, *parameters, *constants, *tables) -> x_hat``.
        backward: ``(gradient, x, *parameters, *constants, *tables) -> (gradient of x, *gradients of parameters)``,
            the latter summed over the elements that share a parameter.
        native: both in C++, where the family has them.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]
    native: native.LearnedStep | None = None

    def __call__(
        self,
        x: Tensor,
        *parameters: Tensor,
        constants: Sequence[float] = (),
        tables: Sequence[Tensor] = (),
        channel_axis: int | None = None,
    ) -> Tensor:
        """Quantize ``x`` differentiably.

        Args:
            x: any shape, memory layout and floating dtype; the result has the same.
            *parameters: 0-dim or (channels,).
            constants: numbers that receive no gradient.
            tables: 1-D tensors that receive no gradient.
            channel_axis: the axis of ``x`` that has one parameter per index; ``None`` for 0-dim parameters.
        """
        if all(parameter.numel() == 1 for parameter in parameters):
            channel_axis = None
        if torch.jit.is_tracing():  # a recorded graph knows neither the function nor the memory it sees
            shape = [-1 if axis == channel_axis else 1 for axis in range(x.ndim)] if channel_axis is not None else []
            operands = _operands(x, parameters, constants, tables, shape)
            return self.forward(x, *operands)
        return _Quantize.apply(self, tuple(constants), tuple(tables), channel_axis, x, *parameters)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        constants: tuple[float, ...],
        tables: tuple[Tensor, ...],
        channel_axis: int | None,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, *parameters)
        ctx.kernel, ctx.constants, ctx.tables, ctx.channel_axis = kernel, constants, tables, channel_axis
        ctx.native = kernel.native if _takes(kernel.native, channel_axis, x, *parameters) else None
        ctx.set_materialize_grads(False)  # a layer may have given the step its gradient already
        return _quantized(ctx, x, *parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        if gradients[0] is None:
            return (None,) * (5 + len(parameters))
        if ctx.native is not None and torch.compiler.is_compiling():
            return None, None, None, None, *ctx.native.backward(gradients[0], x, *parameters, ctx.constants)
        if ctx.native is not None and not torch.is_grad_enabled():
            gradient = gradients[0].resolve_neg()
            if gradient.stride() != x.stride():
                gradient = torch.empty_like(x).copy_(gradient)
            return None, None, None, None, *ctx.native.backward(gradient, x, *parameters, ctx.constants)
        order = _memory_order(x, ctx.channel_axis)
        flat, gradient = (_flatten(tensor, order, ctx.channel_axis) for tensor in (x, gradients[0]))
        operands = _operands(x, parameters, ctx.constants, ctx.tables)
        if torch.is_grad_enabled():
            # The graph of the gradient is asked for: it is linear in the incoming gradient, and straight-through
            # estimators have no second derivative in anything else.
            gradient = gradients[0].permute(order).reshape(flat.shape)
            gradient_x, *gradients_p = ctx.kernel.backward(gradient, flat, *operands)
        else:
            gradient_x, *gradients_p = _run(ctx.kernel.backward, gradient, flat, *operands)
        reduced = [g.view(p.shape).to(p.dtype) for g, p in zip(gradients_p, parameters, strict=True)]
        unflatten = _view_as if torch.is_grad_enabled() else _unflatten
        return None, None, None, None, unflatten(gradient_x, x, order), *reduced


def _takes(form: native.LearnedStep | None, channel_axis: int | None, x: Tensor, *parameters: Tensor) -> bool:
    """Whether there is a form in C++, and it runs with these operands, of which it sees nothing but the memory."""
    if form is None or not (_captured(x) or (_runs_compiled(x) and torch._C._len_torch_dispatch_stack() == 0)):
        return False
    (scale,) = parameters
    if not _captured(x) and (not _is_real(scale) or x.is_neg() or scale.is_neg()):
        return False
    if x.device.type != "cpu" or scale.device.type != "cpu":
        return False
    shared = scale.numel() == 1 or (channel_axis == 0 and scale.shape == x.shape[:1])
    dense = x.is_contiguous() or (scale.numel() == 1 and x.is_contiguous(memory_format=torch.channels_last))
    single = x.dtype == torch.float32 and scale.dtype == torch.float32
    return shared and dense and single and scale.is_contiguous() and native.available()


def _captured(x: Tensor) -> bool:
    """Whether ``x`` is in a graph for ``torch.compile``, and not in one that goes where nobody knows our operations."""
    capturing = torch.compiler.is_dynamo_compiling() and not is_exporting()
    return capturing and x.numel() > 0 and _compiler.wanted()


def _quantized(call: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    if call.native is not None:
        return call.native.forward(x, *parameters, call.constants)
    order = _memory_order(x, call.channel_axis)
    flat = _flatten(x, order, call.channel_axis)
    operands = _operands(x, parameters, call.constants, call.tables)
    return _unflatten(_run(call.kernel.forward, flat, *operands), x, order)


def call_of(x_hat: Tensor) -> Any:
    """The node of the autograd graph whose result ``x_hat`` is, where that is a kernel's call that can be made again.

    That is not so where a graph is recorded, nor where something else decides what is kept for the backward pass, such
    as a checkpoint, which gives out once what it has computed once more; PyTorch tells that from 2.8 on. Nor where the
    result has been changed in place since.

    Its ``saved_tensors`` are the input and the parameters, ``needs_input_grad[-n:]`` says which of these n have a
    gradient, ``native`` is what runs it in C++, if anything does; :func:`recompute` takes it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _is_real(x_hat):
        return None
    node = x_hat.grad_fn
    if not isinstance(getattr(node, "kernel", None), Kernel) or x_hat._version > 0:
        return None
    autograd: Any = torch._C._autograd
    hooks = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    if hooks is None or not autograd._saved_tensors_hooks_is_enabled() or hooks(True) is not None:
        return None
    return node


def recompute(call: Any, operands: Sequence[Tensor]) -> Tensor:
    """The result of a call, whose ``saved_tensors`` the operands were, anew and bit for bit."""
    return _quantized(call, *operands)


def _operands(
    x: Tensor,
    parameters: Sequence[Tensor],
    constants: Sequence[float],
    tables: Sequence[Tensor],
    shape: Sequence[int] | None = None,
) -> list[Tensor]:
    """What a kernel's functions take after ``x``; parameters of ``shape``, by default for a flat ``x``."""
    dtype = compute_dtype(x)
    # A trace records the making of its constants, in the same way each time; stand-ins for tensors must not outlive it.
    constant = _constant if _is_real(x) and not torch.jit.is_tracing() else _constant.__wrapped__
    if torch.compiler.is_compiling():
        constant = _number
    if shape is None:
        shape = (-1, 1) if any(parameter.numel() != 1 for parameter in parameters) else ()
    return [
        *(parameter.detach().to(dtype).view(shape) for parameter in parameters),
        *(constant(float(value), position, dtype, x.device) for position, value in enumerate(constants)),
        *(table.detach().to(dtype) for table in tables),
    ]


def _is_real(x: Tensor) -> bool:
    """Whether ``x`` has values, and does not stand in for a tensor in a trace."""
    return type(x) in (Tensor, torch.nn.Parameter)


@functools.lru_cache(maxsize=4096)
def _constant(value: float, position: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # One tensor per position: the same tensor in two positions would be compiled as one operand.
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def _number(value: float, position: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same within a graph, where it takes no memory of its own."""
    return torch.full((), value, dtype=dtype, device=device)


def _memory_order(x: Tensor, channel_axis: int | None) -> list[int]:
    """The axes of ``x`` from the largest stride to the smallest, the channel axis first."""
    order = sorted(range(x.ndim), key=x.stride().__getitem__, reverse=True)
    if channel_axis is not None:
        order.remove(channel_axis)
        order.insert(0, channel_axis)
    return order


def _flatten(x: Tensor, order: list[int], channel_axis: int | None) -> Tensor:
    """``x`` as (elements,) or (channels, elements): the same memory where it is dense in that order, else a copy."""
    shape = (-1,) if channel_axis is None else (x.shape[channel_axis], x.numel() // max(x.shape[channel_axis], 1))
    # `.data` is no view for autograd; a graph compiled for a view would be bound to the shape of what it views.
    return x.permute(order).reshape(shape).data


def _unflatten(flat: Tensor, like: Tensor, order: list[int]) -> Tensor:
    return _view_as(flat, like, order).data  # no view either, since a network may add to the result in place


def _view_as(flat: Tensor, like: Tensor, order: list[int]) -> Tensor:
    inverse = sorted(range(like.ndim), key=order.__getitem__)
    return flat.view([like.shape[axis] for axis in order]).permute(inverse)


def _run(function: Callable[..., Any], *arguments: Tensor) -> Any:
    x = arguments[0]
    if not _compiles(x, COMPILE_FROM):
        return function(*arguments)
    try:
        return _compiled(function, x.device.type)(*arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _compiler.give_up(error)
        return function(*arguments)


def _compiles(x: Tensor, elements: int) -> bool:
    """Whether a function is compiled for ``x``, which is worth it from so many elements on."""
    return x.numel() >= elements and not _compiler.failed and _runs_compiled(x) and not _is_tracing()


def _runs_compiled(x: Tensor) -> bool:
    """Whether ``x`` may be given to something compiled."""
    return x.numel() > 0 and _compiler.wanted() and not torch.compiler.is_compiling() and _is_real(x)


@functools.cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    return own_graphs(function, MOST_GRAPHS, dynamic=True, fullgraph=True, options=compiler_options(device))


def compiler_options(device: str) -> dict[str, Any]:
    """What the compiler must not leave out, so that quantized values are those of the eager functions."""
    # Triton's default division is off by an ulp, which moves values across rounding boundaries.
    if device == "cpu":
        return {}
    from torch._inductor import config  # not before something is compiled: it takes a second

    known = hasattr(getattr(config, "eager_numerics", None), "division_rounding")  # not in older versions
    return {"eager_numerics.division_rounding": True} if known else {}


def own_graphs(function: Callable[..., Any], most: int, **arguments: Any) -> Callable[..., Any]:
    """``torch.compile(function, **arguments)``, with at most ``most`` graphs, which nothing else counts among its own.

    PyTorch's own limit is 8 for the code of a function: a quantizer sees more combinations of dtype, rank, single
    channels and inference mode in a long process, and several networks that are called by the same code share it.
    Versions of PyTorch that cannot be told so keep their limit.
    """
    compile: Any = torch.compile
    known = inspect.signature(compile).parameters
    further = {"recompile_limit": most, "isolate_recompiles": True}
    compiled: Callable[..., Any] = compile(function, **arguments, **{k: v for k, v in further.items() if k in known})
    return compiled


class _Compiler:
    """Whether ``torch.compile`` is wanted and has not failed in this process."""

    def __init__(self) -> None:
        self.failed = False

    @staticmethod
    def wanted() -> bool:
        return os.environ.get("LQKD_COMPILE", "1") != "0"

    def give_up(self, error: Exception) -> None:
        self.failed = True
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"quantizers run without torch.compile in this process, with the same results but slower: {reason}. "
            "Set LQKD_COMPILE=0 to say so from the start.",
            stacklevel=2,
        )


_compiler = _Compiler()
