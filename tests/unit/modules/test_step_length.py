"""Gradients of single losses, against float64 computed loss by loss."""

from __future__ import annotations

import torch
from torch import nn

from lqkd.modules.step_length import TOTAL, gradient_norms


def test_norms_are_those_of_weighed_gradients_and_of_their_sum() -> None:
    """Of a loss without a weight as it is, and of one that reaches only some of the parameters."""
    torch.manual_seed(0)
    network, images = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(8, 4)
    hidden = network[1](network[0](images))
    outputs = network[2](hidden)
    losses = {"task": outputs.square().mean(), "features": hidden.abs().mean(), "penalty": network[2].weight.norm()}
    weights = {"task": torch.tensor(0.5), "features": torch.tensor(7.0)}
    parameters = [*network.parameters()]
    found = gradient_norms(losses, weights, parameters)

    exact, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), images.double()
    exact.load_state_dict(network.state_dict())
    inner = exact[1](exact[0](x))
    expected = {}
    for name, loss in (
        ("task", 0.5 * exact[2](inner).square().mean()),
        ("features", 7.0 * inner.abs().mean()),
        ("penalty", exact[2].weight.norm()),
    ):
        exact.zero_grad()
        loss.backward(retain_graph=True)
        expected[name] = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in exact.parameters()]
        )
    expected[TOTAL] = torch.stack([*expected.values()]).sum(0)
    assert [*found] == ["task", "features", "penalty", TOTAL]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient.norm(), rtol=1e-5, atol=0.0)
