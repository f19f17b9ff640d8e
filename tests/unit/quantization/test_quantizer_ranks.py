"""Every quantizer starts with the same parameters on all ranks, whatever each of them sees."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import QUANTIZERS
from tests.forked import Forks


def _fit_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    states = {}
    for seen in ("different", "zero on one rank", "empty on one rank"):
        x = torch.randn(4, 90, generator=torch.Generator().manual_seed(rank)).abs() * (1 + 9 * rank)
        if seen == "zero on one rank" and rank == 0:
            x = torch.zeros(4, 90)
        if seen == "empty on one rank" and rank == 0:
            x = x[:0]
        for name, family in QUANTIZERS.items():
            for bits in (1, 2, 4):
                try:
                    quantizer = family(bits, batched=True)
                except UsageError:
                    continue
                quantizer(x)
                states[f"{name} {bits} {seen}"] = copy.deepcopy(quantizer.state_dict())
                quantizer.forget(mse=True)
                quantizer(x)
                states[f"{name} {bits} {seen} by squared error"] = quantizer.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_end_with_the_same_parameters(lqkd: Forks, tmp_path: Path) -> None:
    lqkd.run_function(_fit_on_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert len(first) > 20
    for name, state in first.items():
        assert state["initialized"], name
        assert all(torch.equal(value, second[name][key]) for key, value in state.items()), name


@pytest.mark.slow
def test_a_rank_without_values_changes_nothing_for_the_others(lqkd: Forks, tmp_path: Path) -> None:
    lqkd.run_function(_fit_on_rank, str(tmp_path))
    states = torch.load(tmp_path / "1.pt")
    x = torch.randn(4, 90, generator=torch.Generator().manual_seed(1)).abs() * 10
    for name, family in QUANTIZERS.items():
        for bits in (2, 4):
            if (state := states.get(f"{name} {bits} empty on one rank")) is not None:
                alone = family(bits, batched=True)
                alone(x)
                assert all(torch.equal(value, state[key]) for key, value in alone.state_dict().items()), name
