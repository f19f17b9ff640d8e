"""Hooks, fixtures, and small real parts from which tests are built.

Nothing heavy is imported here: the process that only hands out tests to the workers reads this file too.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest

from tests.forked import Forks, forks
from tests.skips import pytest_runtest_setup, pytest_sessionfinish, pytest_terminal_summary

if TYPE_CHECKING:
    import torch
    from lightning.pytorch import Trainer
    from torch import nn

    from lqkd.data import Digits
    from lqkd.models import CifarResNet
    from lqkd.modules import DistillModule

__all__ = ["pytest_runtest_setup", "pytest_sessionfinish", "pytest_terminal_summary"]  # hooks, which pytest finds here

# Compiling takes longer than these networks' training, for the same bits; see the fixture compiled_kernels.
os.environ.setdefault("LQKD_COMPILE", "0")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # or a program is built for each instruction set to see it run
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: there is a worker for every core
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="lqkd-config-")  # not the home folder's notes of own code
os.environ["LQKD_CACHE"] = tempfile.mkdtemp(prefix="lqkd-cache-")  # nor its caches

LONGEST = (
    # those of the slow tests
    *("test_documentation.py", "test_gpu_pack.py", "test_quickstart.py", "test_notebooks.py", "test_combinations.py"),
    *("test_study.py", "test_resume.py", "test_export.py", "test_networks.py", "test_cifar10.py", "test_typing.py"),
    # of the fast ones 90 to 30 CPU seconds on a busy machine
    *("test_trust.py", "test_cli.py", "test_precision.py", "test_compilation.py", "test_held_out.py"),
    *("test_teacher_cache.py", "test_sensitivity.py", "test_quantizer_contract.py"),
    # about 10
    *("test_exact.py", "test_stopping.py", "test_formats.py", "test_guards.py", "test_distillation.py"),
    *("test_language.py", "test_oscillation.py", "test_config_heads.py", "test_batches.py", "test_detection.py"),
    *("test_regularizer_statistics.py", "test_distill_module.py", "test_batchnorm.py"),
)
"""Files that begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection() -> None:
    """Import without collecting garbage, of which there is none."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what is imported out of every collection of garbage: a tenth of the time of a small training."""
    import torch
    from lightning.fabric.utilities import registry

    torch.set_num_threads(1)  # the tests' networks are too small for two threads to help each other
    registry.entry_points = lru_cache(registry.entry_points)  # every Trainer asks all installed packages for callbacks
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():  # a seed waits for each, with its own stack trace: a third of a short test's time
            device.manual_seed_all = lambda seed: None  # type: ignore[assignment]
    gc.freeze()
    gc.enable()


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with the marker ``own_process`` in a fork of a process that has compiled nothing."""
    name = pyfuncitem.nodeid
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get("LQKD_OWN_PROCESS") == name:
        return None
    arguments = ["-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", name]
    run = f"import sys, pytest\nos.chdir({str(pyfuncitem.config.rootpath)!r})\nsys.path.insert(0, '')\n"
    run += f"sys.exit(int(pytest.main({arguments!r})))"
    lqkd: Forks = pyfuncitem._request.getfixturevalue("lqkd")
    assert lqkd.run(before=run, environment={"LQKD_OWN_PROCESS": name}) == 0, lqkd.log.read_text()
    return True


@pytest.fixture(scope="session")
def lqkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs command lines in processes of their own; one for all files, since it imports everything."""
    with forks(tmp_path_factory.mktemp("forks") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def drawing() -> Iterator[Callable[..., Any]]:
    """Draw no pictures, which takes half of the time of a short run; the function that would draw them."""
    from lqkd.callbacks.regularizer import pictures

    with pytest.MonkeyPatch.context() as patched:
        drawing = pictures.pictures
        patched.setattr(pictures, "pictures", lambda *history: iter(()))
        yield drawing


@pytest.fixture
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizers are compiled from some number of elements on, as they are for users."""
    monkeypatch.setenv("LQKD_COMPILE", "1")


@pytest.fixture(autouse=True)
def _quiet_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")


@pytest.fixture(autouse=True)
def _no_run_of_wandb_outlives_its_test() -> Iterator[None]:
    """A run that is still open would be taken over by the next test's logger, in another folder."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def network(depth: int = 8, classes: int = 10) -> CifarResNet:
    from lqkd.models import CifarResNet

    return CifarResNet(depth, num_classes=classes, width=4, in_channels=1)


def distiller(**arguments: Any) -> DistillModule:
    """A DistillModule on digits with random weights and every player present, but for what ``arguments`` replace.

    The teacher's precision is given, since to find it out takes as long as a short training.
    """
    import torch

    from lqkd.modules import DistillModule
    from lqkd.quantization import Recipe
    from lqkd.regularizers import ElementwiseMLP
    from lqkd.teachers import FrozenTeacher

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "teacher": FrozenTeacher(network(14), minimum_accuracy=0.0, precision="fp32"),
        "student": network(),
        "quantization": Recipe(bits="w4a4"),
        "regularizer": ElementwiseMLP(hidden=8),
        "student_optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    }
    return DistillModule(**(defaults | arguments))


def digits(batches: int = 7, batch_size: int = 16) -> Digits:
    """Digits with ``batches`` training batches an epoch."""
    from lqkd.data import Digits

    return Digits(batch_size=batch_size, limit_train=batches * batch_size, eval_batch_size=256)


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., Trainer]:
    """A real Trainer on the CPU, silent, that writes below ``tmp_path``.

    It measures nothing on the test split: a test that asks for that says ``limit_test_batches=1.0``.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    def make(**arguments: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": CSVLogger(tmp_path, name="", version=""),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "limit_test_batches": 0,  # of which references before the first step take longer than most trainings
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }
        return Trainer(**(defaults | arguments))

    return make


def parameters_of(module: nn.Module) -> torch.Tensor:
    import torch

    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()
