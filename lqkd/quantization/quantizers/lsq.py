"""LSQ, EWGS and powers of two: a uniform grid whose step size is learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.kernels import element_wise_scaled_quantize, learned_step_quantize, uniform_codes
from lqkd.quantization.quantizers.base import mean_over_ranks
from lqkd.quantization.quantizers.uniform import UniformQuantizer, mse_step


class LSQ(UniformQuantizer):
    """Learned step size quantization (Esser et al., arXiv 1902.08153).

    ``x_hat = round(clamp(x / s, -Q_N, Q_P)) * s`` with ``Q_N = 2**(b-1), Q_P = 2**(b-1) - 1`` for signed and
    ``Q_N = 0, Q_P = 2**b - 1`` for unsigned data (eq. 1, 2). The paper starts the step at ``2 * mean|x| / sqrt(Q_P)``;
    here that is ``initial: mean``, and the default is the step with the least squared error, which starts much closer
    to the float network (see results/README.md). The step's gradient is multiplied by ``1 / sqrt(N * Q_P)``, where N
    is the number of weights that share the step, or the number of features of one sample for activations (section
    2.2), but by no more than ``1 / Q_P**2``: then a value that clips moves the range ``s * Q_P`` as it moves the
    clipping level of PACT, by its own gradient. The paper's factor alone is ``Q_P**1.5 / sqrt(N)`` times that: nothing
    at 2 bits, 275 for a first layer of 27 weights a channel at 8, whose steps then jump over zero and to hundreds of
    times their size (see results/README.md); ``bound_gradient: false`` leaves it so. The parameter ``scale`` may cross
    zero under a large learning rate; the step is its absolute value, never below the smallest normal float.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        initial: how the step is fitted to the first batch: ``mse`` or ``mean``.
        bound_gradient: whether the step's gradient is multiplied by at most ``1 / Q_P**2``.
        signed, channels, channel_axis, batched, group_size, narrow_range: see :class:`UniformQuantizer`.

    Raises:
        UsageError: when ``initial`` is neither, ``bits`` is out of range, or 1 for signed data, whose positive side
            would be empty.

    Examples:
        >>> quantizer = LSQ(4, signed=True, channels=2)
        >>> weight = torch.tensor([[0.1, -0.8, 0.7], [1.0, -8.0, 7.0]])
        >>> quantizer.initialize(weight)
        >>> quantizer.codes(weight), quantizer.step().shape
        (tensor([[ 1, -8,  7],
                [ 1, -8,  7]], dtype=torch.int32), torch.Size([2]))
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int = 0,
        batched: bool = False,
        group_size: int | None = None,
        initial: str = "mse",
        bound_gradient: bool = True,
        narrow_range: bool = False,
    ) -> None:
        super().__init__(
            bits,
            signed=signed,
            channels=channels,
            channel_axis=channel_axis,
            batched=batched,
            group_size=group_size,
            narrow_range=narrow_range,
        )
        if initial not in ("mse", "mean"):
            raise UsageError(f"initial={initial!r} of quantizer {type(self).__name__} is not possible: use mse or mean")
        self.initial = initial
        self.bound_gradient = bound_gradient
        self.scale = nn.Parameter(torch.ones(() if channels is None else (channels,)))

    def _quantize(self, x: Tensor) -> Tensor:
        return learned_step_quantize(
            x, self.scale, constants=(self._gradient_scale(x), *self.code_range()), channel_axis=self.channel_axis
        )

    def _gradient_scale(self, x: Tensor) -> float:
        largest = self.code_range()[1]
        scale = self._paper_gradient_scale(x)
        return min(scale, 1.0 / largest**2) if self.bound_gradient else scale

    def _paper_gradient_scale(self, x: Tensor) -> float:
        samples = x.shape[0] if self.batched else 1
        elements = x.numel() / max(samples, 1) / (self.channels or 1)
        return 1.0 / math.sqrt(max(elements, 1.0) * self.code_range()[1])

    def _initial_step(self, rows: Tensor) -> Tensor:
        if self.initial == "mse":
            return mse_step(rows, *self.code_range())
        return mean_over_ranks(rows.abs().mean(1)) * 2.0 / math.sqrt(self.code_range()[1])


