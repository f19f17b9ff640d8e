"""What a folder of a user holds, and what of it a network can be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

from lqkd.data import ImageFolder
from lqkd.data.class_folders import SUFFIXES, has_folders, shown_files
from lqkd.errors import UsageError

_LOOKED_AT = 100
"""Images whose sizes are read."""
_FILES = 10_000
"""Files that are looked through for what a folder holds."""
_TEXT = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
_NEEDED = "give a folder with one folder of images per class (CLASS/IMAGE), or train/, val/ and test/ with these"


@dataclass(frozen=True)
class Photographs:
    """A folder with a folder of images for each class.

    Attributes:
        root: the folder.
        classes: their names, in the order of the labels.
        train: number of images to train on.
        val: to validate with.
        test: to test with.
        side: median of the shorter sides of some images, in pixels.
    """

    root: Path
    classes: tuple[str, ...]
    train: int
    val: int
    test: int
    side: int


def look_at(root: Path) -> Photographs:
    """What ``root`` holds, as :class:`~lqkd.data.ImageFolder` reads it; images are not decoded.

    Raises:
        UsageError: when it holds something else, which is said, or a class has too few images.
    """
    other = _something_else(root)
    if other is not None:
        raise UsageError(f"{str(root)!r} {other}")
    data = ImageFolder(root=str(root), image_size=1)
    super(ImageFolder, data).setup("fit")  # which does not tell the numbers: who asked does
    images = data._loaded()
    files = [root / name for name in data.test_files()]
    sides = [side for path in files[:: -(-len(files) // _LOOKED_AT)] if (side := _shorter_side(path))]
    counts = len(data.train_indices), len(data.val_indices), len(images.test_labels)
    return Photographs(root, data.class_names, *counts, side=int(median(sides)) if sides else 224)


def _shorter_side(path: Path) -> int | None:
    """In pixels; None of a damaged file, which the training refuses by its name."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception:  # Pillow raises many types
        return None


def _something_else(root: Path) -> str | None:
    """What ``root`` holds where that is no folder of classes, and what there is for it; None where it may be one."""
    boxes = next(_of_boxes(root), None)
    if boxes is not None:
        return f"is a data set of boxes ({boxes}), and there is no task for boxes yet: {_NEEDED}"
    whole = root / "train" if has_folders(root / "train") else root
    if (whole / "images").is_dir() and (whole / "masks").is_dir():
        return (
            "holds images with masks, which this does not train yet: fit does, with lqkd.data.SegmentationFolder and "
            "lqkd.tasks.Segmentation"
        )
    if has_folders(root) and any(_are_images(root)):
        return None
    files = list(islice(shown_files(str(root)), _FILES))
    images = sum(name.lower().endswith(SUFFIXES) for name in files)
    texts = sum(name.lower().endswith(_TEXT) for name in files)
    if texts and not images:
        return f"holds text ({Path(files[0]).name}) and no image, and there is no task for text yet: {_NEEDED}"
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
    for folder in (root, root / "annotations"):
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            with open(path, encoding="utf-8", errors="replace") as stream:
                begins = stream.read(1 << 16)
            if any(f'"{key}"' in begins for key in ("annotations", "categories", "licenses")):
                yield f"COCO's {path.relative_to(root)}"
    for labels in (root / "labels", root / "train" / "labels"):
        if labels.is_dir() and any(labels.rglob("*.txt")):
            yield f"YOLO's {labels.relative_to(root)}"
