"""Anyone's own images with boxes in COCO's JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lqkd.data.boxes import Boxed
from lqkd.data.coco_json import Coco, read_coco
from lqkd.data.detection import DetectionFolder
from lqkd.errors import UsageError

_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_EXPORTED = "_annotations.coco.json"
"""What Roboflow calls the file of a part."""


class CocoDetection(DetectionFolder):
    """A folder of images with boxes in COCO's JSON, for the task :class:`~lqkd.tasks.Detection`.

    What ``root`` holds decides what a network is trained, selected and tested on:

    ==================================================  ==========================================================
    ``annotations/instances_NAME.json`` and ``NAME/``   as COCO is, with NAME such as ``train2017``, ``val2017``
    ``train/_annotations.coco.json``, ``valid/``, ...   beside the images, as Roboflow exports
    ``annotations.json`` and ``images/``                ``test_fraction`` for testing, ``validation_fraction`` of the
                                                        others for validation
    ==================================================  ==========================================================

    With train and only one other part, this is for testing. Classes are the categories in the order of their numbers.

    Args:
        root: Folder as above.
        test_fraction: Share of all images held out for testing where root has no parts, in (0, 1).
        leave_out_empty: Whether boxes without an area are left out, with a warning; otherwise they are refused.
        settings: Those of :class:`~lqkd.data.DetectionDataModule`.

    Raises:
        UsageError: when a setting is out of range, a file cannot be read or says what cannot be, a box lies outside of
            its image, has swapped corners or no area, parts differ in their classes, or no image has an object.
    """

    def __init__(
        self, *, root: str, test_fraction: float = 0.2, leave_out_empty: bool = False, **settings: Any
    ) -> None:
        super().__init__(root=root, test_fraction=test_fraction, leave_out_empty=leave_out_empty, **settings)

    def annotated(self) -> tuple[dict[str, list[Boxed]], tuple[str, ...], list[str]]:
        read = {part: (file, read_coco(file, images)) for part, (file, images) in self._files().items()}
        (first_file, first), *others = read.values()
        for file, coco in others:
            if coco.names != first.names:
                raise UsageError(
                    f"{first_file} has the categories {', '.join(map(repr, first.names))}, and {file} "
                    f"{', '.join(map(repr, coco.names))}: they must be the same"
                )
        if not first.names:
            raise UsageError(f"{first_file} has no category: there is nothing to find.")
        every: list[Coco] = [coco for _, coco in read.values()]
        empty = [told for coco in every for told in coco.empty]
        return {part: coco.boxed for part, (_, coco) in read.items()}, first.names, empty

    def _files(self) -> dict[str, tuple[Path, Path]]:
        """By part its JSON file and the folder of its images."""
        if (self.root / "annotations.json").is_file():
            return {"all": (self.root / "annotations.json", self.root / "images")}
        found: dict[str, tuple[Path, Path]] = {}
        for file in sorted((self.root / "annotations").glob("instances_*.json")):
            name = file.stem.removeprefix("instances_")
            self._add(found, name.rstrip("0123456789"), file, self.root / name)
        for file in sorted(self.root.glob(f"*/{_EXPORTED}")):
            self._add(found, file.parent.name, file, file.parent)
        if not found:
            raise UsageError(
                f"root={self.root} has neither annotations.json, nor annotations/instances_NAME.json, nor "
                f"train/{_EXPORTED}: give a folder in one of these forms."
            )
        return found

    def _add(self, found: dict[str, tuple[Path, Path]], name: str, file: Path, images: Path) -> None:
        part = _PARTS.get(name)
        if part is None:
            raise UsageError(f"{file} is of a part {name!r}: the parts are {', '.join(_PARTS)}.")
        if part in found:
            raise UsageError(f"{found[part][0]} and {file} are both for {part!r}: keep one of them.")
        found[part] = (file, images)