class LSQEWGS(LSQ):
    """LSQ with the element-wise gradient scaling of EWGS (Lee et al., arXiv 2104.00903).

    Value and step gradient are those of :class:`LSQ`. The input's gradient inside the range is
    ``g * (1 + delta * sign(g) * (x_n - x_q))``, where ``x_n`` and ``x_q`` are the input and its level in
    units of the range ``(Q_N + Q_P) * s``. ``delta = 0`` is the straight-through estimator of LSQ.

    ``delta`` is the constant 1e-3. The paper derives it every few epochs from the trace of the Hessian, which takes
    second derivatives of the whole network. That is not done here: nothing changes delta during training, and so no
    checkpoint holds it. For another constant derive a class and give its dotted path as quantizer::

        class Stronger(LSQEWGS):
            delta = 1e-2

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        initial, bound_gradient: see :class:`LSQ`.
        signed, channels, channel_axis, batched, group_size, narrow_range: see :class:`UniformQuantizer`.

    Raises:
        UsageError: as :class:`LSQ`.

    Examples:
        >>> quantizer = LSQEWGS(4, batched=True)
        >>> quantizer(torch.rand(8, 16)).shape, quantizer.delta
        (torch.Size([8, 16]), 0.001)
    """

    delta = 1e-3

    def _quantize(self, x: Tensor) -> Tensor:
        return element_wise_scaled_quantize(
            x,
            self.scale,
            constants=(self._gradient_scale(x), *self.code_range(), self.delta),
            channel_axis=self.channel_axis,
        )


class LSQPowerOfTwo(LSQ):
    """LSQ whose step is a power of two, so that an integer kernel goes from grid to grid by a shift of bits.

    ``s = 2**round(log2 |scale|)``, and the rounding passes the gradient straight through in the logarithm: ``d s / d
    log2|scale| = s ln 2``, which gives the gradient of TQT (Jain et al., "Trained Quantization Thresholds for Accurate
    and Efficient Fixed-Point Inference of Deep Neural Networks", arXiv 1903.08066, section 3.2), ``d x_hat / d
    log2|scale| = s ln 2 * (round(x/s) - x/s, or the code where x clips)``. The paper learns the logarithm of the
    range's end, with Adam; here the parameter is ``scale``, as of :class:`LSQ`, with its factor of the gradient, so
    that one optimizer serves both. It starts at the power of two with the less squared error of the two around the
    step of :class:`LSQ`. The paper rounds up; the two differ by where ``scale`` begins.

    Args:
        bits: 1 to 8 for unsigned, 2 to 8 for signed data.
        initial, bound_gradient: see :class:`LSQ`.
        signed, channels, channel_axis, batched, group_size, narrow_range: see :class:`UniformQuantizer`.

    Raises:
        UsageError: as :class:`LSQ`.

    Examples:
        >>> quantizer = LSQPowerOfTwo(4, signed=True)
        >>> quantizer.initialize(torch.tensor([0.1, -0.8, 0.7]))
        >>> quantizer.step(), quantizer.codes(torch.tensor([0.1, -0.8, 0.7]))
        (tensor(0.1250, grad_fn=<DivBackward0>), tensor([ 1, -6,  6], dtype=torch.int32))
    """

    def step(self) -> Tensor:
        magnitude = super().step()
        # Exact: the quotient of a number and its mantissa is a power of two, which every device rounds to itself.
        mantissa = torch.frexp(magnitude.detach()).mantissa  # 0.5 <= m < 1
        return magnitude / torch.where(mantissa < math.sqrt(0.5), 2 * mantissa, mantissa)

    def _quantize(self, x: Tensor) -> Tensor:
        return learned_step_quantize(
            x, self.step(), constants=(self._gradient_scale(x), *self.code_range()), channel_axis=self.channel_axis
        )

    def _initial_step(self, rows: Tensor) -> Tensor:
        return self._nearest(rows, super()._initial_step(rows))

    def _fit_mse(self, x: Tensor) -> bool:
        return self._take(lambda rows: self._nearest(rows, mse_step(rows, *self.code_range())), self._per_channel(x))

    def _nearest(self, rows: Tensor, step: Tensor) -> Tensor:
        """Of the powers of two around ``step``, (channels,), that with the less squared error."""
        below = step / (2 * torch.frexp(step).mantissa)
        errors = []
        for tried in (below, 2 * below):
            on_grid = uniform_codes(rows, tried.unsqueeze(1), *self.code_range()) * tried.unsqueeze(1)
            errors.append(mean_over_ranks((on_grid - rows).square().mean(1)))
        return torch.where(errors[0] <= errors[1], below, 2 * below)

    def _refit(self, previous_bits: int) -> None:
        self.scale.mul_(2.0 ** (previous_bits - self.bits))
