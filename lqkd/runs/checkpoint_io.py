"""Checkpoints that are either whole or absent, whatever kills the process that writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lqkd.errors import UsageError, first_line
from lqkd.utils.files import atomic_path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint; tensors are read once they are used.

    Raises:
        UsageError: when the file is damaged or none of a training.
    """
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(path)!r} is not a checkpoint that can be read ({first_line(error)})") from error
    return dict(checkpoint)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their final name and renamed.

    Lightning's own way goes through the system's temporary folder, which is often on another file system; its move
    into place is then a copy that can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; a file that is there already stays as it is until the new one is whole.

        Raises:
            TypeError: when ``storage_options`` are given; there are none.
            OSError: when the disk is full or the folder is not writable. The old file is untouched.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r} is not possible: {type(self).__name__} has none")
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as stream:
                torch.save(checkpoint, stream)
        except (RuntimeError, OSError) as error:
            # torch hides that of a full disk behind one about its zip file; the stream, at its end, gives no name
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """What :meth:`save_checkpoint` has written, on the CPU; optimizers move their state to its parameters.

        Lightning's default is a function, which PyTorch refuses for the tensors of optimizers with a state of 8 bits.
        """
        return super().load_checkpoint(path, map_location, weights_only)
