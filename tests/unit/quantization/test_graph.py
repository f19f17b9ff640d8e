"""A symbolic trace leaves the network that it reads as it was."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lqkd.quantization import Recipe, quantize_model
from lqkd.quantization.graph import trace


class Assigning(nn.Module):
    """Keeps what it saw: in itself, in a layer, in an activation within a container, and in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = weight_norm(nn.Conv2d(1, 4, 3))
        self.activations = nn.ModuleList([nn.ReLU()])
        self.own = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activations[0](self.layer(x))
        for module in (self, self.layer, self.activations[0], self.own, self.own[0]):
            module.seen = x
        self.own[0].register_buffer("kept", None)
        return self.own(x)


def test_a_forward_that_assigns_leaves_no_trace_in_the_network() -> None:
    network, _ = quantize_model(Assigning(), Recipe(bits="w4a4"))
    hooked = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    before = {name: dict(module.__dict__) for name, module in network.named_modules()}
    held = {name: {k: dict(v) for k, v in kept.items() if isinstance(v, dict)} for name, kept in before.items()}
    graph = trace(network)
    assert [node.target for node in graph.nodes if node.op == "call_module"][:2] == ["layer", "activations.0"]
    assert hooked.training
    for name, module in network.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        assert module.training, name
        assert all(dict(module.__dict__[k]) == v for k, v in held[name].items()), name
