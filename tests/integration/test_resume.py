"""Real processes that are stopped, killed and resumed: the result is that of a run that was never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.forked import Forks, send

SHIPPED = str(Path(__file__).parents[2] / "configs" / "regularizer.yaml")
KILLS = int(os.environ.get("LQKD_KILLS", "20"))
"""Of the stress test; more make it longer."""

pytestmark = pytest.mark.slow

DIES_AT_A_RENAME = """
import signal
left, real = [{}], os.replace
def replace(*names):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
"""

COPIES_BEFORE_A_WRITE = """
import pathlib, shutil
run, copies = pathlib.Path({!r}), pathlib.Path({!r})
copytree, copied = shutil.copytree, [0]
def counted(real, leftover):
    def write(name, *rest, **options):
        if "/regularizer/" not in str(name) and not (leftover and str(name).endswith(".tmp")):
            copied[0] += 1
            copytree(run, copies / f"{{copied[0]:02}}")
        return real(name, *rest, **options)
    return write
os.replace, pathlib.Path.unlink = counted(os.replace, False), counted(pathlib.Path.unlink, True)
"""
"""What is on the disk before a write is what a kill would leave there."""

DIES_WITHIN_A_RECORD = """
import signal
left, real = [{}], os.pwrite
def pwrite(descriptor, record, place):
    left[0] -= 1
    if left[0] == 0:
        real(descriptor, record[: len(record) // 2], place)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, record, place)
os.pwrite = pwrite
"""

SMALL: dict[str, Any] = {
    "run": {"name": "run", "save_every_n_steps": 1},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": [
            {"class_path": "lqkd.callbacks.BatchNormReestimation", "init_args": {"batches": 2}},
            {"class_path": "lqkd.callbacks.IntegerBiases"},
            {"class_path": "lqkd.callbacks.OscillationMonitor"},
            {"class_path": "lqkd.callbacks.RegularizerMonitor", "init_args": {"every_n_steps": 2}},
            {
                "class_path": "lqkd.callbacks.BitWidthScheduler",
                "init_args": {"stages": [{"bits": "w8a8", "until_step": 5}, {"bits": "w4a4", "until_epoch": 2}]},
            },
        ],
    },
    "model": {
        "init_args": {
            "balance": {"class_path": "lqkd.balances.RandomBalance"},  # draws random numbers in every step
        }
    },
    "data": {"init_args": {"batch_size": 16, "limit_train": 96, "crop_padding": 1}},
}  # 6 steps an epoch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def fit(place: Path, version: str, *arguments: str) -> list[str]:
    where = ["--run.root", str(place), "--run.version", version]
    return ["fit", "--config", SHIPPED, "--config", str(place / "small.yaml"), *where, *arguments]


@pytest.fixture(scope="module")
def whole(lqkd: Forks, place: Path) -> Path:
    """A run that was never stopped."""
    assert lqkd.run(*fit(place, "whole")) == 0, lqkd.log.read_text()
    return place / "run" / "whole"


def assert_same(run: Path, whole: Path) -> None:
    """All that a run leaves behind is the same, byte by byte, but for times and names."""
    for name in ("metrics.csv", "student.safetensors", "layers.txt"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    tables = [path.relative_to(whole) for path in whole.rglob("*.csv")]
    assert len(tables) > 3
    for table in tables:
        assert (run / table).read_text() == (whole / table).read_text(), table
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    for key in theirs.keys() - {"train_seconds", "images_per_second"}:
        assert ours[key] == theirs[key], key
    for name in ("best", "last"):
        a, b = (torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True) for folder in (run, whole))
        for key, value in b["state_dict"].items():
            assert torch.equal(a["state_dict"][key], value), (name, key)
    assert not list(run.rglob("*.tmp"))


def steps_done(run: Path) -> int:
    path = run / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def after_saving(run: Path, times: int = 1) -> Callable[[], bool]:
    """Whether ``last.ckpt`` has been replaced so often since now."""
    path, seen = run / "checkpoints" / "last.ckpt", [-1]
    seen[0] = path.stat().st_mtime_ns if path.exists() else -1
    left = [times]

    def saved() -> bool:
        now = path.stat().st_mtime_ns if path.exists() else -1
        if now != seen[0]:
            seen[0] = now
            left[0] -= 1
        return left[0] <= 0

    return saved


def stop(lqkd: Forks, place: Path, version: str, number: signal.Signals, saved: int = 3) -> tuple[int, Path]:
    """Start a run, send it a signal after some steps, and return its exit status and its folder."""
    run = place / "run" / version
    when = after_saving(run, saved)
    return lqkd.run(*fit(place, version), meanwhile=lambda pid: send(pid, number, when)), run


def resume(lqkd: Forks, run: Path, *arguments: str, **more: Any) -> int:
    return lqkd.run("resume", str(run), *arguments, **more)


# ---- stopped on purpose


def test_a_run_stopped_by_sigterm_within_an_epoch_resumes_to_the_same_result(
    lqkd: Forks, place: Path, whole: Path
) -> None:
    status, run = stop(lqkd, place, "terminated", signal.SIGTERM)
    assert status == 143
    assert f"go on with: python -m lqkd resume {run}" in lqkd.log.read_text()
    done = steps_done(run)
    assert 0 < done < 18
    assert resume(lqkd, run) == 0, lqkd.log.read_text()
    assert_same(run, whole)
    first, second = json.loads((run / "starts.json").read_text())
    assert first["checkpoint"] is None
    assert (second["checkpoint"], second["steps"], second["changed"]) == ("checkpoints/last.ckpt", done, [])


def test_a_run_stopped_by_ctrl_c_resumes_to_the_same_result(lqkd: Forks, place: Path, whole: Path) -> None:
    status, run = stop(lqkd, place, "interrupted", signal.SIGINT, saved=7)
    assert status == 130
    assert "stopped by SIGINT before step" in lqkd.log.read_text()
    assert resume(lqkd, run) == 0
    assert_same(run, whole)


def test_a_second_ctrl_c_ends_the_drawing_of_pictures_at_once(lqkd: Forks, place: Path) -> None:
    run = place / "run" / "impatient"
    slow = (
        "import signal, time\nimport lqkd.callbacks.regularizer.pictures as module\n"
        "def pictures(*history):\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n    yield from ()\n"
        "module.pictures = pictures\n"
    )
    started = time.monotonic()
    when = after_saving(run, 7)
    status = lqkd.run(*fit(place, "impatient"), before=slow, meanwhile=lambda pid: send(pid, signal.SIGINT, when))
    assert status == 130
    assert time.monotonic() - started < 60
    assert f"go on with: python -m lqkd resume {run}" in lqkd.log.read_text()
    assert (run / "regularizer" / "weights.csv").is_file()
    assert steps_done(run) > 0


def test_a_job_whose_time_ends_goes_back_into_the_queue_and_finds_its_folder(
    lqkd: Forks, place: Path, whole: Path
) -> None:
    """Under SLURM's environment, with a program in the place of ``scontrol`` that notes what it is asked for."""
    (place / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {place}/asked\n')
    (place / "scontrol").chmod(0o755)
    job = {"JOB_ID": "77", "JOB_NAME": "job", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    job |= {"NTASKS_PER_NODE": "1", "NNODES": "1", "NODELIST": "localhost"}
    environment = {f"SLURM_{name}": value for name, value in job.items()}
    environment["PATH"] = f"{place}:{os.environ['PATH']}"
    run = place / "run" / "queued"
    when = after_saving(run, 3)
    command = fit(place, "queued")
    status = lqkd.run(*command, environment=environment, meanwhile=lambda pid: send(pid, signal.SIGUSR1, when))
    assert status == 128 + signal.SIGUSR1, lqkd.log.read_text()
    assert (place / "asked").read_text() == "requeue 77\n"
    assert lqkd.run(*command, environment=environment) == 2  # a new job is no restart
    assert f"go on with it: python -m lqkd resume {run}" in lqkd.log.read_text()
    assert lqkd.run(*command, environment=environment | {"SLURM_RESTART_COUNT": "1"}) == 0, lqkd.log.read_text()
    assert_same(run, whole)


# ---- what goes wrong


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(lqkd: Forks, place: Path, whole: Path) -> None:
    _, run = stop(lqkd, place, "full", signal.SIGTERM)
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)"  # writing on fails with EFBIG
    assert resume(lqkd, run, before=limit) == 4
    (error,) = [line for line in lqkd.log.read_text().splitlines() if "error" in line.lower()]
    assert error.startswith("lqkd: error: File too large while writing")
    assert error.endswith(f"python -m lqkd resume {run}")
    assert last.read_bytes() == before
    assert resume(lqkd, run) == 0
    assert_same(run, whole)


def test_a_run_goes_on_with_more_epochs_and_records_the_change(lqkd: Forks, place: Path) -> None:
    assert lqkd.run(*fit(place, "longer", "--trainer.max_epochs", "1")) == 0
    run = place / "run" / "longer"
    assert resume(lqkd, run, "--trainer.max_epochs", "2") == 0, lqkd.log.read_text()
    assert steps_done(run) == 12
    assert json.loads((run / "starts.json").read_text())[1]["changed"] == ["trainer.max_epochs was 1 and is now 2"]
    assert "max_epochs: 2" in (run / "config.yaml").read_text()


def test_wandb_goes_on_under_the_same_id(lqkd: Forks, place: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True}}
    (place / "wandb.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    run = place / "run" / "wandb"
    arguments = fit(place, "wandb", "--config", str(place / "wandb.yaml"))
    status = lqkd.run(*arguments, meanwhile=lambda pid: send(pid, signal.SIGTERM, after_saving(run)))
    assert status == 143, lqkd.log.read_text()
    assert resume(lqkd, run) == 0, lqkd.log.read_text()
    files = [path.name for path in run.rglob("*.wandb")]
    assert len(files) == 2
    (name,) = set(files)
    assert name == f"run-{json.loads((run / 'starts.json').read_text())[0]['wandb_id']}.wandb"


# ---- killed


def test_a_run_killed_again_and_again_ends_like_one_that_never_was(lqkd: Forks, place: Path) -> None:
    """At random moments of a step, of starting, and between writing a file and giving it its name.

    No kill lets more than about two steps pass, on a machine of any speed, and the training has more than twice as
    many steps as there are kills.
    """
    longer = ("--trainer.max_epochs", str(KILLS * 5 // 12))  # of 6 steps
    assert lqkd.run(*fit(place, "whole of killed", *longer)) == 0, lqkd.log.read_text()
    whole = place / "run" / "whole of killed"
    step_seconds = json.loads((whole / "summary.json").read_text())["train_seconds"] / (KILLS * 5 // 12 * 6)

    generator = random.Random(int(os.environ.get("LQKD_SEED", "0")))
    run, kills, progress = place / "run" / "killed", 0, set()
    command = fit(place, "killed", *longer)
    while kills < KILLS:
        before, meanwhile = "", lambda pid: None
        kind = generator.choice(["step", "step", "start", "rename"])
        saved = after_saving(run)
        if kind == "step":
            pause = generator.uniform(0, step_seconds)
            meanwhile = lambda pid, s=saved, p=pause: send(pid, signal.SIGKILL, lambda: s() and not time.sleep(p))  # type: ignore[misc] # noqa: E731
        elif kind == "start":
            until = time.monotonic() + generator.uniform(0.0, 1.5)
            meanwhile = lambda pid, s=saved, t=until: send(pid, signal.SIGKILL, lambda: s() or time.monotonic() > t)  # type: ignore[misc] # noqa: E731
        else:
            before = DIES_AT_A_RENAME.format(generator.randint(1, 8))
        status = lqkd.run(*command, before=before, meanwhile=meanwhile)
        assert status in (0, -signal.SIGKILL), lqkd.log.read_text()
        if status == 0:
            break
        kills += 1
        progress.add(steps_done(run))
        if (run / "config.yaml").exists():
            command = ["resume", str(run)]
        else:
            run = place / "run" / f"killed-{kills}"
            command = fit(place, run.name, *longer)
    assert kills == KILLS, f"the training ended after {kills} kills: make it longer"
    assert len(progress) > 5
    assert resume(lqkd, run) == 0, lqkd.log.read_text()
    assert_same(run, whole)


def test_a_run_killed_while_it_writes_its_teacher_cache_ends_like_one_that_never_was(lqkd: Forks, place: Path) -> None:
    """Within a record, in each of the three epochs of 96 records; last, the cache that is left serves a run alone."""

    def cached(version: str, cache: str) -> list[str]:
        return fit(place, version, "--model.init_args.teacher_cache.folder", str(place / cache))

    assert lqkd.run(*cached("cached whole", "cache of whole")) == 0, lqkd.log.read_text()
    whole, run = place / "run" / "cached whole", place / "run" / "cached"
    command = cached("cached", "cache")
    for record in (1, 40, 96 + 2, 96 + 16 * 3 + 5):
        status = lqkd.run(*command, before=DIES_WITHIN_A_RECORD.format(record))
        assert status == -signal.SIGKILL, lqkd.log.read_text()
        command = ["resume", str(run)]
    assert 6 < steps_done(run) < 18
    assert resume(lqkd, run) == 0, lqkd.log.read_text()
    assert_same(run, whole)
    never_writes = DIES_WITHIN_A_RECORD.format(1)
    assert lqkd.run(*cached("replayed", "cache"), before=never_writes) == 0, lqkd.log.read_text()
    assert_same(place / "run" / "replayed", whole)


def test_an_extension_killed_before_any_of_its_writes_ends_like_one_that_never_was(lqkd: Forks, place: Path) -> None:
    """Files of the end before it are gone once it has begun, and what is asked for is what is done."""
    short = ("--data.init_args.limit_train", "32", "--run.save_every_n_steps", "null")
    assert lqkd.run(*fit(place, "ended", *short, "--trainer.max_epochs", "1")) == 0, lqkd.log.read_text()
    ended, whole, run = (place / "run" / name for name in ("ended", "extended", "cut short"))
    shutil.copytree(ended, whole)
    longer = ("--trainer.max_epochs", "2")
    assert resume(lqkd, whole, *longer) == 0, lqkd.log.read_text()
    shutil.copytree(ended, run)
    copies = place / "before each write"
    assert resume(lqkd, run, *longer, before=COPIES_BEFORE_A_WRITE.format(str(run), str(copies))) == 0
    for left in sorted(copies.iterdir()):
        shutil.rmtree(run)
        left.rename(run)
        begun = "max_epochs: 2" in (run / "config.yaml").read_text()
        if begun and (run / "summary.json").exists():
            assert json.loads((run / "summary.json").read_text())["epochs"] == 2
        assert resume(lqkd, run, *(() if begun else longer)) == 0, lqkd.log.read_text()
        assert_same(run, whole)
    assert int(left.name) > 12
