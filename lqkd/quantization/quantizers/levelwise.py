"""LSQ for the input of a layer that is called several times in a pass, as a head is for each level of a pyramid."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import learned_step_quantize
from lqkd.quantization.quantizers.base import finite, max_over_ranks, mean_over_ranks
from lqkd.quantization.quantizers.lsq import LSQ
from lqkd.quantization.quantizers.uniform import mse_step


def begin_pass(network: nn.Module, inputs: Any) -> None:
    """Let the next call of every :class:`LevelwiseStep` in ``network`` be the first of a pass; a forward pre-hook.

    A pass that was broken off, as where memory ran out, would otherwise move the levels of all that follow.

    Args:
        network: of which a pass begins.
        inputs: of the pass, which are left alone.
    """
    for module in network.modules():
        if isinstance(module, LevelwiseStep):
            module._next = 0


class LevelwiseStep(LSQ):
    """:class:`LSQ` with a step for each of the calls of a pass, or with one for all whose gradient counts them all.

    Call k of a pass, counted from 0, takes step k. A pass makes ``calls`` calls, always in the same order: the first
    call after the last one begins the next pass, and so does one after a change between training and evaluation, or
    after :func:`begin_pass`, which :func:`lqkd.quantization.quantize_model` hooks before the network's forward. The
    gradient of each step is multiplied by LSQ's factor (see there) of the N features of a sample that its call has; the
    one step of ``shared`` gets a gradient from every call, and N counts the features of all of them, as its first pass
    has had them. Chen et al., "AQD: Towards Accurate Fully-Quantized Object Detection" (arXiv 2007.06919), quantise
    heads level by level.

    All calls have the same bits and are signed or not together. The steps are fitted to the first pass, each to its own
    call; where a call has zeros only, its step is that of the call before it that has more. The one step of ``shared``
    is fitted to the values of all calls of the first pass so far, and at its end to those of the whole pass.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        calls: of a pass, at least 2.
        shared: whether one step serves all calls.
        signed, initial, bound_gradient, narrow_range: see :class:`LSQ`.

    Raises:
        UsageError: as :class:`LSQ`, or when ``calls`` is less than 2.

    Examples:
        >>> quantizer = LevelwiseStep(4, calls=2)
        >>> finer, coarser = torch.linspace(0, 1, 60).view(1, 60), torch.linspace(0, 8, 15).view(1, 15)
        >>> _ = quantizer(finer), quantizer(coarser)  # the first pass fits both
        >>> quantizer.step().detach()
        tensor([0.0667, 0.5333])
        >>> [torch.equal(quantizer(x), quantizer.at(call)(x)) for call, x in enumerate((finer, coarser))]
        [True, True]
    """

    features: Tensor
    """(calls,) int64 buffer: of a sample, as the first pass has had them."""

    def __init__(
        self,
        bits: int,
        *,
        calls: int,
        shared: bool = False,
        signed: bool | None = None,
        initial: str = "mse",
        bound_gradient: bool = True,
        narrow_range: bool = False,
    ) -> None:
        if calls < 2:
            raise UsageError(f"calls={calls} of LevelwiseStep is not possible: a layer that is called once needs LSQ")
        super().__init__(
            bits,
            signed=signed,
            batched=True,
            initial=initial,
            bound_gradient=bound_gradient,
            narrow_range=narrow_range,
        )
        self.calls, self.shared = calls, shared
        if not shared:
            self.scale = nn.Parameter(torch.ones(calls))
        self.register_buffer("features", torch.zeros(calls, dtype=torch.int64))
        self._of_calls = [0] * calls  # host copies of it, which are there before the first pass ends
        self._fitted: set[int] = set()
        self._seen: list[Tensor] = []  # by the one step, in the first pass
        self._given_sign = signed
        self._next = 0

    def forward(self, x: Tensor) -> Tensor:
        call, self._next = self._next, (self._next + 1) % self.calls
        if not self._ready:
            if not self.training or torch.is_inference_mode_enabled():
                return x
            self._fit_call(call, x)
            if not self._fitted:
                return x + 0.0 * self.scale.sum().to(x.dtype)  # in the graph, on which DDP insists
        constants = (self._gradient_scale_of(call), *self.code_range())
        return learned_step_quantize(x, self._scale_of(call), constants=constants, channel_axis=self.channel_axis)

    def at(self, call: int) -> LSQ:
        """The quantizer of one call by itself, with its step."""
        alone = LSQ(
            self.bits,
            signed=self.signed,
            batched=True,
            initial=self.initial,
            bound_gradient=self.bound_gradient,
            narrow_range=self.narrow_range,
        ).train(self.training)
        alone.scale = nn.Parameter(self._scale_of(call).detach().clone())
        alone._ready = self._ready
        for name in ("initialized", "format"):
            alone._buffers[name] = self._buffers[name].clone()  # type: ignore[union-attr]
        return alone

    def codes(self, x: Tensor) -> Tensor:
        """Those of one step for all calls.

        Raises:
            UsageError: where each call has a step of its own.
        """
        return super().codes(x) if self.shared else self._no_codes()

    def dequantize(self, codes: Tensor) -> Tensor:
        """Likewise."""
        return super().dequantize(codes) if self.shared else self._no_codes()

    def _no_codes(self) -> Any:
        raise UsageError(f"a LevelwiseStep has a step for each of its {self.calls} calls: at(call) gives that of one")

    def _scale_of(self, call: int) -> Tensor:
        return self.scale if self.shared else self.scale[call]

    def _gradient_scale_of(self, call: int) -> float:
        features = sum(self._of_calls) if self.shared else self._of_calls[call]
        largest = self.code_range()[1]
        scale = 1.0 / math.sqrt(max(features, 1) * largest)
        return min(scale, 1.0 / largest**2) if self.bound_gradient else scale

    @torch.no_grad()
    def _fit_call(self, call: int, x: Tensor) -> None:
        """Fit the step of a call of the first pass; its last one ends the fitting where there was anything to fit."""
        features = torch.tensor(x.numel() // max(len(x), 1), device=x.device)
        self._of_calls[call] = int(max_over_ranks(features))
        if self.shared and call == 0:
            self._seen = []
        if self._of_calls[call] > 0:  # on one process at least, and all of them fit together
            values = finite(x.detach()).flatten()
            self._decide_sign(bool(max_over_ranks(-values.min() if len(values) else values.new_zeros(())) > 0))
            if self.shared:
                self._seen.append(values)
                values = torch.cat(self._seen)
            self._fit_step(call, values)
        if call == self.calls - 1 and self._fitted:
            self._seen = []
            self.features.copy_(torch.tensor(self._of_calls))
            self._ready, self.wants_mse = True, False
            self.initialized.fill_(True)
            self.format.copy_(self._format())

    def _decide_sign(self, negative: bool) -> None:
        if self._given_sign is not None or (self._fitted and (self.signed or not negative)):
            return
        before = self.code_range()[1]
        self.check_bits(self.bits, negative)
        self.signed = negative
        if self._fitted:  # calls before this one had no negative values
            self.scale.mul_(before / self.code_range()[1])

    def _fit_step(self, call: int, values: Tensor) -> None:
        share = mean_over_ranks(values.new_tensor(float(len(values) > 0)))  # of the processes that have values
        rows = values.reshape(1, -1) if len(values) else values.new_zeros(1, 1)  # which count in no largest value
        # Of the search for the least squared error all errors shrink alike, and of a mean it has to be undone.
        by_search = self.wants_mse or self.initial == "mse"
        step = mse_step(rows, *self.code_range()) if by_search else self._initial_step(rows) / share
        usable = bool(step.isfinite()) and bool(step > 0) and bool(max_over_ranks(rows.abs().max()) > 0)
        if usable:
            self._fitted.add(call)
            if self.shared:
                self.scale.copy_(step.squeeze(0))
            else:
                first = len(self._fitted) == 1
                self.scale[0 if first else call :] = step.squeeze(0)  # until later calls say more

    @torch.no_grad()
    def forget(self, mse: bool = False) -> None:
        super().forget(mse)
        self._fitted, self._seen, self._next = set(), [], 0

    def train(self, mode: bool = True) -> LevelwiseStep:
        """A change between training and evaluation ends a pass that was broken off."""
        self._next = 0
        super().train(mode)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if prefix + "features" in state_dict:
            self._of_calls = state_dict[prefix + "features"].tolist()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'one step' if self.shared else 'a step each'} for {self.calls} calls"
