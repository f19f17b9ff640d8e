"""Every combination of loss, regularizer, guard and player that is accepted trains; every other says why it is not.

Guards and players see no more of a loss than the kind of its map: all of them are combined with the first loss of every
kind, and take turns with the others. Balances take turns over the combinations, and each is combined with each loss
besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lqkd import balances as all_balances
from lqkd import losses as all_losses
from lqkd import regularizers as all_regularizers
from lqkd.balances import Balance
from lqkd.errors import UsageError
from lqkd.losses import DistillationLoss, QuantizedFeatures
from lqkd.models.calls import Inputs
from lqkd.modules import DistillModule, Tap
from lqkd.modules.optimizers import regularizer_groups, student_groups
from lqkd.quantization import Recipe, initialize_quantizers
from lqkd.regularizers import GUARDS, PLAYERS, Regularizer
from lqkd.teachers import FrozenTeacher


def concrete(package: Any, base: type[nn.Module]) -> dict[str, type[Any]]:
    """Every class that ``package`` offers below ``base``."""
    found = {name: getattr(package, name) for name in package.__all__}
    return {n: k for n, k in found.items() if isinstance(k, type) and issubclass(k, base) and k is not base}


LOSSES = concrete(all_losses, DistillationLoss)
# Of what no classifier has, see test_language.py and test_detection_terms.py.
for elsewhere in ("AttentionRelations", "CrossKD", "ForegroundWeighted"):
    del LOSSES[elsewhere]
REGULARIZERS = concrete(all_regularizers, Regularizer)
# Of held-out rows, which no run here has: see test_held_out.py, test_held_out_features.py and test_published.py.
LEARNER, EXPLAINED, META = (
    REGULARIZERS.pop(name) for name in ("HeldOutInterpolation", "ExplainedVariance", "MetaWeightNet")
)
BALANCES = concrete(all_balances, Balance)
FIRST = {(kind.compares, kind.kind): name for name, kind in reversed(LOSSES.items())}.values()
"""The first loss of those that compare the same and have the same kind of map."""


class Tiny(nn.Module):
    """The least network with two taps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images[:8], dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(digits.target[:8])


def build(loss: str, regularizer: Regularizer | None, balance: str) -> DistillModule:
    torch.manual_seed(0)
    kind = LOSSES[loss]
    made = QuantizedFeatures("second.input_quantizer") if kind is QuantizedFeatures else kind()
    return DistillModule(
        FrozenTeacher(Tiny(4)),
        Tiny(4),
        quantization=Recipe(bits="w4a4"),
        distillation_loss=made,
        taps=None if made.compares == "logits" else [Tap("first", "first"), Tap("second", "second")],
        regularizer=regularizer,
        balance=BALANCES[balance](),
    )


def train(module: DistillModule, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """The losses of so many steps, as DistillModule takes them, without a Trainer around."""
    module._connect(torch.zeros(1, 1, 8, 8))
    module._settle_balance(Inputs((torch.zeros(1, 1, 8, 8),)))
    initialize_quantizers(module.student, images)
    module.train()
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(student_groups(module.student, module.distillation.losses), lr=0.01, momentum=0.9)
    ]
    groups = regularizer_groups(module.distillation, module.balance)
    if groups:
        optimizers.append(torch.optim.Adam(groups, lr=0.001))
    seen = []
    for step in range(steps):
        for follower in (*module.distillation.modules(), module.balance):
            if getattr(follower, "progress", None) is not None:
                follower.progress = step / (steps - 1)
        found = module.losses((images, labels))
        found.loss.backward()
        seen.append(float(found.loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return seen


def regularizers(loss: str) -> Iterator[tuple[str, Callable[[], Regularizer | None]]]:
    """Every regularizer with every guard and player that go together, or with some of them, and none."""
    tried = itertools.cycle(range(7) if loss not in FIRST else [0])
    yield "none", lambda: None
    yield "explained", EXPLAINED
    yield "meta", META
    for (name, kind), guard, player in itertools.product(REGULARIZERS.items(), GUARDS, PLAYERS):
        if PLAYERS[player].maximises and not GUARDS[guard].limits_above:
            with pytest.raises(UsageError, match=f"guard {GUARDS[guard].__name__} does not go with player"):
                kind(guard=guard, player=player)
            continue
        if next(tried):
            continue
        yield f"{name}, {guard}, {player}", lambda k=kind, g=guard, p=player: k(guard=g, player=p)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_combination_trains_or_says_why_not(loss: str, batch: tuple[Tensor, Tensor]) -> None:
    turns = itertools.cycle(BALANCES)
    accepted, trained, refused = 0, set(), []
    for name, make in regularizers(loss):
        for balance in BALANCES if name == "none" else [next(turns)]:
            try:
                module = build(loss, make(), balance)
            except UsageError as error:
                refused.append(str(error))
                continue
            seen = train(module, *batch, steps=6)  # from the first to the end of every ramp
            assert torch.tensor(seen).isfinite().all(), (name, balance, seen)
            assert all(parameter.isfinite().all() for parameter in module.parameters()), (name, balance)
            accepted += 1
            trained.add(balance)
    with pytest.raises(UsageError, match="HeldOutInterpolation is not possible with combination='mean'"):
        build(loss, LEARNER(), "FixedBalance")
    assert accepted >= len(BALANCES) - 3  # features do not go with the three balances that look at logits
    assert {"GradNorm", "GradientBalance"} <= trained
    for message in refused:
        assert "\n" not in message
        assert any(reason in message for reason in ("cannot weigh", "cannot look ahead", "at the logits")), message
