"""Boxes on photographs, looked for pixel by pixel."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb

from lqkd.utils.box_figures import Boxes, side_by_side, with_boxes
from lqkd.utils.figures import LIGHT, finding_of, pixels

GREY = np.full((480, 640, 3), 128, np.uint8)
BOX = np.array([[100.0, 120, 300, 360]])


def coloured(picture: np.ndarray, label: int) -> np.ndarray:
    """(H, W) where a picture has the colour of a class."""
    color = np.array(to_rgb(LIGHT.lines[label])) * 255
    return (np.abs(picture.astype(float) - color) < 2).all(-1)


def test_a_box_is_drawn_where_it_is_and_in_the_colour_of_its_class() -> None:
    drawn = coloured(with_boxes(GREY, Boxes(BOX, np.array([1])), ["a", "b"]), 1)
    assert drawn[200, 98:103].any()
    assert drawn[200, 298:303].any()
    assert drawn[358:363, 200].any()
    assert not drawn[200:300, 110:290].any()
    assert not coloured(with_boxes(GREY, Boxes(BOX, np.array([0])), ["a", "b"]), 1).any()


def test_what_is_not_there_has_a_dashed_box() -> None:
    whole, dashed = (
        coloured(with_boxes(GREY, Boxes(BOX, np.array([0]), right=np.array([right])), ["a"]), 0)[360, 100:300]
        for right in (True, False)
    )
    assert whole.all()
    assert 0.4 < dashed.mean() < 0.8


def test_a_small_photograph_is_enlarged_with_its_boxes() -> None:
    picture = with_boxes(GREY[:96, :128], Boxes(BOX / 5, np.array([0])), ["a"])
    assert picture.shape == (480, 640, 3)
    assert coloured(picture, 0)[200, 98:103].any()


def test_a_name_is_not_written_over_another_one() -> None:
    both = Boxes(np.repeat(BOX, 2, axis=0), np.array([0, 1]))
    alone = coloured(with_boxes(GREY, Boxes(BOX, np.array([0])), ["first", "second"]), 0)[:115]
    together = with_boxes(GREY, both, ["first", "second"])
    assert alone.sum() > 300  # above the box
    assert (coloured(together, 0)[:115] == alone).all()
    assert coloured(together, 1)[125:355, 110:290].sum() > 300  # within it


def test_photographs_beside_each_other_have_what_each_says_of_them() -> None:
    boxes = Boxes(BOX, np.array([0]))
    figure = side_by_side([GREY, GREY], {"there": [boxes] * 2, "found": [boxes] * 2}, ["$a$"], "Of 2 objects 2")
    assert finding_of(figure) == "Of 2 objects 2"
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["there", "found", "", ""]
    assert coloured(pixels(figure), 0).sum() > 100
