"""What a network says of every sample of a split, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lqkd.errors import UsageError
from lqkd.tasks import BoxDetection, Inputs, Task
from lqkd.tasks.predictions import by_sample, write_array
from lqkd.tasks.scenes import scenes_of
from lqkd.utils.tables import write_csv


class Predictions(Callback):
    """Keeps what the task tells of each sample that ``trainer.predict`` asks about; see :meth:`lqkd.tasks.Task.table`.

    Positions are those of the batches' attribute ``indices``; they count up where a batch has none. Images with objects
    are drawn, with boxes.

    Args:
        task: what the network was trained for.
        folder: for files of predictions that are arrays; made where there are any.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.names: Sequence[str] = ()
        self.positions: list[int] = []
        self.rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what the data call the classes, once they are set up."""
        self.names = getattr(trainer.datamodule, "class_names", ())  # type: ignore[attr-defined]

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        samples, first = len(Inputs.of(self.task.inputs(batch))), len(self.rows)
        rows = self.task.table(outputs, batch, self.names)
        if rows is None:
            arrays = enumerate(by_sample(self.task, outputs, samples).cpu(), first)
            written = [write_array(array, self.folder, f"{number:06d}") for number, array in arrays]
            rows = [{"output": f"{self.folder.name}/{path.name}"} for path in written]
        elif len(rows) != samples:
            raise UsageError(
                f"task {type(self.task).__name__} makes a table of {len(rows)} rows for {samples} samples: its method "
                "table(predictions, batch, names) must make one for each"
            )
        indices = getattr(batch, "indices", None)
        positions = range(first, first + samples) if indices is None else indices.tolist()
        if isinstance(self.task, BoxDetection):
            self.names = self.names or self.task.names
            for row, picture in zip(rows, self._pictures(trainer, outputs, batch, positions), strict=True):
                row["picture"] = picture
        self.positions += positions
        self.rows += rows

    def _pictures(self, trainer: Trainer, objects: Any, batch: Any, positions: Sequence[int]) -> Iterator[str]:
        """Write each image of a batch with boxes around its objects, and say where, beside the table."""
        from lqkd.tasks.object_pictures import drawn_over, pixels_of
        from lqkd.utils.figures import write_image

        data = trainer.datamodule  # type: ignore[attr-defined]
        images = scenes_of(batch, 1).images
        photographs = pixels_of(images, getattr(data, "mean", ()), getattr(data, "std", ()))
        self.folder.mkdir(parents=True, exist_ok=True)
        for position, photograph, of_image in zip(positions, photographs, objects.cpu(), strict=True):
            picture = drawn_over(photograph, of_image, photograph.shape[:2], self.names)
            write_image(self.folder / f"{position:06d}.png", picture)
            yield f"{self.folder.name}/{position:06d}.png"

    def write(self, target: Path, files: Sequence[str]) -> None:
        """Write the table, escaped for CSV, with the name of each sample's file where ``files`` has them."""
        rows = [
            {"index": index, "file": files[index] if files else None, **row}
            for index, row in zip(self.positions, self.rows, strict=True)
        ]
        write_csv(target, rows)
        told = self.task.tally(self.rows)
        print(f"{len(rows)} predictions written to {target}{told and f', {told}'}")
