"""Annotations of boxes in VOC's XML, a file for each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from lqkd.data.boxes import Boxed, check_inside, check_sides, empty_box
from lqkd.data.class_folders import SUFFIXES
from lqkd.errors import UsageError, first_line

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Voc(NamedTuple):
    """What several files say."""

    boxed: list[Boxed]
    empty: list[str]
    """What is said of the boxes without an area, which are left out."""


class Found(NamedTuple):
    """One file, read: classes by name still."""

    image: str
    annotation: str
    objects: list[tuple[str, list[float]]]
    size: tuple[int, int] | None
    """Width and height as the annotation says, where it does."""


def read_voc(root: Path, names: Sequence[str] | None) -> list[Found]:
    """Read ``Annotations/NAME.xml`` for the images ``JPEGImages/NAME.*`` of a folder, all of them or those of a list.

    Args:
        root: the folder.
        names: of the images, without an ending; None for all images.

    Raises:
        UsageError: when an image has no annotation, an annotation no image or several of the same name, or one cannot
            be read.
    """
    for folder in ("JPEGImages", "Annotations"):
        if not (root / folder).is_dir():
            raise UsageError(f"{root} has no folder {folder!r}: VOC's sets have JPEGImages and Annotations.")
    images: dict[str, Path] = {}
    for path in sorted((root / "JPEGImages").iterdir()):
        if path.suffix.lower() in SUFFIXES:
            other = images.setdefault(path.stem, path)
            if other != path:
                raise UsageError(f"{other} and {path} have the same annotation: images need different names.")
    if names is None:
        for path in sorted((root / "Annotations").glob("[!.]*.xml")):
            if path.stem not in images:
                raise UsageError(f"annotation {path} has no image in {root / 'JPEGImages'}.")
    found = []
    for name in sorted(images) if names is None else names:
        if name not in images:
            raise UsageError(f"{root / 'JPEGImages'} has no image {name!r}, which {root / 'ImageSets'} lists.")
        annotation = root / "Annotations" / f"{name}.xml"
        if not annotation.is_file():
            raise UsageError(f"image {images[name]} has no annotation: {annotation} does not exist.")
        found.append(Found(str(images[name]), str(annotation), *_read(annotation)))
    return found


def boxed_voc(found: Sequence[Found], classes: Sequence[str]) -> Voc:
    """The same with numbers of classes.

    Raises:
        UsageError: when a class is none of ``classes``, or a box has swapped corners or lies outside.
    """
    labels = {name: label for label, name in enumerate(classes)}
    boxed, empty = [], []
    for image, annotation, objects, size in found:
        kept = []
        for name, box in objects:
            if name not in labels:
                raise UsageError(
                    f"{annotation} has an object {name!r}: the classes are {', '.join(map(repr, classes))}."
                )
            if check_sides(box, name, annotation):
                if size is not None:
                    check_inside(box, name, size, image, annotation)
                kept.append((box, labels[name]))
            else:
                empty.append(empty_box(box, name, annotation))
        corners = np.array([box for box, _ in kept], np.float32).reshape(-1, 4)
        boxed.append(Boxed(image, corners, np.array([label for _, label in kept], np.int64), annotation))
    return Voc(boxed, empty)


def _read(path: Path) -> tuple[list[tuple[str, list[float]]], tuple[int, int] | None]:
    """The objects of a file, and the size of its image."""
    try:
        root = ElementTree.parse(path).getroot()
        objects = []
        for one in root.iter("object"):
            told = {side: one.findtext(f"bndbox/{side}") for side in _SIDES}
            name = (one.findtext("name") or "").strip()
            missing = [side for side, value in told.items() if value is None]
            if not name or missing:
                what = f"{name!r} without {missing[0]} in its bndbox" if name else "without a name"
                raise UsageError(f"annotation {path} has an object {what}.")
            objects.append((name, [_number(str(value), side, name, path) for side, value in told.items()]))
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
        return objects, (width, height) if min(width, height) > 0 else None
    except UsageError:
        raise
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UsageError(f"annotation {path} cannot be read: {first_line(error)}.") from error


def _number(text: str, side: str, name: str, path: Path) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"annotation {path} has an object {name!r} whose {side}, {text!r}, is no number.") from None
