"""The folder of one run: ``root/name/version``, claimed by exactly one run."""

from __future__ import annotations

import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from lqkd.errors import UsageError

CONFIG = "config.yaml"
LAYERS = "layers.txt"
SPLIT = "split.csv"
CHECKPOINTS = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"
METRICS = "metrics.csv"
SUMMARY = "summary.json"

_ENVIRONMENT = "LQKD_RUN_FOLDER"
"""How the first process of a run tells the folder to the processes that it launches for the other devices."""


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


def claim(settings: RunSettings) -> Path:
    """Make the folder of a new run and return it; the same folder on every process of the run.

    Raises:
        UsageError: when the folder cannot be written or exists already, or when processes that were started by
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
    folder = _make(parent, version)
    os.environ[_ENVIRONMENT] = str(folder.resolve())
    return folder


def _check_names(settings: RunSettings) -> None:
    for key, value in (("root", settings.root), ("name", settings.name), ("version", settings.folder_name)):
        if value is None:
            continue
        if "\0" in value:
            raise UsageError(f"run.{key}={value!r} is not possible: a path holds no NUL")
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
    configs = sorted(folder.glob(f"*/{CONFIG}"), key=lambda path: path.stat().st_mtime)
    return f": did you mean {configs[-1].parent}?" if configs else ""


def lock(folder: Path, patience: float = 10.0) -> int:
    """Keep other processes from training into ``folder`` until this one ends, in whatever way.

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
    """Remove what a killed process has left half-written; see :func:`lqkd.files.atomic_path`."""
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


def _make(parent: Path, version: str | None) -> Path:
    try:
        if version is not None:
            (parent / version).mkdir(parents=True)
            return parent / version
        parent.mkdir(parents=True, exist_ok=True)
        number = len(list(parent.glob("version_*")))
        while True:
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()  # fails when another run was faster, which makes the claim exclusive
                return folder
            except FileExistsError:
                number += 1
    except FileExistsError:
        raise UsageError(
            f"run folder {parent / (version or '')} exists: choose another run.version or run.name, or go on with it: "
            f"python -m lqkd resume {parent / (version or '')}"
        ) from None
    except OSError as error:
        raise UsageError(
            f"run folder {parent} cannot be written ({error.strerror}): choose another run.root"
        ) from error
