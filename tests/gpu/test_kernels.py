"""Quantizers on a GPU: the codes of the CPU, and compiled what they are eagerly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lqkd.quantization import LSQ, kernel
from tests.gpu.conftest import DEVICE

pytestmark = pytest.mark.gpu


def step(quantizer: LSQ, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized values, gradient of the input and of the step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    quantizer.scale.grad = None
    x_hat = quantizer(x)
    x_hat.backward(x.detach().cos())
    return x_hat.detach(), x.grad, quantizer.scale.grad


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_the_cpu(bits: int) -> None:
    x = torch.randn(64, 33, 7, 7)
    quantizer = LSQ(bits, signed=True, channels=64)
    quantizer.initialize(x)
    here = quantizer.codes(x)
    assert torch.equal(quantizer.to(DEVICE).codes(x.to(DEVICE)).cpu(), here)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_kernels_give_the_bits_of_eager_ones(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x = torch.randn(16, 32, 31, 33, device=DEVICE).to(dtype)
    quantizer = LSQ(4, signed=True).to(DEVICE)
    quantizer.initialize(x)
    compiled = step(quantizer, x)
    assert not kernel._compiler.failed
    monkeypatch.setenv("LQKD_COMPILE", "0")
    eager = step(quantizer, x)
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])
    torch.testing.assert_close(compiled[2], eager[2], rtol=1e-4, atol=1e-5)  # a sum, in another order
