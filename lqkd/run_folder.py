"""The folder of one run: ``root/name/version``, claimed by exactly one run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lqkd.errors import UsageError

_ENVIRONMENT = "LQKD_RUN_FOLDER"
"""How the first process of a run tells the folder to the processes that it launches for the other devices."""


@dataclass
class RunSettings:
    """Where a run keeps what it makes.

    Attributes:
        root: folder of all runs.
        name: name of the experiment.
        version: name of this run, which must not exist yet; null counts up version_0, version_1, ...
    """

    root: str = "runs"
    name: str = "run"
    version: str | None = None


def claim(settings: RunSettings) -> Path:
    """Make the folder of a new run and return it; the same folder on every process of the run.

    Raises:
        UsageError: when the folder cannot be written or exists already, or when processes that were started by
            something else than this run's first process have no common name for it.
    """
    for key in ("name", "version"):
        value = getattr(settings, key)
        if value is not None and (not value or Path(value).is_absolute() or ".." in Path(value).parts):
            raise UsageError(f"run.{key}={value!r} is not possible: it must be a name below run.root={settings.root!r}")
    rank = getattr(rank_zero_only, "rank", 0)
    parent = Path(settings.root) / settings.name
    if rank > 0 and _ENVIRONMENT in os.environ:
        return Path(os.environ[_ENVIRONMENT])
    version = settings.version or _common_version()
    if rank > 0:
        assert version is not None
        return parent / version
    folder = _make(parent, version)
    os.environ[_ENVIRONMENT] = str(folder.resolve())
    return folder


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
            f"run folder {parent / (version or '')} exists: choose another run.version or run.name"
        ) from None
    except OSError as error:
        raise UsageError(
            f"run folder {parent} cannot be written ({error.strerror}): choose another run.root"
        ) from error
