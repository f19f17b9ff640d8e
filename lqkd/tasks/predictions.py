"""What a task predicts, by sample: as a tensor, and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.tasks.base import Task
from lqkd.utils.files import atomic_path

MOST_OF_A_MASK = 255
"""The largest class that a grey image of 8 bits can hold."""


def by_sample(task: Task, predictions: Any, samples: int) -> Tensor:
    """``predictions``, once they are a tensor (B, ...) for so many samples.

    Raises:
        UsageError: when they are none.
    """
    if isinstance(predictions, Tensor) and predictions.ndim > 0 and len(predictions) == samples:
        return predictions
    shape = "x".join(map(str, predictions.shape)) or "()" if isinstance(predictions, Tensor) else ""
    found = f"a tensor of shape {shape} for {samples} samples" if shape else f"a {type(predictions).__name__}"
    raise UsageError(
        f"task {type(task).__name__} predicts {found}: predict needs a tensor (B, ...) of its method "
        "predictions(outputs, batch)"
    )


def write_array(prediction: Tensor, folder: Path, stem: str) -> Path:
    """Write what was predicted for one sample: classes (H, W) as a grey image, everything else as it is.

    Returns:
        ``folder/stem.png`` or ``folder/stem.npy``, float32 where it was float64.
    """
    values = prediction.numpy()
    mask = values.ndim == 2 and values.dtype.kind in "iu" and values.min() >= 0 and values.max() <= MOST_OF_A_MASK
    path = folder / f"{stem}{'.png' if mask else '.npy'}"
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        if mask:
            from PIL import Image

            Image.fromarray(values.astype(np.uint8)).save(stream, "PNG")
        else:
            np.save(stream, values.astype(np.float32) if values.dtype == np.float64 else values)
    return path
