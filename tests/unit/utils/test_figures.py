"""The style of all figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from lqkd.utils import figures
from lqkd.utils.figures import DARK, LIGHT, End, Palette, apart, canvas, name_ends, pixels, svg

_TO_LMS = np.array([[0.31399, 0.63951, 0.04650], [0.15537, 0.75789, 0.08670], [0.01775, 0.10945, 0.87257]])
_SEEN = {  # Vienot, Brettel and Mollon (1999), of people without red or without green cones
    "protan": np.array([[0, 1.05118, -0.05116], [0, 1, 0], [0, 0, 1]]),
    "deutan": np.array([[1, 0, 0], [0.95131, 0, 0.04866], [0, 0, 1]]),
    "all": np.eye(3),
}


def _linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = np.cbrt(np.clip(xyz / [0.9505, 1, 1.089], 1e-4, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_stand_out_from_the_paper_and_from_each_other_whoever_looks(palette: Palette) -> None:
    paper = _linear(palette.paper) @ [0.2126, 0.7152, 0.0722]
    for color in (*palette.lines, palette.ink, palette.muted):
        level = _linear(color) @ [0.2126, 0.7152, 0.0722]
        assert (max(level, paper) + 0.05) / (min(level, paper) + 0.05) >= 3, color  # WCAG 1.4.11
    for seen in _SEEN.values():
        labs = [_lab(np.linalg.inv(_TO_LMS) @ seen @ _TO_LMS @ _linear(color)) for color in palette.lines]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(labs, 2)) > 15


def test_names_at_the_ends_of_lines_do_not_meet_and_stay_within_the_figure() -> None:
    figure, (axes,) = canvas("Three lines end in the same place", ["value"])
    for number in range(3):
        axes.plot([0, 1], [number, 1.0 + 0.001 * number])
    name_ends(axes, [End(f"a rather long name {n}", 1, 1.0 + 0.001 * n, figures.color(n)) for n in range(3)])
    _, width, _ = pixels(figure).shape
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert all(box.x1 <= width for box in boxes)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_title_of_two_lines_is_above_what_is_drawn(fitted: bool) -> None:
    figure, (axes,) = canvas(
        "A finding that takes more than one line because there is much to say of it", ["value"], fitted=fitted
    )
    pixels(figure)
    (title,) = figure.texts
    assert "\n" in title.get_text()
    assert title.get_window_extent().y0 >= axes.get_tightbbox().y1


def test_what_has_room_stays_where_it_is() -> None:
    assert apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])


def test_a_figure_turns_dark_where_its_reader_wants_that() -> None:
    figure, _ = canvas("A finding", ["value"])
    text = svg(figure)
    assert f'[style*="fill: {LIGHT.paper}"]{{fill:{DARK.paper}!important}}' in text
    assert f"fill: {LIGHT.paper}" in text.partition("</style>")[2]  # it is one of those that the rule is about
    with figures.drawn_in(DARK):
        dark, _ = canvas("A finding", ["value"])
    assert pixels(dark)[0, 0].tolist() == [round(255 * part) for part in to_rgb(DARK.paper)]
