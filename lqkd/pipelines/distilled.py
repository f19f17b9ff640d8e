"""What a distillation has made, and what can be done with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningDataModule, Trainer
from torch import nn

from lqkd.errors import UsageError
from lqkd.modules import DistillModule
from lqkd.pipelines.loaders import batches, has
from lqkd.runs.folder import SUMMARY
from lqkd.runs.summary import best_state
from lqkd.tasks import Inputs, Task
from lqkd.tasks.values import name_of, shown

CALIBRATION_BATCHES = 8
"""Training batches for grids that training left out."""
COMPARED = 32
"""Samples for the comparison layer by layer."""


@dataclass(frozen=True)
class Distilled:
    """A trained low-bit student, with the teacher and the data of its training until it is let go of.

    Attributes:
        network: the student of the best checkpoint, in eval mode and on the CPU, ready to be called.
        summary: content of the run's ``summary.json``: ``metric``, ``teacher``, ``student_float``, ``student_start``
            (quantised and not yet trained), ``val``, ``test``, ``packed_bytes``, ``float_bytes``, ...
        folder: of the run, with metrics, checkpoints, pictures and ``student.safetensors``.
        task: what it was trained for.
        module: the :class:`~lqkd.DistillModule` that has trained it.
    """

    network: nn.Module
    summary: dict[str, Any]
    folder: Path
    task: Task
    module: DistillModule = field(repr=False)
    _trainer: Trainer = field(repr=False)

    @classmethod
    def of(cls, module: DistillModule, trainer: Trainer, folder: Path) -> Distilled:
        """What a finished training has made."""
        network = module.product().cpu()
        state = best_state(trainer, "student")
        if state is not None:
            network.load_state_dict(state)
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        return cls(network.eval(), summary, folder, module.task.cpu(), module, trainer)

    def __repr__(self) -> str:
        metric = self.summary["metric"]
        known = {"teacher": "teacher", "student_float": "in float", "val": "student on validation", "test": "on test"}
        measured = {said: self.summary[key] for key, said in known.items() if self.summary[key] is not None}
        values = [f"{said} {shown(metric, value)}" for said, value in measured.items()]
        bits = f"W{self.summary['weight_bits']} A{self.summary['activation_bits']}"
        return f"Distilled({bits}, {name_of(metric)}: {', '.join(values) or 'not measured'}; {self.folder})"

    def export(
        self,
        path: str | Path | None = None,
        *,
        format: str = "portable",
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the student as a file, or a folder of files, once it is proven that the file computes the same.

        The file and PyTorch are compared layer by layer, and by their answers on the test split, or the validation
        split where there is no other. Of several processes the first one writes; the others do not wait for it.

        Args:
            path: the file; None for ``student.onnx`` in the run's folder, ``student.FORMAT.onnx`` of other formats,
                ``student.tflite``, ``student.pte``, ``student.pt2``, ``student.gguf``, or the folders ``student.ncnn``
                and ``student.compressed-tensors``.
            format: ``portable``, ``packed4``, ``packed2``, ``qonnx``, ``openvino``, ``tensorrt``, ``power_of_two``,
                ``litert``, ``executorch``, ``coreml``, ``ncnn``, ``torch``, ``gguf``, ``nbits`` or
                ``compressed-tensors``: see ``docs/export.md``.
            overwrite: whether a file that is there is replaced.
            about: what the file shall also say about itself, JSON values, such as ``{"class_names": [...]}``.

        Returns:
            The file.

        Raises:
            UsageError: when the file is there already, there is no format like that, or the network cannot be exported.
            ParityError: when the file computes something else; nothing has its name then.
        """
        from lqkd.export import require

        require()
        from lqkd.export import to_coreml, to_executorch, to_litert, to_ncnn, to_onnx
        from lqkd.export.api import write_program
        from lqkd.export.command import told_of_data
        from lqkd.export.coreml_writer import COREML
        from lqkd.export.executorch_writer import EXECUTORCH
        from lqkd.export.formats import FOLDERS, FORMATS, TORCH, check_folder_name, check_format, file_name
        from lqkd.export.gguf_command import tokenizer_of, write_gguf
        from lqkd.export.gguf_file import GGUF
        from lqkd.export.litert import LITERT
        from lqkd.export.nbits import NBITS
        from lqkd.export.nbits_command import write_nbits
        from lqkd.export.ncnn_writer import NCNN
        from lqkd.export.pack_quantized import COMPRESSED
        from lqkd.export.pack_quantized_command import write_compressed_tensors

        if format not in FORMATS:
            raise UsageError(f"format={format!r} is not possible here: use one of {', '.join(FORMATS)}")
        check_format(format)
        target = self.folder / file_name(format) if path is None else Path(path)
        if format in FOLDERS:
            check_folder_name(target, format)
        elif target.is_dir():
            raise UsageError(f"{str(target)!r} is a folder: give a file name")
        if target.exists() and not overwrite:
            raise UsageError(f"{str(target)!r} exists: give overwrite=True, or another path")
        if not self._trainer.is_global_zero:
            return target
        calibration = [self._inputs(batch) for batch in islice(self._batches("train"), CALIBRATION_BATCHES)]
        split = next((split for split in ("test", "val") if has(self._data, split)), None)
        judged = () if split is None else islice(self._batches(split), 1)
        example = Inputs.joined([*map(self._inputs, judged), *calibration]).part(slice(COMPARED))
        if format in (GGUF, NBITS, COMPRESSED):
            test = () if split is None else self._batches(split)
            about = {"data": type(self._data).__name__} | dict(about or {})
            given = (self.network, target, example, test, split or "train", self.task, about)
            if format == NBITS:
                write_nbits(*given)
            else:
                write = write_gguf if format == GGUF else write_compressed_tensors
                write(*given, tokenizer_of(self._data, self.network))
            return target
        others: dict[str, Callable[..., Any]] = {
            LITERT: to_litert,
            EXECUTORCH: to_executorch,
            COREML: to_coreml,
            NCNN: to_ncnn,
            TORCH: write_program,
        }
        others.get(format, partial(to_onnx, format=format))(
            self.network,
            example,
            target,
            calibration=calibration,
            test=None if split is None else self._batches(split),
            about=told_of_data(self._data, example) | dict(about or {}),
            task=self.task,
        )
        return target

    def report(self) -> Path:
        """Write ``report.html``, one page that needs no network, into the run's folder; the first process does.

        Returns:
            The page.

        Raises:
            UsageError: when jinja2 is missing.
        """
        from lqkd.studies.report import HTML, report

        return report(self.folder) if self._trainer.is_global_zero else self.folder / HTML

    @property
    def _data(self) -> LightningDataModule:
        return cast(LightningDataModule, self._trainer.datamodule)  # type: ignore[attr-defined]

    def _batches(self, split: str) -> Iterator[Any]:
        return batches(self._data, split, self._trainer)

    def _inputs(self, batch: Any) -> Inputs:
        return self.module.inputs(batch)
