"""What a quantizer is: the contract that layers, training, schedules and export rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernel import compute_dtype, is_exporting

_NARROW = 4
"""What a narrow range adds to ``signed``, -1 to 1, in the state."""


def integer_range(bits: int, signed: bool | None) -> tuple[int, int]:
    """Smallest and largest code of a uniform grid: two's complement when signed, from zero when not."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class Quantizer(nn.Module, ABC):
    """Maps a real tensor to a grid of at most ``2**bits`` values and back.

    * ``forward(x)`` returns the quantized tensor ``x_hat`` in the shape and dtype of ``x``. Until the quantizer has
      been initialised it returns ``x`` unchanged.
    * ``codes(x)`` returns the integers, all within ``code_range()``, and ``dequantize(codes)`` the values;
      ``forward(x) == dequantize(codes(x))`` bit for bit, which is what export relies on.
    * ``bits`` and ``signed`` are plain attributes; ``set_bits`` changes the first and re-fits.
    * Parameters exist from construction, so that optimizers, checkpoints, DDP and copies see them. Their values
      come from the first batch seen in training mode, averaged over ranks; nothing is ever written in eval mode or
      under ``torch.inference_mode``.
    * ``progress`` is the part of the training that is done, 0 to 1, in a family whose estimator follows it; training
      sets it before each step. It is no part of the state: the step says it. ``None`` for all other families.
    * A NaN stays at its element: it neither reaches other elements nor the parameters at initialisation.
    * A family with groups has one grid for each ``group_size`` neighbours on the last axis, the input axis of a linear
      weight: ``channels`` then counts the groups of the whole tensor, and every method takes and returns the tensor as
      it is.
    * Parameters and buffers stay in float32 when the network goes to half precision, by whatever call: a step may be
      below what float16 can hold, and bfloat16 would move every level. Float64 and devices are followed.

    Args:
        bits: 1 to 8.
        signed: whether negative values are representable; ``None`` decides from the data at initialisation.
        channels: number of channels for one grid per channel; ``None`` for one grid per tensor.
        channel_axis: the axis of the channels in the quantized tensor.
        batched: whether axis 0 holds samples (activations), not values of one object (weights).

    Raises:
        UsageError: when ``bits`` is not an integer from 1 to 8.

    Examples:
        >>> from lqkd.quantization import LSQ
        >>> quantizer = LSQ(4, signed=True)  # any family
        >>> x = torch.randn(2, 8)
        >>> x_hat = quantizer(x)  # the first batch in training mode fits it
        >>> torch.equal(x_hat, quantizer.dequantize(quantizer.codes(x)))
        True
        >>> quantizer.code_range(), quantizer.levels().shape
        ((-8, 7), torch.Size([16]))
    """

    progress: float | None = None
    group_size: int | None = None
    """Number of neighbours on the last axis that share a grid; None where a grid is of a channel or the tensor."""
    block_size: int | None = None
    """The only group size that there is in the family's format; None where a recipe may choose."""
    initialized: Tensor
    """0-dim bool buffer: whether the parameters have been fitted to data."""
    narrow_range: bool = False
    """Whether signed codes leave the lowest out, in a family that can."""
    format: Tensor
    """(2,) int64 buffer, so that a checkpoint restores them: ``bits``, and ``signed`` (-1 while undecided) plus 4 where
    the range is narrow."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
    ) -> None:
        super().__init__()
        self.bits = self.check_bits(bits, signed)
        self.signed = signed
        self.channels = channels
        self.channel_axis = channel_axis
        self.batched = batched
        self.wants_mse = False
        self._ready = False  # a host copy of `initialized`: reading the buffer would wait for the device
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("format", self._format())

    @abstractmethod
    def _fit(self, x: Tensor) -> bool:
        """Set the parameters from ``x`` (no gradient); return False when ``x`` says nothing, e.g. is all zero."""

    def _fit_mse(self, x: Tensor) -> bool:
        """Likewise, for the least squared error on ``x``; :meth:`_fit` where that does so, or nothing can be chosen."""
        return self._fit(x)

    @abstractmethod
    def _quantize(self, x: Tensor) -> Tensor:
        """The differentiable forward of an initialised quantizer."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``: int32, shape of ``x``."""

    @abstractmethod
    def dequantize(self, codes: Tensor) -> Tensor:
        """The float32 values of integer ``codes``, in their shape."""

    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code: two's complement when signed, from zero when not."""
        return integer_range(self.bits, self.signed)

    @abstractmethod
    def levels(self) -> Tensor:
        """All representable values in ascending order: (L,) per tensor, (channels, L) per channel, float32."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._ready:
            if not self.training or torch.is_inference_mode_enabled():
                return x
            self.initialize(x)
            if not self._ready:
                # Zero times the parameters keeps them in the graph, on which DDP insists.
                for parameter in self.parameters():
                    x = x + 0.0 * parameter.sum().to(x.dtype)
                return x
        quantize = self._plainly if is_exporting() else self._quantize
        if self.group_size is None:
            return quantize(x)
        return quantize(self._grouped(x)).view(x.shape)

    def _plainly(self, x: Tensor) -> Tensor:
        """The same values by operations that :func:`torch.export.export` can write down: it knows no own gradients."""
        return self.dequantize(self.codes(x)).to(x.dtype)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Fit the parameters to ``x`` and mark the quantizer as initialised.

        Under ``torch.distributed`` every rank must call this together; all end with the same parameters. A tensor
        without a finite non-zero value leaves the quantizer uninitialised, to try again with the next one. Values
        that are not finite are left out, and so is a rank whose tensor is empty.

        Raises:
            UsageError: when the quantizer has no grid for data of this sign.
        """
        with _counted(x) as somewhere:
            if somewhere:
                self._initialize(x if x.numel() else x.new_zeros([size or 1 for size in x.shape]))

    def _initialize(self, x: Tensor) -> None:
        x = self._grouped(finite(x.detach()))
        decided = self.signed
        signed = bool(max_over_ranks(-x.min()) > 0) if decided is None else decided
        self.check_bits(self.bits, signed)
        self.signed = signed
        fitted = False
        try:
            fitted = self._fit_mse(x) if self.wants_mse else self._fit(x)
        finally:
            if not fitted:
                self.signed = decided
        if not fitted:
            return
        self._ready = True
        self.wants_mse = False
        self.initialized.fill_(True)
        self.format.copy_(self._format())

    @property
    def is_ready(self) -> bool:
        """Whether the parameters have been fitted to data, without waiting for the device."""
        return self._ready

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the number of bits; an initialised quantizer keeps the range that it clips to."""
        previous, self.bits = self.bits, self.check_bits(bits, self.signed)
        if self._ready and previous != bits:
            self._refit(previous)
        self.format.copy_(self._format())

    @torch.no_grad()
    def forget(self, mse: bool = False) -> None:
        """Go back to being uninitialised: the next batch in training mode fits the parameters anew.

        Args:
            mse: whether by the least squared error instead of the family's own rule.
        """
        self._ready = False
        self.wants_mse = mse
        self.initialized.fill_(False)

    @abstractmethod
    def _refit(self, previous_bits: int) -> None:
        """Adapt the parameters of an initialised quantizer to the new ``bits``."""

    @classmethod
    def check_bits(cls, bits: int, signed: bool | None) -> int:
        """Return ``bits``, or raise :class:`UsageError` when this family has no such grid."""
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise UsageError(f"bits={bits!r} is not possible: a quantizer takes an integer from 1 to 8")
        return bits

    def overhead_bytes(self) -> int:
        """What the quantizer's own numbers take beside the codes of a weight: 4 bytes each, or what its format has."""
        tensors = (*self._parameters.values(), *self._buffers.values())
        return sum(4 * tensor.numel() for tensor in tensors if tensor is not None and tensor.is_floating_point())

    def _format(self) -> Tensor:
        signed = -1 if self.signed is None else int(self.signed)
        return torch.tensor([self.bits, signed + _NARROW * self.narrow_range])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "format" in state_dict:
            bits, signed = (int(value) for value in state_dict[prefix + "format"])
            self.narrow_range = signed > 1
            signed -= _NARROW * self.narrow_range
            self.bits, self.signed = bits, None if signed < 0 else bool(signed)
            self._ready = bool(state_dict[prefix + "initialized"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """What ``half()``, ``to(dtype)`` and precision plugins go through: see the class docstring."""

        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not moved.is_floating_point() or moved.dtype.itemsize >= torch.float32.itemsize:
                return moved
            return tensor.to(moved.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)

        super()._apply(at_least_float32, recurse)
        return self

    def _grouped(self, x: Tensor) -> Tensor:
        """``x`` as (groups, group size), in which a group is a channel; ``x`` itself without groups."""
        return x if self.group_size is None else x.reshape(-1, self.group_size)

    def _broadcast(self, parameter: Tensor, ndim: int) -> Tensor:
        """View a (channels,) parameter so that it broadcasts over a tensor of ``ndim`` dimensions."""
        if self.channels is None:
            return parameter
        shape = [1] * ndim
        shape[self.channel_axis] = self.channels
        return parameter.view(shape)

    def _axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes of ``x`` whose elements share a grid."""
        return tuple(axis for axis in range(x.ndim) if self.channels is None or axis != self.channel_axis)

    def _per_channel(self, x: Tensor) -> Tensor:
        """``x`` as (channels, elements per channel); one row for a per-tensor quantizer."""
        if self.channels is None:
            return x.reshape(1, -1)
        return x.movedim(self.channel_axis, 0).reshape(self.channels, -1)

    def extra_repr(self) -> str:
        granularity = "per tensor" if self.channels is None else f"{self.channels} channels on axis {self.channel_axis}"
        if self.group_size is not None:
            granularity = f"{self.channels} groups of {self.group_size}"
        return f"bits={self.bits}, signed={self.signed}, {granularity}"


def finite(x: Tensor) -> Tensor:
    """``x`` in its compute dtype with zero in the place of NaN and infinity, for statistics."""
    x = x.to(compute_dtype(x))
    return torch.where(x.isfinite(), x, 0.0)


_alone = ContextVar("_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process works for itself: quantizers are fitted without the other processes of a run."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def mean_over_ranks(value: Tensor) -> Tensor:
    """``value`` averaged over the processes of a distributed run; itself when there is only one."""
    return _reduce(value, "mean")


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest ``value`` over the processes of a distributed run; itself when there is only one."""
    return _reduce(value, "max")


_with_values: ContextVar[tuple[bool, int] | None] = ContextVar("_with_values", default=None)
"""While a quantizer is fitted: whether this process has values, and how many processes have some."""


@contextmanager
def _counted(x: Tensor) -> Iterator[bool]:
    """Inside the block :func:`mean_over_ranks` leaves out processes whose ``x`` is empty; whether any has values."""
    own, count = x.numel() > 0, int(x.numel() > 0)
    if _together():
        found = torch.tensor(count, device=x.device)
        torch.distributed.all_reduce(found)
        count = int(found)
    token = _with_values.set((own, count))
    try:
        yield count > 0
    finally:
        _with_values.reset(token)


def _together() -> bool:
    """Whether there are other processes to ask."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and not _alone.get() and torch.distributed.get_world_size() > 1


def _reduce(value: Tensor, how: str) -> Tensor:
    if not _together():
        return value
    distributed = torch.distributed
    own, count = _with_values.get() or (True, distributed.get_world_size())
    value = value.clone() if own or how == "max" else torch.zeros_like(value)
    distributed.all_reduce(value, distributed.ReduceOp.MAX if how == "max" else distributed.ReduceOp.SUM)
    return value if how == "max" else value / count
