"""Photographs with boxes around what is there, or what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lqkd.utils import figures
from lqkd.utils.figures import LETTERS, LIGHT, WIDTH, colors, plain

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

PICTURE = "boxes.png"
"""What a detector finds beside what is there, in the folder of its run."""
_EACH = 8
"""Boxes of a photograph up to which each is named; of more, the first of each class."""
_SMALLEST = 640
"""Pixels of the longer side that a picture has at least, so that names can be read."""
_LETTERS = 1 / 36
"""Height of letters on a picture, in parts of its longer side."""
_WIDE = 1.55 * WIDTH
"""Of a figure with several panels, in inches."""
_TALLEST = 1.4
"""Height of a panel over its width, at most."""


class Boxes(NamedTuple):
    """The objects of one photograph.

    Attributes:
        corners: (N, 4) xyxy, in pixels of the photograph.
        labels: (N,) whole numbers from 0.
        scores: (N,) from 0 to 1, the surest first; None for what is there.
        right: (N,) whether an object is there, otherwise its box is dashed; None where that is not known.
    """

    corners: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any] | None = None
    right: np.ndarray[Any, Any] | None = None


def with_boxes(
    photograph: np.ndarray[Any, Any], found: Boxes, names: Sequence[str], letters: float = _LETTERS
) -> np.ndarray[Any, Any]:
    """A photograph with its boxes, each class in a colour, with its name and score.

    Args:
        photograph: (H, W, 3) or (H, W) uint8; a small one is enlarged.
        found: its objects.
        names: of the classes.
        letters: height of letters, in parts of the longer side.

    Returns:
        (H', W', 3) uint8.
    """
    height, width = photograph.shape[:2]
    factor = max(1.0, _SMALLEST / max(height, width))
    size = (round(width * factor), round(height * factor))
    picture = Image.fromarray(photograph).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw, unit = ImageDraw.Draw(picture), max(size)
    font, thick = _font(max(8, round(letters * unit))), max(2, round(unit / 250))
    sides = found.corners.astype(float) * ([size[0] / width, size[1] / height] * 2)
    named: set[int] = set()
    taken: list[tuple[float, ...]] = []
    for white in (True, False):  # below all boxes, so that they are seen on anything
        for number, box in enumerate(sides.tolist()):
            color = "white" if white else _color(found.labels[number])
            whole = found.right is None or bool(found.right[number])
            _outline(draw, box, color, thick + 2 * (thick // 2) * white, whole, 4 * thick)
    for number, box in enumerate(sides.tolist()):
        label = int(found.labels[number])
        if len(sides) <= _EACH or label not in named:
            named.add(label)
            score = "" if found.scores is None else f" {found.scores[number]:.2f}"
            taken.append(_name(draw, box, f"{names[label]}{score}", _color(label), font, size, taken))
    return np.asarray(picture)


def side_by_side(
    photographs: Sequence[np.ndarray[Any, Any]], columns: Mapping[str, Sequence[Boxes]], names: Sequence[str], told: str
) -> Figure:
    """A row for each photograph, a column for each who says what is on it.

    Args:
        photographs: (H, W, 3) or (H, W) uint8 each.
        columns: by the title of a column the objects on each photograph.
        names: of the classes.
        told: the title of all, a sentence without a full stop.
    """
    palette = colors()
    height, width = photographs[0].shape[:2]
    panel = _WIDE / len(columns) * min(_TALLEST, height / width)
    figure = Figure(
        figsize=(_WIDE, panel * len(photographs) + 0.9), dpi=150, layout="constrained", facecolor=palette.paper
    )
    grid = figure.subplots(len(photographs), len(columns), squeeze=False)
    letters = _LETTERS * len(columns) / 2  # a panel is small
    for number, (title, of_column) in enumerate(columns.items()):
        grid[0, number].set_title(plain(title), loc="left", fontsize=LETTERS, color=palette.muted)
        for row, (photograph, boxes) in enumerate(zip(photographs, of_column, strict=True)):
            axes = grid[row, number]
            axes.imshow(with_boxes(photograph, boxes, names, letters))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    figures.title(figure, told)
    return figure


def _color(label: Any) -> str:
    return LIGHT.lines[int(label) % len(LIGHT.lines)]


@cache
def _font(size: int) -> FreeTypeFont:
    """That of all figures."""
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _outline(draw: ImageDraw.ImageDraw, box: Sequence[float], color: str, thick: int, whole: bool, dash: int) -> None:
    """The four sides of a box, in dashes of a length unless ``whole``."""
    x1, y1, x2, y2 = box
    for start, end in ((x1, y1), (x2, y1)), ((x1, y2), (x2, y2)), ((x1, y1), (x1, y2)), ((x2, y1), (x2, y2)):
        for a, b in [(start, end)] if whole else _dashes(start, end, dash):
            draw.line([a, b], fill=color, width=thick)


def _dashes(
    start: tuple[float, float], end: tuple[float, float], length: float
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """Dashes of a line, with gaps of two thirds of their length."""
    (x1, y1), (x2, y2) = start, end
    whole = max(abs(x2 - x1), abs(y2 - y1))
    for at in np.arange(0.0, whole, length * 5 / 3):
        a, b = at / whole, min(1.0, (at + length) / whole)
        yield (x1 + a * (x2 - x1), y1 + a * (y2 - y1)), (x1 + b * (x2 - x1), y1 + b * (y2 - y1))


def _name(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    text: str,
    color: str,
    font: FreeTypeFont,
    size: tuple[int, int],
    taken: Sequence[tuple[float, ...]],
) -> tuple[float, ...]:
    """Write a name at its box, above, within or below, where the picture has room beside those that are written.

    Returns:
        Where it is, xyxy.
    """
    _, _, wide, tall = draw.textbbox((0, 0), text, font=font)
    pad = max(1, tall // 8)
    wide, tall = wide + 2 * pad, tall + 2 * pad
    x = min(max(0.0, box[0]), max(0.0, size[0] - wide))
    places = [(x, y, x + wide, y + tall) for y in (box[1] - tall, box[1], box[3] - tall, box[3])]
    within = [place for place in places if place[1] >= 0 and place[3] <= size[1]]
    free = (place for place in within if not any(_overlap(place, other) for other in taken))
    chosen = next(free, (within or places)[0])
    draw.rectangle(chosen, fill=color)
    draw.text((chosen[0] + pad, chosen[1] + pad), text, fill="white", font=font)
    return chosen


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
