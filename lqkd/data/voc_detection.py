"""Anyone's own images with boxes in VOC's XML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lqkd.data.boxes import Boxed
from lqkd.data.detection import DetectionFolder
from lqkd.data.voc_xml import boxed_voc, read_voc
from lqkd.errors import UsageError


class VocDetection(DetectionFolder):
    """A folder of images with boxes in VOC's XML, for the task :class:`~lqkd.tasks.Detection`.

    The boxes of ``JPEGImages/NAME.jpg`` are in ``Annotations/NAME.xml``. Where ``ImageSets/Main`` has ``train.txt`` and
    one of ``val.txt`` and ``test.txt``, they list the names of each part; other images are left alone. With train and
    only one other part, this is for testing. Elsewhere ``test_fraction`` of the images are for testing and
    ``validation_fraction`` of the others for validation. Sides are taken as they are. Objects that are marked as
    difficult are objects.

    Args:
        root: Folder with JPEGImages and Annotations.
        classes: Names of the classes 0, 1, ...; null means all names that occur, sorted.
        test_fraction: Share of all images held out for testing where root has no parts, in (0, 1).
        leave_out_empty: Whether boxes without an area are left out, with a warning; otherwise they are refused.
        settings: Those of :class:`~lqkd.data.DetectionDataModule`.

    Raises:
        UsageError: when a setting is out of range, an image has no annotation, a file cannot be read, an object is of
            no class, a box lies outside of its image, has swapped corners or no area, or no image has an object.
    """

    def __init__(
        self,
        *,
        root: str,
        classes: Sequence[str] | None = None,
        test_fraction: float = 0.2,
        leave_out_empty: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(root=root, test_fraction=test_fraction, leave_out_empty=leave_out_empty, **settings)
        if classes is not None and (isinstance(classes, str) or not classes or len(set(classes)) < len(classes)):
            raise UsageError(f"classes={classes!r} is not accepted: it must be different names.")
        self.classes = None if classes is None else tuple(classes)

    def annotated(self) -> tuple[dict[str, list[Boxed]], tuple[str, ...], list[str]]:
        lists = {part: self.root / "ImageSets" / "Main" / f"{part}.txt" for part in ("train", "val", "test")}
        listed = {part: file.read_text(encoding="utf-8").split() for part, file in lists.items() if file.is_file()}
        read = {part: read_voc(self.root, names) for part, names in listed.items()}
        if not listed:
            read = {"all": read_voc(self.root, None)}
        occurring = {name for part in read.values() for one in part for name, _ in one.objects}
        names = tuple(sorted(occurring)) if self.classes is None else self.classes
        voc = {part: boxed_voc(found, names) for part, found in read.items()}
        return {part: of.boxed for part, of in voc.items()}, names, [told for of in voc.values() for told in of.empty]
