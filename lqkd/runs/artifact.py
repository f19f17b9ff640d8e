"""The network that a run has made, as an artifact of W&B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from lqkd.runs.folder import CONFIG, SUMMARY

_NETWORKS = ("student", "network")


def keep_artifact(logger: Logger, folder: Path, about: Mapping[str, Any]) -> None:
    """Add the best weights of a finished run to its run in W&B, where ``log_model`` of the logger asks for models.

    The artifact is called ``student-ID`` (``network-ID`` of a training in floating point) and has what
    :func:`lqkd.runs.load_student` loads, the configuration and the summary. Lightning adds the checkpoints as
    ``model-ID``.

    Args:
        logger: any one; others than W&B's are left alone.
        folder: of the run, with all its files.
        about: what the artifact's metadata say.
    """
    if not isinstance(logger, WandbLogger) or not logger._log_model:
        return
    import wandb

    name = next((name for name in _NETWORKS if (folder / f"{name}.safetensors").is_file()), None)
    if name is None:
        return
    artifact = wandb.Artifact(f"{name}-{logger.experiment.id}", type="model", metadata=dict(about))
    for file in (f"{name}.safetensors", CONFIG, SUMMARY):
        if (folder / file).is_file():
            artifact.add_file(str(folder / file), name=file)
    logger.experiment.log_artifact(artifact, aliases=["best", "latest"])
