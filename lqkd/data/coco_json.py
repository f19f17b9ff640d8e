"""Annotations of boxes in COCO's JSON."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lqkd.data.boxes import Boxed, check_inside, check_sides, empty_box
from lqkd.data.class_folders import SUFFIXES, shown_files
from lqkd.errors import UsageError, first_line


class Coco(NamedTuple):
    """What one file says."""

    boxed: list[Boxed]
    names: tuple[str, ...]
    """Of the categories, in the order of their numbers."""
    empty: list[str]
    """What is said of the boxes without an area, which are left out."""


def read_coco(path: Path, images: Path) -> Coco:
    """Read a file of COCO's, ``images``, ``annotations`` and ``categories``; images without a box are scenes as well.

    Labels are places in the list of categories, sorted by their numbers. Regions of a crowd (``iscrowd``), which are no
    single object, are left out with a warning.

    Args:
        path: the JSON file.
        images: the folder in which its images lie.

    Raises:
        UsageError: when it cannot be read, lists something twice, an annotation is of no category or image
            that the file lists, a box has swapped corners or lies outside, or an image does not exist.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        images_said = [(int(image["id"]), str(image["file_name"])) for image in said["images"]]
        sizes = {
            int(image["id"]): (int(image.get("width") or 0), int(image.get("height") or 0)) for image in said["images"]
        }
        categories_said = [(int(one["id"]), str(one["name"])) for one in said["categories"]]
        annotations = list(said["annotations"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no file of COCO's annotations, with images, annotations and categories ({first_line(error)})."
        ) from error
    _refuse_twice([number for number, _ in images_said], "the image of number", path)
    _refuse_twice([name for _, name in images_said], "the image", path)
    _refuse_twice([number for number, _ in categories_said], "the category of number", path)
    _refuse_twice([name for _, name in categories_said], "the category", path)
    listed, categories = dict(images_said), dict(categories_said)
    numbers = sorted(categories)
    names = tuple(categories[number] for number in numbers)
    labels = {number: label for label, number in enumerate(numbers)}
    objects: dict[int, list[tuple[list[float], int]]] = {image: [] for image in listed}
    crowds, empty = 0, []
    for number, annotation in enumerate(annotations):
        image, label, box = _object(annotation, number, labels, listed, path)
        if annotation.get("iscrowd"):
            crowds += 1
        elif check_sides(box, names[label], f"{path} ({listed[image]})"):
            if min(sizes[image]) > 0:
                check_inside(box, names[label], sizes[image], listed[image], str(path))
            objects[image].append((box, label))
        else:
            empty.append(empty_box(box, names[label], f"{path} ({listed[image]})"))
    known = {Path(name).as_posix() for name in listed.values()}
    there = (Path(file).relative_to(images).as_posix() for file in shown_files(str(images)))
    unlisted = sorted(name for name in there if name.lower().endswith(SUFFIXES) and name not in known)
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        rank_zero_warn(f"left out {unlisted[0]}{more} in {images}: {path} lists no such image")
    if crowds:
        rank_zero_warn(
            f"{crowds} of {len(annotations)} boxes of {path} are crowds, no single objects: they are left out"
        )
    boxed = []
    for image, name in listed.items():
        file = images / name
        if not file.is_relative_to(images):
            raise UsageError(f"{path} lists the image {name}, which does not lie in {images}.")
        if not file.is_file():
            raise UsageError(f"image {file} does not exist, which {path} lists.")
        corners = np.array([box for box, _ in objects[image]], np.float32).reshape(-1, 4)
        boxed.append(Boxed(str(file), corners, np.array([label for _, label in objects[image]], np.int64), str(path)))
    return Coco(boxed, names, empty)


def _refuse_twice(listed: Sequence[int | str], what: str, path: Path) -> None:
    for value, times in Counter(listed).most_common(1):
        if times > 1:
            raise UsageError(f"{path} lists {what} {value!r} {times} times: list it once.")


def _object(
    annotation: Any, number: int, labels: dict[int, int], listed: dict[int, str], path: Path
) -> tuple[int, int, list[float]]:
    """Image, label and box xyxy of an annotation."""
    try:
        image, category = int(annotation["image_id"]), int(annotation["category_id"])
        x, y, width, height = (float(side) for side in annotation["bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} has an annotation without image_id, category_id or bbox of 4 numbers: entry {number} of the list, "
            f"{reprlib.repr(annotation)}."
        ) from error
    if image not in listed:
        raise UsageError(f"{path} has an annotation of image {image}, which it does not list.")
    if category not in labels:
        raise UsageError(
            f"{path} has an annotation of category {category} on {listed[image]}, and lists the categories "
            f"{', '.join(map(str, sorted(labels)))}."
        )
    return image, labels[category], [x, y, x + width, y + height]
