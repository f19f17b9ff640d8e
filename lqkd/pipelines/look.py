"""What a folder of a user holds, and what of it a network can be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lqkd.data import CocoDetection, ImageFolder, SegmentationFolder, TextFiles, VocDetection
from lqkd.data.class_folders import SUFFIXES, has_folders, shown_files
from lqkd.data.detection import DetectionFolder
from lqkd.data.mask_files import read_mask
from lqkd.data.parts import folders_of_parts
from lqkd.errors import UsageError
from lqkd.pipelines.found import CONTEXT, Boxed, Found, Pairs, Photographs, Texts

_LOOKED_AT = 100
"""Images whose sizes are read."""
_MASKS = 1000
"""Masks whose numbers are read."""
_FILES = 10_000
"""Files that are looked through for what a folder holds."""
_READ = (".txt", ".md", ".jsonl")
"""Texts that :class:`~lqkd.data.TextFiles` reads, ..."""
_TEXT = (*_READ, ".csv", ".tsv", ".json", ".parquet", ".arrow")
"""... and all that are told from other files."""
_IGNORED = 255
"""What a mask has where a pixel belongs to no class."""
_NEEDED = (
    "give a folder with one folder of images per class (CLASS/IMAGE), with images/ and masks/, with boxes in VOC's or "
    f"COCO's form, or with texts ({', '.join(_READ)}), or train/, val/ and test/ with these"
)


def look_at(root: Path) -> Photographs | Pairs | Boxed | Texts:
    """What ``root`` holds, as the data modules read it; of images no more than some sizes, and all numbers of masks.

    Raises:
        UsageError: when it holds nothing that is trained, which is said, or too little of it.
    """
    boxes = next(_of_boxes(root), None)
    if boxes is not None:
        return _boxed(root, boxes)
    whole = root / "train" if has_folders(root / "train") else root
    if (whole / "images").is_dir() and (whole / "masks").is_dir():
        return _pairs(root)
    if has_folders(root) and any(_are_images(root)):
        return _photographs(root)
    files = list(islice(shown_files(str(root)), _FILES))
    images = sum(name.lower().endswith(SUFFIXES) for name in files)
    if not images and any(name.lower().endswith(_READ) for name in files):
        return _texts(root)
    other = _something_else(files, images)
    raise UsageError(f"{str(root)!r} {other}")


def kind_of(root: Path) -> type[Found]:
    """Of what kind the content of ``root`` is, as :func:`look_at` says, by the names of files alone."""
    if next(_of_boxes(root), None) is not None:
        return Boxed
    whole = root / "train" if has_folders(root / "train") else root
    if (whole / "images").is_dir() and (whole / "masks").is_dir():
        return Pairs
    names = [name.lower() for name in islice(shown_files(str(root)), _FILES)]
    texts = any(name.endswith(_READ) for name in names) and not any(name.endswith(SUFFIXES) for name in names)
    return Texts if texts else Photographs


def _photographs(root: Path) -> Photographs:
    data = ImageFolder(root=str(root), image_size=1)
    super(ImageFolder, data).setup("fit")  # which does not tell the numbers: who asked does
    files = [root / name for name in data.test_files()]
    sides = [side for path in _some(files, _LOOKED_AT) if (side := _shorter_side(path))]
    counts = len(data.train_indices), len(data.val_indices), len(data._loaded().test_labels)
    return Photographs(root, *counts, classes=data.class_names, side=int(median(sides)) if sides else 224)


def _pairs(root: Path) -> Pairs:
    listed = SegmentationFolder(root=str(root), classes=("0", "1"))._parts()
    masks = [read_mask(path) for path in _some([mask for _, part in listed.values() for mask in part], _MASKS)]
    seen = sorted({int(number) for mask in masks for number in np.unique(mask)})
    numbers = [number for number in seen if number != _IGNORED]
    if len(numbers) < 2:
        raise UsageError(
            f"{str(root)!r} has masks with the numbers {', '.join(map(str, seen))} only: a pixel has the "
            f"number of its class, 0, 1, ..., and {_IGNORED} where it belongs to none; at least two classes are needed"
        )
    classes = tuple(map(str, range(numbers[-1] + 1)))
    data = SegmentationFolder(root=str(root), classes=classes)
    super(SegmentationFolder, data).setup("fit")
    counts = len(data.train_indices), len(data.val_indices), len(data._loaded().test_labels)
    height, width = (int(median(mask.shape[axis] for mask in masks)) for axis in (0, 1))
    return Pairs(root, *counts, classes=classes, size=(height, width))


def _boxed(root: Path, form: str) -> Boxed:
    kind = VocDetection if form.startswith("VOC") else CocoDetection
    if form.startswith("YOLO"):
        raise UsageError(f"{str(root)!r} is a data set of boxes ({form}), which is not read: {_NEEDED}")
    _, _, empty = kind(root=str(root)).annotated()
    data: DetectionFolder = kind(root=str(root), leave_out_empty=bool(empty))
    super(DetectionFolder, data).setup("fit")
    counts = len(data.train_indices), len(data.val_indices), len(data._loaded().test_labels)
    files = [root / name for name in data.test_files()]
    sizes = [size for path in _some(files, _LOOKED_AT) if (size := _size(path))]
    height, width = (int(median(size[axis] for size in sizes)) if sizes else 224 for axis in (1, 0))
    names = data.class_names
    return Boxed(root, *counts, classes=names, size=(height, width), module=kind.__name__, empty=len(empty))


def _texts(root: Path) -> Texts:
    parts = {"root": str(root.resolve())}
    if has_folders(root) and (root / "train").is_dir():
        folders = folders_of_parts(root, "the texts")
        parts = {"root" if name == "train" else name: str(path.resolve()) for name, path in folders.items()}
    data = TextFiles(**parts, context=CONTEXT)  # type: ignore[arg-type]
    data.setup("fit")
    counts = len(data.train_indices), len(data._windows["val"]), len(data._windows["test"])
    return Texts(root, *counts, parts=parts)


def _some(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many, from everywhere."""
    return items[:: -(-len(items) // most)] if items else items


def _shorter_side(path: Path) -> int | None:
    """In pixels; None of a damaged file, which the training refuses by its name."""
    size = _size(path)
    return None if size is None else min(size)


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height in pixels, likewise."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises many types
        return None


def _something_else(files: Sequence[str], images: int) -> str:
    """What there is where nothing of it is trained, and what is needed."""
    texts = [name for name in files if name.lower().endswith(_TEXT)]
    if texts and not images:
        return f"holds text ({Path(texts[0]).name}) in files that are not read: {_NEEDED}"
    if images:
        return f"holds {images} images and no folder of a class, so that nothing says what they show: {_NEEDED}"
    return f"holds {len(files) or 'no'} files and no image ({', '.join(SUFFIXES)}): {_NEEDED}"


def _are_images(root: Path) -> Iterator[bool]:
    """True once an image is found in a folder of ``root``."""
    for entry in root.iterdir():
        if entry.is_dir() and not entry.name.startswith("."):
            yield from (True for name in shown_files(str(entry)) if name.lower().endswith(SUFFIXES))


def _of_boxes(root: Path) -> Iterator[str]:
    """The format of boxes around things in images, told by where its files lie."""
    if (root / "JPEGImages").is_dir() and (root / "Annotations").is_dir():
        yield "VOC's Annotations and JPEGImages"
    for form in (
        "*/_annotations.coco.json",
        "annotations.json",
        "annotations/instances_*.json",
    ):  # damaged ones as well
        for path in sorted(root.glob(form)):
            yield f"COCO's {path.relative_to(root)}"
    for folder in (root, root / "annotations"):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            with open(path, encoding="utf-8", errors="replace") as stream:
                begins = stream.read(1 << 16)
            if all(f'"{key}"' in begins for key in ("images", "annotations")) or '"bbox"' in begins:
                yield f"COCO's {path.relative_to(root)}"
    for labels in (root / "labels", root / "train" / "labels"):
        if labels.is_dir() and any(labels.rglob("*.txt")) and labels.with_name("images").is_dir():
            yield f"YOLO's {labels.relative_to(root)}"
