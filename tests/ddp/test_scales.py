"""Quantizers under DistributedDataParallel: one set of parameters on all ranks, whatever each of them sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lqkd.quantization import Recipe, quantize_model, quantizers
from lqkd.quantization.quantizers import LevelwiseStep
from tests.forked import Forks

RECIPES = {
    "lsq": Recipe(bits="w4a4"),
    "lsq_plus": Recipe(bits="w4a4", activation_quantizer="lsq_plus"),
    "n2uq and apot": Recipe(bits="w3a3", weight_quantizer="apot", activation_quantizer="n2uq"),
    "binary": Recipe(bits="w1a1"),
    "ternary": Recipe(bits="ternary"),
    "ttq": Recipe(bits="w2a4", weight_quantizer="ttq"),
}
DEAD_STEPS = 2


class Network(nn.Module):
    """Two branches, the second of which is fed with zeros when it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, on: float) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x)) + self.second(x * on)))


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen: dict[str, list[dict[str, Any]]] = {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        recipe.first_layer_bits = recipe.last_layer_bits = None
        model, _ = quantize_model(Network(), recipe)
        parallel = DistributedDataParallel(model)  # find_unused_parameters is false
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
        generator = torch.Generator().manual_seed(rank)
        seen[name] = []
        for step in range(9):
            if step == 5 and name in ("lsq", "lsq_plus"):
                for quantizer in quantizers(model).values():
                    quantizer.set_bits(2)
            if step == 7:
                for quantizer in quantizers(model).values():
                    quantizer.forget()
            x = (rank + 1) * torch.randn(16, 6, generator=generator)
            loss = F.cross_entropy(parallel(x, float(step >= DEAD_STEPS)), torch.arange(16) % 3)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            state = {key: value.clone() for key, value in model.state_dict().items() if "norm" not in key}
            seen[name].append(state | {"loss": loss.detach(), "input": x})
    torch.save(seen, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(lqkd: Forks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Tensor]]]]:
    folder = tmp_path_factory.mktemp("ranks")
    lqkd.run_function(_train, str(folder))
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_ends_with_the_same_quantizers_and_weights_on_all_ranks(ranks: Any, name: str) -> None:
    for step, (first, second) in enumerate(zip(ranks[0][name], ranks[1][name], strict=True)):
        assert second["input"].std() > 1.4 * first["input"].std()
        assert first["loss"].isfinite()
        for key in first.keys() - {"loss", "input"}:
            assert torch.equal(first[key], second[key]), (step, key)


@pytest.mark.parametrize("name", RECIPES)
def test_a_layer_that_sees_only_zeros_at_first_trains_without_unused_parameters(ranks: Any, name: str) -> None:
    states = ranks[0][name]
    fitted = [bool(state["second.input_quantizer.initialized"]) for state in states]
    assert fitted == [False] * DEAD_STEPS + [True] * (len(states) - DEAD_STEPS)
    assert all(state["second.weight_quantizer.initialized"] for state in states)


def test_a_change_of_bits_and_a_new_fit_leave_the_ranks_alike_and_change_the_steps(ranks: Any) -> None:
    key = "first.weight_quantizer.scale"
    for name in ("lsq", "lsq_plus"):
        scales = [state[key] for state in ranks[0][name]]
        assert ranks[0][name][4]["first.weight_quantizer.format"][0] == 4
        assert ranks[0][name][5]["first.weight_quantizer.format"][0] == 2
        torch.testing.assert_close(scales[5], scales[4] * 7, rtol=0.2, atol=0.0)  # the range stays: 7 steps become 1
        assert not torch.allclose(scales[7], scales[6], rtol=0.05)


def _levels(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/levels", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    finer, coarser = torch.rand(2, 6, generator=generator), 5 * torch.rand(2, 4, generator=torch.Generator())
    found = {}
    for initial in ("mse", "mean"):
        for shared in (False, True):
            quantizer = LevelwiseStep(4, calls=2, shared=shared, initial=initial)
            quantizer(finer), quantizer(coarser if rank else coarser[:0])
            found[f"{initial}_{shared}"] = quantizer.scale.detach()
            found[f"features_{initial}_{shared}"] = quantizer.features
    torch.save(found, f"{folder}/levels_{rank}.pt")
    distributed.destroy_process_group()


def test_a_level_that_is_empty_on_one_rank_has_the_step_of_what_the_other_sees(lqkd: Forks, tmp_path: Path) -> None:
    lqkd.run_function(_levels, str(tmp_path))
    first, second = (torch.load(tmp_path / f"levels_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["features_mse_False"].tolist() == [6, 4]
    coarser = 5 * torch.rand(2, 4, generator=torch.Generator())
    for initial in ("mse", "mean"):
        alone = LevelwiseStep(4, calls=2, initial=initial)
        alone(coarser), alone(coarser)
        torch.testing.assert_close(first[f"{initial}_False"][1], alone.scale.detach()[1])
