"""A language model on two real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ddp.test_detection import workers
from tests.forked import Forks


@pytest.mark.slow
def test_two_processes_train_a_language_model_as_one_with_the_same_global_batch(lqkd: Forks, tmp_path: Path) -> None:
    first, second = workers(lqkd, tmp_path, 2, batch_size=8, of="language")
    (one,) = workers(lqkd, tmp_path, 1, batch_size=16, of="language")
    assert torch.equal(first["parameters"], second["parameters"])
    torch.testing.assert_close(first["parameters"], one["parameters"], rtol=1e-3, atol=1e-4)
