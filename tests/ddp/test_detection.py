"""A detector on two real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp.test_stopping import ranks
from tests.forked import Forks

ROOT = Path(__file__).parents[2]


def workers(
    lqkd: Forks, tmp_path: Path, processes: int, batch_size: int, of: str = "detection"
) -> list[dict[str, Any]]:
    """Run ``main`` of a worker in so many processes and return what each saved."""
    arguments = {"output": str(tmp_path / str(processes)), "processes": processes, "batch_size": batch_size}
    work = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    work += f"from tests.ddp.{of}_worker import main\nmain(**{arguments!r})\n"
    environments = [rank | {"PL_GLOBAL_SEED": "0"} for rank in ranks(processes)]
    statuses = lqkd.run_ranks(before=f"{work}sys.exit(0)", environments=environments)
    assert statuses == [0] * processes, lqkd.log.read_text()
    return [torch.load(tmp_path / f"{processes}_{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_measure_and_train_as_one_with_the_same_global_batch(lqkd: Forks, tmp_path: Path) -> None:
    first, second = workers(lqkd, tmp_path, 2, batch_size=4)
    (one,) = workers(lqkd, tmp_path, 1, batch_size=8)
    assert first["measured"] == second["measured"] == one["measured"]
    assert one["measured"]["val/map"] > 0
    assert torch.equal(first["parameters"], second["parameters"])
    torch.testing.assert_close(first["parameters"], one["parameters"], rtol=1e-3, atol=1e-4)
