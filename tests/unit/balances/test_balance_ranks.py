"""Two processes that share a batch do what one process does with the whole of it, for every balance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lqkd.balances import (
    Balance,
    BoundedUncertaintyBalance,
    DynamicWeightAverage,
    FixedBalance,
    GradientBalance,
    GradNorm,
    ImpartialBalance,
    LearnableRatioBalance,
    OutputGradientBalance,
    OutputGradNorm,
    RandomBalance,
    ScheduledBalance,
    UncertaintyBalance,
)
from lqkd.balances.equalized_at import AtWeights
from tests.forked import Forks

STEPS, BATCH = 9, 8


def balances() -> dict[str, Balance]:
    kinds = (
        BoundedUncertaintyBalance,
        DynamicWeightAverage,
        FixedBalance,
        GradNorm,
        GradientBalance,
        ImpartialBalance,
        LearnableRatioBalance,
        OutputGradNorm,
        OutputGradientBalance,
        RandomBalance,
        ScheduledBalance,
        UncertaintyBalance,
    )
    return {kind.__name__: kind() for kind in kinds} | {
        f"{kind.__name__}, led": kind(teacher_share=0.8, hold=0.3, release=0.7) for kind in kinds
    }


class _Distillation(nn.Module):
    """A linear student on its way to a teacher, and a balance."""

    def __init__(self, balance: Balance) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 4))
        with torch.no_grad():
            self.student[0].weight.copy_(torch.linspace(-1, 1, 24).view(4, 6))
            self.student[0].bias.zero_()
        self.balance = balance
        if isinstance(balance.equalized_at, AtWeights):
            balance.equalized_at.bind(self.student)
            balance.equalized_at.layer = "0"

    def forward(self, images: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.student(images)
        losses = {"task": F.cross_entropy(output, labels), "distill": (teacher - output).square().mean()}
        return self.balance(losses, output)


def train(balance: Balance, rank: int, processes: int) -> dict[str, Any]:
    """Weights at every step and the state at the end, of this process's part of the batches."""
    generator = torch.Generator().manual_seed(0)
    module: nn.Module = _Distillation(balance)
    wrapped = DistributedDataParallel(module) if processes > 1 else module
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.05)
    own = torch.optim.Adam(balance.parameters(), lr=0.05) if list(balance.parameters()) else None
    history, gradients = [], []
    for step in range(STEPS):
        images = torch.randn(BATCH, 6, generator=generator)
        # The second half of the batch has other losses than the first.
        teacher = torch.randn(BATCH, 4, generator=generator) * torch.linspace(1, 6, BATCH)[:, None]
        labels = torch.randint(4, (BATCH,), generator=generator)
        share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
        if balance.progress is not None:
            balance.progress = step / STEPS
        total, weights = wrapped(images[share], teacher[share], labels[share])
        total.backward()
        gradients += [p.grad.clone() for p in balance.parameters()]
        for stepped in (optimizer, own):
            if stepped is not None:
                stepped.step()
                stepped.zero_grad()
        if step % 3 == 2:
            balance.on_epoch_end()
        history.append(torch.stack([*weights.values()]))
    return {"history": torch.stack(history), "gradients": gradients, "state": module.state_dict()}


def _train_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({name: train(balance, rank, 2) for name, balance in balances().items()}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_global_batch(lqkd: Forks, tmp_path: Path) -> None:
    lqkd.run_function(_train_on_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, balance in balances().items():
        one = train(balance, 0, 1)
        for found in (first[name], second[name]):
            torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        for mine, other in zip(first[name]["gradients"], second[name]["gradients"], strict=True):
            assert torch.equal(mine, other), name
        assert all(torch.equal(v, second[name]["state"][k]) for k, v in first[name]["state"].items()), name
