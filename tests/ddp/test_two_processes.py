"""Two real gloo processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp.test_stopping import ranks
from tests.forked import Forks

ROOT = Path(__file__).parents[2]


def run_workers(lqkd: Forks, tmp_path: Path, processes: int, **settings: Any) -> list[dict[str, Any]]:
    """Run ``worker.main`` in so many processes and return what each saved."""
    arguments = {"output": str(tmp_path / str(processes)), "processes": processes, **settings}
    work = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.ddp.worker import main\nmain(**{arguments!r})\n"
    environments = [rank | {"PL_GLOBAL_SEED": "0"} for rank in ranks(processes)]
    statuses = lqkd.run_ranks(before=f"{work}sys.exit(0)", environments=environments)
    assert statuses == [0] * processes, lqkd.log.read_text()
    return [torch.load(tmp_path / f"{processes}_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def results(lqkd: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ddp")
    return {"two": run_workers(lqkd, folder, 2, batch_size=16), "one": run_workers(lqkd, folder, 1, batch_size=32)[0]}


def test_both_ranks_have_the_same_weights_after_every_step(results: dict[str, Any]) -> None:
    first, second = results["two"]
    assert len(first["steps"]) == 6
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert torch.equal(a, b)


def test_quantizers_start_with_the_same_steps_on_both_ranks(results: dict[str, Any]) -> None:
    first, second = results["two"]
    assert torch.equal(first["initial_scales"], second["initial_scales"])


def test_two_processes_start_like_one_with_the_same_global_batch(results: dict[str, Any]) -> None:
    torch.testing.assert_close(results["two"][0]["initial_scales"], results["one"]["initial_scales"], rtol=1e-5, atol=0)


def test_two_processes_train_like_one_with_the_same_global_batch(results: dict[str, Any]) -> None:
    """To 1e-4 after six steps: sums over samples are taken in another order, and rounding to a grid amplifies it."""
    torch.testing.assert_close(results["two"][0]["steps"][-1], results["one"]["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_without_labels_takes_part_in_distillation(lqkd: Forks, tmp_path: Path) -> None:
    """Its task loss is 0 and in the graph, for which DDP waits, also where a balance looks at gradients in weights."""
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, unlabelled_rank=1, shared="3")
    assert len(first["steps"]) == 6
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    assert first["steps"][-1].isfinite().all()
    assert not torch.equal(first["steps"][-1], first["steps"][0])


@pytest.mark.slow
@pytest.mark.parametrize("player", ["cooperative", "adversarial", "look_ahead"])
def test_every_player_trains_two_processes_like_one(lqkd: Forks, tmp_path: Path, player: str) -> None:
    """Weights of mean one, over both processes, after six steps; to the tolerance of the test above."""
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, player=player, guard="entropy")
    one = run_workers(lqkd, tmp_path, 1, batch_size=32, player=player, guard="entropy")[0]
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    assert not torch.equal(first["steps"][-1], first["steps"][0])
    torch.testing.assert_close(first["steps"][-1], one["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_several_terms_train_two_processes_like_one(lqkd: Forks, tmp_path: Path) -> None:
    """Logits, features and residuals of two teachers, with the step as long as the task's alone."""
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, terms=True)
    one = run_workers(lqkd, tmp_path, 1, batch_size=32, terms=True)[0]
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    assert not torch.equal(first["steps"][-1], first["steps"][0])
    torch.testing.assert_close(first["steps"][-1], one["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_compiled_as_they_do_eagerly(lqkd: Forks, tmp_path: Path) -> None:
    eager = run_workers(lqkd, tmp_path, 2, batch_size=16, terms=True)
    compiled = run_workers(lqkd, tmp_path, 2, batch_size=16, terms=True, compiled=True)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.equal(torch.stack(ours["steps"]), torch.stack(theirs["steps"]))


@pytest.mark.slow
@pytest.mark.parametrize("interpolation", [None, "class", "auto"])
def test_two_processes_believe_teachers_as_one_does(lqkd: Forks, tmp_path: Path, interpolation: str | None) -> None:
    settings: dict[str, Any] = {"samples": 384, "trust": True, "interpolation": interpolation}
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, **settings)
    one = run_workers(lqkd, tmp_path, 1, batch_size=32, **settings)[0]
    assert first["trust"]["distill"]["read_as"]["teacher 1"] == {"0": "1", "1": "0"}
    assert first["trust"] == second["trust"]
    told, expected = (run["trust"]["distill"].pop("interpolation", None) for run in (first, one))
    assert first["trust"] == one["trust"]
    assert (told is not None) == (interpolation is not None)
    if interpolation:  # the student's weights agree to rounding
        for name in ("believed", "loss", "loss_of_student", "loss_of_teachers"):
            assert told[name] == pytest.approx(expected[name], rel=1e-3), name
    for name, kept in first["map"].items():
        assert torch.equal(kept, second["map"][name]), name
        assert torch.equal(kept, one["map"][name]), name
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    torch.testing.assert_close(first["steps"][-1], one["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_weigh_channels_by_held_out_rows_as_one_does(lqkd: Forks, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"samples": 384, "explained": True}
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, **settings)
    one = run_workers(lqkd, tmp_path, 1, batch_size=32, **settings)[0]
    assert torch.equal(first["explained"], second["explained"])
    assert float(one["explained"].std()) > 0.005
    torch.testing.assert_close(first["explained"], one["explained"], rtol=1e-3, atol=1e-4)
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    torch.testing.assert_close(first["steps"][-1], one["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_gradients_measured_in_weights_train_two_processes_like_one(lqkd: Forks, tmp_path: Path) -> None:
    """To the tolerance of the tests above; what is measured must not be what DDP averages for the step."""
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, shared="1")
    one = run_workers(lqkd, tmp_path, 1, batch_size=32, shared="1")[0]
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    assert not torch.equal(first["steps"][-1], first["steps"][0])
    torch.testing.assert_close(first["steps"][-1], one["steps"][-1], rtol=1e-3, atol=1e-4)


def test_accuracies_are_exact_over_both_ranks(results: dict[str, Any]) -> None:
    for key in ("teacher", "test"):
        assert results["two"][0][key] == results["two"][1][key]
    assert results["two"][0]["teacher"] == pytest.approx(results["one"]["teacher"], abs=1e-6)


def test_a_validation_counts_every_image_once(results: dict[str, Any]) -> None:
    """143 images do not divide by two: a padded one would show in the denominator."""
    (accuracy, loss), second = (rank["validation"] for rank in results["two"])
    assert [accuracy, loss] == second
    assert 0 < accuracy < 1
    assert accuracy * 143 == pytest.approx(round(accuracy * 143), abs=1e-3)
    assert loss == pytest.approx(results["one"]["validation"][1], rel=1e-3)  # to the tolerance of the weights


def test_ddp_knows_nothing_of_the_teacher(results: dict[str, Any]) -> None:
    names = results["two"][0]["synchronised"]
    assert names
    assert not [name for name in names if "teacher" in name]


def test_accumulation_trains_both_ranks_alike(lqkd: Forks, tmp_path: Path) -> None:
    """Also when the ranks' shares of the last batch differ by a sample, and each step is as long as the task's."""
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=40, accumulate=2, samples=75, terms=True)
    assert torch.equal(first["steps"][-1], second["steps"][-1])
    assert first["global_step"] == second["global_step"] == 1


def test_both_ranks_switch_dampen_and_freeze_the_same_weights(lqkd: Forks, tmp_path: Path) -> None:
    first, second = run_workers(lqkd, tmp_path, 2, batch_size=16, oscillation=True)
    assert len(first["steps"]) == 24
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert torch.equal(a, b)
    assert sum(int(mask.sum()) for mask in first["frozen"]) > 0
    for a, b in zip(first["frozen"], second["frozen"], strict=True):
        assert torch.equal(a, b)
    assert max(first["flipping"]) > 0
    assert (first["flipping"], first["oscillating"]) == (second["flipping"], second["oscillating"])


@pytest.mark.slow
def test_two_processes_write_one_cache_that_any_number_of_them_replays(
    lqkd: Forks, results: dict[str, Any], tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    live, batches = results["two"], 6
    writing = run_workers(lqkd, tmp_path, 2, batch_size=16, cache=cache)
    replaying = run_workers(lqkd, tmp_path, 2, batch_size=16, cache=cache)
    alone = run_workers(lqkd, tmp_path, 1, batch_size=32, cache=cache)[0]
    assert [[rank["asked"] for rank in group] for group in (writing, replaying, [alone])] == [
        [batches] * 2,
        [0, 0],
        [0],
    ]
    for group in (writing, replaying):
        for rank, expected in zip(group, live, strict=True):
            assert torch.equal(torch.stack(rank["steps"]), torch.stack(expected["steps"]))
            assert rank["teacher"] == expected["teacher"]
    torch.testing.assert_close(alone["steps"][-1], results["one"]["steps"][-1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_command_line_trains_on_two_devices_into_one_run_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lqkd", "fit", "--config", str(ROOT / "configs" / "regularizer.yaml")]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    command += ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "128", "--run.root", str(tmp_path)]
    subprocess.run(command, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1", "LQKD_COMPILE": "0"})
    folders = list((tmp_path / "regularizer").iterdir())
    assert [folder.name for folder in folders] == ["version_0"]
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["steps"] == 1
    assert summary["test"] is not None
