"""Two gloo processes of one run that are stopped, resumed, or diverge."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest
import torch
import yaml

from lqkd.runs.stopping import lost_a_process
from tests.forked import Forks, send
from tests.integration.test_resume import SHIPPED, SMALL, after_saving, assert_same, steps_done

NAN_ON_THE_SECOND_RANK = """
import torch.nn.functional as F
real, calls = F.cross_entropy, [0]
def cross_entropy(logits, *rest, **more):
    calls[0] += torch.is_grad_enabled()
    return real(logits, *rest, **more) * (float("nan") if calls[0] == 4 and os.environ["RANK"] == "1" else 1.0)
F.cross_entropy = cross_entropy
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp_resume")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def ranks(count: int = 2) -> list[dict[str, str]]:
    """The environments of the processes of one training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    return [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(count))]


def fit(place: Path, version: str, *more: str) -> list[str]:
    arguments = ["fit", "--config", SHIPPED, "--config", str(place / "small.yaml"), "--run.root", str(place)]
    arguments += ["--run.version", version, "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    return [*arguments, "--data.init_args.batch_size", "8", *more]


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_to_the_same_result(lqkd: Forks, place: Path) -> None:
    """Only the second gets the signal, in the second epoch; batch norm and loss statistics differ between the two."""
    runs = place / "run"
    assert lqkd.run_ranks(*fit(place, "whole"), environments=ranks()) == [0, 0], lqkd.log.read_text()
    assert "global batch 16 = 2 processes x 8 images" in lqkd.log.read_text()
    seen = after_saving(runs / "cut", 6)
    statuses = lqkd.run_ranks(
        *fit(place, "cut"), environments=ranks(), meanwhile=lambda pids: send(pids[1], signal.SIGTERM, seen)
    )
    assert statuses == [143, 143], lqkd.log.read_text()
    assert 0 < steps_done(runs / "cut") < 18
    assert lqkd.run_ranks("resume", str(runs / "cut"), environments=ranks()) == [0, 0], lqkd.log.read_text()
    assert_same(runs / "cut", runs / "whole")


@pytest.mark.slow
def test_a_loss_that_is_nan_on_one_process_stops_both_in_that_step(lqkd: Forks, place: Path) -> None:
    statuses = lqkd.run_ranks(*fit(place, "nan"), environments=ranks(), before=NAN_ON_THE_SECOND_RANK)
    assert statuses == [3, 3]
    assert "training diverged at step 3 (epoch 0): the loss is not finite on another process" in lqkd.log.read_text()
    assert steps_done(place / "run" / "nan") == 3
    saved = torch.load(place / "run" / "nan" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in saved.values())


NCCL = {
    "remote": "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error",
    "watchdog": "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)",
    "own": "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage\nncclInvalidUsage: Duplicate GPU detected",
}


@pytest.mark.parametrize("case", NCCL)
def test_what_nccl_raises_is_a_lost_process_unless_it_is_of_this_one(tmp_path: Path, case: str) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert lost_a_process(torch.distributed.DistBackendError(NCCL[case])) == (case != "own")
    finally:
        torch.distributed.destroy_process_group()


def test_an_error_of_the_backend_ends_a_training_like_a_lost_process(lqkd: Forks, place: Path) -> None:
    raising = (
        "import torch.nn.functional as F\n"
        "def cross_entropy(*inputs, **more):\n"
        f"    raise torch.distributed.DistBackendError({NCCL['watchdog']!r})\n"
        "F.cross_entropy = cross_entropy\n"
    )
    command = fit(place, "backend", "--trainer.devices", "1", "--trainer.num_sanity_val_steps", "0")
    assert lqkd.run_ranks(*command, environments=ranks(1), before=raising) == [5], lqkd.log.read_text()
    errors = [line for line in lqkd.log.read_text().splitlines() if line.startswith("lqkd: ")]
    assert errors[0].startswith("lqkd: error: another process of this training has ended or hangs ([Rank 1] Watchdog")
    assert "Traceback" not in lqkd.log.read_text()


def test_gloos_end_of_patience_is_a_lost_process(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    told = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"
    try:
        assert lost_a_process(RuntimeError(told))
        assert not lost_a_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    finally:
        torch.distributed.destroy_process_group()


IMPATIENT = """
import datetime, functools
from lightning.pytorch.strategies import DDPStrategy
real = DDPStrategy.__init__
@functools.wraps(real)
def patient_for_a_while(self, *given, **more):
    real(self, *given, **({"timeout": datetime.timedelta(seconds=30)} | more))
DDPStrategy.__init__ = patient_for_a_while
"""
"""Gloo does not always see at once that the other is gone; then it would wait for half an hour."""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_is_told_by_the_other_in_one_sentence(lqkd: Forks, place: Path, lost: int) -> None:
    run = place / "run" / f"lost{lost}"
    seen = after_saving(run, 2)
    statuses = lqkd.run_ranks(
        *fit(place, run.name),
        environments=ranks(),
        before=IMPATIENT,
        meanwhile=lambda pids: send(pids[lost], signal.SIGKILL, seen),
    )
    assert statuses == ([-signal.SIGKILL, 5] if lost == 0 else [5, -signal.SIGKILL])
    log = lqkd.log if lost else lqkd.log.with_name(f"{lqkd.log.name}.1")
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("lqkd: ")]
    assert error.startswith("lqkd: error: another process of this training has ended or hangs (")
    assert error.endswith(f"go on with: python -m lqkd resume {run}")
    assert "Traceback" not in log.read_text()
    if lost:
        assert lqkd.run_ranks("resume", str(run), environments=ranks()) == [0, 0], lqkd.log.read_text()
