"""What the frozen teacher's own rest makes of the student's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import StitchedKL
from lqkd.losses.rest import Rest
from lqkd.models import CifarResNet

IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(seed: int = 0) -> CifarResNet:
    torch.manual_seed(seed)
    made = CifarResNet(depth=8, width=4).double()
    made(IMAGES)  # for the statistics of its batch norms
    return made.eval().requires_grad_(False)


def said_with(teacher: nn.Module, tap: str, features: Tensor) -> Tensor:
    """What the whole network says when a hook puts ``features`` in the place of what ``tap`` gives."""
    handle = teacher.get_submodule(tap).register_forward_hook(lambda *_: features)
    try:
        return teacher(IMAGES)
    finally:
        handle.remove()


def features_of(teacher: nn.Module, tap: str) -> Tensor:
    found: list[Tensor] = []
    handle = teacher.get_submodule(tap).register_forward_hook(lambda _m, _i, output: found.append(output))
    teacher(IMAGES)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("tap", ["bn1", "layer2", "layer3"])
def test_the_rest_says_what_the_whole_network_says_with_other_features_in_it(tap: str) -> None:
    teacher = network()
    others = torch.randn_like(features_of(teacher, tap))
    torch.testing.assert_close(Rest(teacher, tap, "StitchedKL")(others), said_with(teacher, tap, others))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_map_is_the_divergence_of_both_answers_in_float64(temperature: float) -> None:
    teacher, loss = network(), StitchedKL(temperature)
    loss.bind_teacher(teacher, "layer2")
    mine = features_of(network(1), "layer2")
    known, said = (said_with(teacher, "layer2", each).numpy() for each in (features_of(teacher, "layer2"), mine))

    def probabilities(logits: np.ndarray) -> np.ndarray:
        raised = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    p, q = probabilities(known), probabilities(said)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1)
    found = loss(features_of(teacher, "layer2"), mine)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert float(loss.reduce(found)) == pytest.approx(expected.mean(), rel=1e-9)


def test_every_pixel_of_an_answer_in_maps_counts_alike() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).double().eval()
    loss, mine = StitchedKL(), torch.randn(6, 4, 14, 14, dtype=torch.float64)
    loss.bind_teacher(teacher, "0")
    known, said = teacher(IMAGES).log_softmax(1), said_with(teacher, "0", mine).log_softmax(1)
    expected = (known.exp() * (known - said)).sum(1).mean((1, 2))
    torch.testing.assert_close(loss(teacher[0](IMAGES), mine), expected)


def test_the_students_features_get_a_gradient_and_the_loss_keeps_no_weight_of_the_teacher() -> None:
    teacher, loss = network(), StitchedKL()
    loss.bind_teacher(teacher, "layer3")
    mine = features_of(network(1), "layer3").detach().requires_grad_()
    loss.reduce(loss(features_of(teacher, "layer3").detach(), mine)).backward()
    assert mine.grad is not None
    assert mine.grad.abs().sum() > 0
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_a_rest_that_works_in_place_leaves_the_features_as_they_are() -> None:
    teacher, loss = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval(), StitchedKL()
    loss.bind_teacher(teacher, "0")
    of_teacher, mine = torch.randn(2, 8), torch.randn(2, 8)
    before = of_teacher.clone(), mine.clone()
    loss(of_teacher, mine)
    assert torch.equal(of_teacher, before[0])
    assert torch.equal(mine, before[1])


def test_features_that_a_cache_kept_in_sixteen_bits_are_what_the_rest_takes() -> None:
    teacher, loss = network().float(), StitchedKL()
    loss.bind_teacher(teacher, "layer2")
    mine = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    others = torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(others.half(), mine), loss(others.half().float(), mine))


class Shifted(nn.Module):
    """One that reads a buffer of its own, which ``to`` replaces."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.shift


def test_the_rest_follows_the_network_to_another_place() -> None:
    teacher = Shifted().eval()
    rest = Rest(teacher, "first", "StitchedKL")
    teacher.double()
    teacher.shift *= 3
    assert rest(torch.ones(2, 3, dtype=torch.float64)).tolist() == [[3.0, 3.0, 3.0]] * 2


class Around(nn.Module):
    """A skip connection around one layer; one that is called twice; one that nothing comes of; a choice by values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.twice, self.vain, self.head = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.vain(x)
        x = x + self.inner(x)
        return self.head(self.twice(self.twice(x)))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x) if x.sum() > 0 else self.head(-x)


@pytest.mark.parametrize(
    ("teacher", "tap", "told"),
    [
        (Around(), "inner", r"behind 'inner' Around goes on with more than what it gives \(first\): choose another"),
        (Around(), "twice", "Around calls 'twice' 2 times: choose another tap"),
        (Around(), "vain", "behind 'vain' Around makes nothing of what it gives"),
        (network(), "layer1.0.conv2", "behind 'layer1.0.conv2' CifarResNet goes on with more than what it gives"),
        (Choosing(), "first", r"Choosing cannot be traced \(.*\): take Hints"),
    ],
)
def test_a_tap_that_not_everything_flows_through_is_refused(teacher: nn.Module, tap: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        StitchedKL().bind_teacher(teacher.eval(), tap)


def test_it_asks_for_a_teacher() -> None:
    with pytest.raises(UsageError, match="call bind_teacher with the teacher's network first"):
        StitchedKL()(torch.ones(2, 3), torch.ones(2, 3))
