"""A trace that knows sizes follows forwards that decide by them, and leaves the batch open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from lqkd.export.sized_trace import sized_trace
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, kernel, quantize_model


class Decides(nn.Module):
    """Pads to even sides, walks over channels, makes a mask, and folds positions into the batch and back."""

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        count, _, height, width = x.shape
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, width % 2, 0, height % 2))
        if mask is not None:
            x = x * mask
        total = sum(channel * k for k, channel in enumerate(x.unbind(1)))
        cells = total.reshape(count * x.shape[2], x.shape[3]) * torch.ones(x.shape[3], dtype=x.dtype, device=x.device)
        assert len(cells.shape) == cells.ndim == cells.dim() == 2
        return cells.view(x.size(0), -1) * scale


@pytest.mark.parametrize("side", [4, 5])
def test_a_forward_that_decides_by_sizes_is_followed_for_any_number_of_samples(side: int) -> None:
    network = Decides().eval()
    graph = sized_trace(network, ["x"], Inputs.of(torch.randn(1, 3, side, side)))
    traced = fx.GraphModule(network, graph)
    assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["x"]
    for count in (1, 2, 5):
        x = torch.randn(count, 3, side, side)
        torch.testing.assert_close(traced(x), network(x), rtol=0, atol=0)


class DecidesByValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class DecidesByTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 2 else -x


class DecidesByOneOrMore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 1 else 3 * x


@pytest.mark.parametrize("network", [DecidesByValues(), DecidesByTheBatch(), DecidesByOneOrMore()])
def test_values_and_the_number_of_samples_decide_nothing(network: nn.Module) -> None:
    with pytest.raises(fx.proxy.TraceError, match="control flow"):
        sized_trace(network, ["x"], Inputs.of(torch.ones(4, 3)))


@pytest.mark.usefixtures("compiled_kernels")
def test_the_quantizers_that_it_runs_are_compiled_in_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled function runs within a trace, and bfloat16 has no form in C++ to run in its place."""
    monkeypatch.setattr(kernel, "_compiler", kernel._Compiler())
    network, _ = quantize_model(nn.Sequential(nn.Conv2d(3, 4, 1)), Recipe())
    images = torch.randn(2, 3, 32, 32)
    initialize_quantizers(network, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sized_trace(network.eval(), ["input"], Inputs.of(images.bfloat16()))
    assert not kernel._compiler.failed
