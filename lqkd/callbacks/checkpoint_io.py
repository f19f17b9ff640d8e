"""Checkpoints that are either whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lqkd.files import atomic_path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, then renames it.

    Lightning's own writes to the system's temporary folder, which may be on another file system, and then moves:
    a copy that can be interrupted half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            OSError: when the disk is full or the folder is not writable; an older file of that name is left as it was.
        """
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
