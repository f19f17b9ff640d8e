"""What is asked of a distillation from a folder; read and checked without PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lqkd.errors import UsageError
from lqkd.utils.files import write_text
from lqkd.utils.yaml_text import load_yaml

ASKED = "distill.yaml"
"""The file of a folder that says what was asked for."""
PRETRAINED = "pretrained"
"""Weights that a network's library publishes."""
_NEEDS = {"onnx": "export", "onnxruntime": "export", "jinja2": "report"}


@dataclass(frozen=True)
class Asked:
    """The settings of :func:`lqkd.pipelines.distill_folder`, which says what they mean; None is chosen by the data.

    Raises:
        UsageError: when one is not possible.
    """

    folder: str
    student: str | None
    bits: str | None
    teacher: str | None
    student_weights: str | None
    teacher_weights: str | None
    epochs: int | None
    image_size: int | None
    batch_size: int | None

    def __post_init__(self) -> None:
        root = Path(self.folder).expanduser()
        if not root.is_dir():
            what = "is no folder" if root.exists() else "does not exist"
            raise UsageError(
                f"{self.folder!r} {what}: give a folder of images by class, with masks or boxes, or of texts"
            )
        for name in ("epochs", "image_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UsageError(f"{name}={value!r} is not possible: it must be a whole number of at least 1")
        if self.teacher is None and self.teacher_weights is not None:
            raise UsageError(
                f"teacher_weights={self.teacher_weights!r} has no effect without a teacher: name its network; the "
                "student's own float network, which teaches otherwise, has student_weights"
            )
        missing = [name for name in _NEEDS if find_spec(name) is None]
        if missing:
            raise UsageError(f"distill needs {missing[0]}: pip install 'lqkd[{_NEEDS[missing[0]]}]'")

    def place(self, out: str | Path | None) -> Path:
        """The folder for all of it, absolute; None for one in ``runs`` named after the folder and the student."""
        if out is not None:
            return Path(out).expanduser().resolve()
        parts = (Path(self.folder).resolve().name, self.student or "", self.bits or "")
        name = "_".join("".join(c if c.isalnum() or c in "-._" else "_" for c in part) for part in parts)
        return Path("runs", name).resolve()

    def _kept(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(Path(self.folder).expanduser().resolve())}

    def write(self, folder: Path) -> None:
        """Keep what was asked for."""
        write_text(folder / ASKED, yaml.safe_dump(self._kept(), sort_keys=False))

    def begun_in(self, folder: Path) -> bool:
        """Whether ``folder`` has what this began there.

        Raises:
            UsageError: when it holds something else, or was begun with other settings.
        """
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        if not (folder / ASKED).is_file():
            raise UsageError(f"out={str(folder)!r} holds something else: give a new or empty folder")
        before: Any = load_yaml((folder / ASKED).read_text(encoding="utf-8"), str(folder / ASKED))
        before = before if isinstance(before, dict) else {}
        before.setdefault("folder", before.get("photographs"))  # as it was called
        for name, now in self._kept().items():
            if before.get(name) != now:
                raise UsageError(
                    f"out={str(folder)!r} was begun with {name}={before.get(name)!r}, and now it is {now!r}: give "
                    "another out, or the same settings to go on"
                )
        return True
