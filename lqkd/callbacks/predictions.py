"""What a network says of every image of a split, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.tasks import Classification
from lqkd.utils.tables import write_csv

COLUMNS = ("index", "file", "label", "class", "confidence")


class Predictions(Callback):
    """Keeps the winning class of each image that ``trainer.predict`` asks about, with its label where that is known.

    Labels and positions are those of the batches (images, labels, indices, ...); positions count up where a batch has
    none.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, int | None, int, float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        task = getattr(pl_module, "task", None)
        if task is not None and not isinstance(task, Classification):
            raise UsageError(f"predict writes classes of images, which task {type(task).__name__} does not tell")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        confidence, winner = outputs.max(dim=1)
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        indices = getattr(batch, "indices", None)
        positions = range(len(self.rows), len(self.rows) + len(winner)) if indices is None else indices.tolist()
        known: list[int | None] = [None] * len(winner)
        if isinstance(labels, Tensor) and labels.numel() == len(winner):  # a negative number says that there is none
            known = [label if label >= 0 else None for label in labels.flatten().tolist()]
        self.rows += zip(positions, known, winner.tolist(), confidence.tolist(), strict=True)

    def write(self, target: Path, names: Sequence[str], files: Sequence[str]) -> None:
        """Write the table; classes by name and images by file as far as these are known, escaped for CSV."""

        def name(label: int | None) -> Any:
            return names[label] if names and label is not None else label

        rows = [
            (index, files[index] if files else None, name(label), name(winner), f"{confidence:.6f}")
            for index, label, winner, confidence in self.rows
        ]
        write_csv(target, [dict(zip(COLUMNS, row, strict=True)) for row in rows], COLUMNS)
        right = [label == winner for _, label, winner, _ in self.rows if label is not None]
        told = f", {sum(right)} of them right" if right else ""
        print(f"{len(self.rows)} predictions written to {target}{told}")
