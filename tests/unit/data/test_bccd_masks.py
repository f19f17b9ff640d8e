"""Boxes of blood cells become masks of ellipses."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from benchmarks.bccd_masks import CLASSES, mask_of

CELL = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
).format


def test_a_cell_is_the_ellipse_in_its_box_and_platelets_lie_on_top() -> None:
    cells = [CELL("Platelets", 20, 12, 24, 16), CELL("RBC", 5, 5, 45, 25), CELL("WBC", 7, 7, 7, 9)]
    mask = np.asarray(mask_of(ElementTree.fromstring(f"<annotation>{''.join(cells)}</annotation>"), (60, 40)))
    red, platelets = (mask == CLASSES.index("RBC"), mask == CLASSES.index("Platelets"))
    assert abs(int(red.sum() + platelets.sum()) - np.pi * 20.5 * 10.5) < 20
    assert not mask[5, 5]
    assert mask[14, 22] == CLASSES.index("Platelets")
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 25, 5, 45)
    assert not (mask == CLASSES.index("WBC")).any()  # a box without an area
