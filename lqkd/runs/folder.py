"""The folder of one run: ``root/name/version``, claimed by exactly one run."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError
from lqkd.utils.files import write_text
from lqkd.utils.renames import current_keys

CONFIG = "config.yaml"
LAYERS = "layers.txt"
SPLIT = "split.csv"
CHECKPOINTS = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"
METRICS = "metrics.csv"
SUMMARY = "summary.json"
STARTS = "starts.json"
NETWORKS = ("student.safetensors", "network.safetensors")
"""The trained network alone, of a distillation and of a float training."""

PYTHON = "python"
"""What the configuration of a run has in place of a model and data where :func:`lqkd.distill` made it from objects."""

_ENVIRONMENT = "LQKD_RUN_FOLDER"
"""How the first process of a run tells the folder to the processes that it launches for the other devices.

It is set while that run lasts only: the processes of a later one, started from the same notebook, have another folder.
"""


@dataclass
class RunSettings:
    """Where a run keeps what it makes.

    Attributes:
        root: folder of all runs.
        name: name of the experiment.
        version: name of this run, which must not exist yet; a number N is version_N; null counts up version_0,
            version_1, ...
        save_every_n_steps: optimizer steps from one saving of checkpoints/last.ckpt to the next within an epoch; null
            saves it between epochs only, and when training ends or is stopped by Ctrl-C or SIGTERM.
    """

    root: str = "runs"
    name: str = "run"
    version: str | int | None = None
    save_every_n_steps: int | None = None

    @property
    def folder_name(self) -> str | None:
        """The name of the version's folder; None where it counts up."""
        number = str(self.version).isdecimal()
        return None if self.version is None else f"version_{self.version}" if number else str(self.version)


def claim(settings: RunSettings, config: str) -> Path:
    """Make the folder of a new run and return it; the same folder on every process of the run.

    It appears with the run's configuration in it, so that a run that is killed at any moment can be resumed. An empty
    folder that is there already is taken.

    Args:
        settings: where it is to be.
        config: text of the configuration.

    Raises:
        UsageError: when the folder cannot be written or holds files already, or when processes that were started by
            something else than this run's first process have no common name for it.
    """
    _check_names(settings)
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # not by those who only look for a folder

    rank = getattr(rank_zero_only, "rank", 0)
    parent = Path(settings.root) / settings.name
    if rank > 0 and _ENVIRONMENT in os.environ:
        return Path(os.environ[_ENVIRONMENT])
    version = settings.folder_name or _common_version()
    if rank > 0:
        assert version is not None
        return parent / version
    folder = _make(parent, version, config)
    os.environ[_ENVIRONMENT] = str(folder.resolve())
    return folder


def forget_claimed() -> None:
    """The run of :func:`claim` is over: processes that are launched from now on belong to others."""
    os.environ.pop(_ENVIRONMENT, None)


def release(folder: Path) -> None:
    """Remove a run folder in which nothing has happened yet, but for what a run is described by."""
    if {path.name for path in folder.rglob("*")} <= {CONFIG, LAYERS, SPLIT, STARTS}:
        shutil.rmtree(folder)


def _check_names(settings: RunSettings) -> None:
    for key, value in (("root", settings.root), ("name", settings.name), ("version", settings.folder_name)):
        if value is None:
            continue
        if not value.isprintable():
            raise UsageError(f"run.{key}={value!r} is not possible: a path holds no NUL or other control characters")
        if key != "root" and (not value or Path(value).is_absolute() or ".." in Path(value).parts):
            raise UsageError(f"run.{key}={value!r} is not possible: it must be a name below run.root={settings.root!r}")
    if re.fullmatch(r"-\d+", str(settings.version)):
        raise UsageError(
            f"run.version={settings.version} is not possible: a number must be at least 0, or null to count"
        )


def restarted(settings: RunSettings) -> Path | None:
    """The folder of this run where torchrun or SLURM has started it once more and it had begun; otherwise None."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) or int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    version = settings.folder_name or (_common_version() if again else None)
    if not again or version is None:
        return None
    folder = Path(settings.root) / settings.name / version
    return folder if (folder / CONFIG).is_file() else None


def run_within(folder: Path) -> str:
    """``: did you mean ...?`` with the newest run in ``folder``, which is none itself; nothing when it holds none."""
    configs = sorted(folder.glob(f"[!.]*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    return f": did you mean {configs[-1].parent}?" if configs else ""


def resume_command(folder: Path) -> str:
    """What a person types to go on with the run in ``folder``."""
    return f"python -m lqkd resume {shlex.quote(str(folder))}"


def has_ended(summary: Mapping[str, Any]) -> bool:
    """Whether a run with this summary has come to its end, with its test where it has one."""
    ended = summary.get("finished")  # which summaries of earlier versions do not tell
    return current_keys(summary).get("test") is not None if ended is None else bool(ended)


def lock(folder: Path, patience: float = 10.0) -> int:
    """Keep others from training into ``folder`` until what this returns is closed, or this process ends in any way.

    Args:
        folder: a run folder.
        patience: seconds to wait for a process that is about to end; a killed one's data workers live on for a while.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        UsageError: when another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UsageError(
                    f"run folder {folder} is in use: another process is training in it, wait until it has ended"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return descriptor


def remove_partial_files(folder: Path) -> None:
    """Remove what a killed process has left half-written; see :func:`lqkd.utils.files.atomic_path`."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def _common_version() -> str | None:
    """A version on which separately started processes agree; None when this process starts the others itself."""
    if "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm_{os.environ['SLURM_JOB_ID']}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        job = os.environ["TORCHELASTIC_RUN_ID"]
        if job == "none":
            raise UsageError(
                "run.version=null is not possible under torchrun: give it, or start torchrun with --rdzv-id"
            )
        return f"torchrun_{job}"
    return None


def _make(parent: Path, version: str | None, config: str) -> Path:
    numbers = count(len(list(parent.glob("version_*"))))
    beside = parent / f".{uuid.uuid4().hex[:8]}.tmp"
    try:
        write_text(beside / CONFIG, config)
        for name in (f"version_{number}" for number in numbers) if version is None else (version,):
            (parent / name).parent.mkdir(parents=True, exist_ok=True)
            if _renamed(beside, parent / name):
                return parent / name
    except OSError as error:
        raise UsageError(
            f"run folder {parent} cannot be written ({error.strerror}): choose another run.root"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    folder = parent / str(version)
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"run folder {folder} is there and has no {CONFIG}, so that no run goes on in it: choose another "
            "run.version or run.name, or move it away"
        )
    raise UsageError(
        f"run folder {folder} exists: choose another run.version or run.name, or go on with it: "
        f"{resume_command(folder)}"
    )


def _renamed(source: Path, target: Path) -> bool:
    """Whether the folder ``target`` was free or empty and is ``source`` now: one of several processes can do that."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # the last is a file of that name
            return False
        raise
    return True


def check_resumable(folder: Path) -> None:
    """Refuse what is no run folder.

    Raises:
        UsageError: then.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{str(folder)!r} is no run folder that can be resumed: it has no {CONFIG}{run_within(folder)}"
        )


def check_seed(setting: str, seed: int) -> None:
    """Refuse what NumPy takes for no seed.

    Raises:
        UsageError: then.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"{setting}={seed} is not possible: a seed is a whole number from 0 to {2**32 - 1}")
