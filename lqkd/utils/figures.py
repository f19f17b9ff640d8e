"""The style of every figure: sizes, colours, names beside what they name, and how a figure becomes a file.

A title says what was found, the line below it what is drawn and in which unit. Letters can still be read when a figure
is shown at half its size; colours are told apart by people who see fewer of them, and never alone: names stand beside
lines. Nothing here uses a display or matplotlib's global state.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from lqkd.utils.files import atomic_path

WIDTH, HEIGHT = 7.2, 4.4
"""Of a figure with one panel, in inches."""
TITLE, LETTERS, SMALL = 14.0, 12.0, 11.0
"""Sizes of letters, in points."""
_LEFT, _BELOW, _RIGHT = 0.78, 0.62, 0.25
"""Inches beside the panels of a figure that is not fitted: for numbers, for the name of an axis, and for nothing."""
_DPI = 150
_LINE_OF_TITLE = 60
"""Letters in a line of the title above one panel."""
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Palette:
    """Colours on one background.

    Attributes:
        paper, ink, muted, grid: of the background, of text, of what is said beside it, and of lines to read along.
        lines: of what is compared: after Okabe and Ito, "Color Universal Design" (2008), moved until all stand out
            from the paper and from each other for people without red or green cones too.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, ...]

    def flat(self) -> list[str]:
        """All of them."""
        *single, lines = astuple(self)
        return [*single, *lines]


LIGHT = Palette(
    "#ffffff", "#1f2328", "#57606a", "#d8dee4", ("#0072b2", "#d67000", "#00835a", "#a63d80", "#895d00", "#3d98c2")
)
DARK = Palette(
    "#0d1117", "#e6edf3", "#9aa4af", "#30363d", ("#5fb2ea", "#f28e53", "#39c596", "#d787bc", "#dab62c", "#9cd3f5")
)
_current = ContextVar("palette", default=LIGHT)


@contextmanager
def drawn_in(palette: Palette) -> Iterator[None]:
    """Draw figures in other colours than :data:`LIGHT` inside the block."""
    token = _current.set(palette)
    try:
        yield
    finally:
        _current.reset(token)


def colors() -> Palette:
    """Those to draw in."""
    return _current.get()


def color(number: int) -> str:
    """Of the ``number``-th of the things that are compared."""
    return colors().lines[number % len(LIGHT.lines)]


def line(number: int) -> dict[str, Any]:
    """Colour, dashes and mark of the ``number``-th line, as matplotlib's ``plot`` takes them."""
    dashes = _DASHES[number // len(LIGHT.lines) % len(_DASHES)]
    return {"color": color(number), "linestyle": dashes, "marker": marker(number), "markersize": 4.5, "linewidth": 1.8}


def marker(number: int) -> str:
    """Of the ``number``-th of the things that are compared."""
    return _MARKERS[number % len(_MARKERS)]


def shades(number: int) -> list[Any]:
    """So many colours of one kind, from pale to strong: for what comes one after the other."""
    palette = colors()
    mixed = LinearSegmentedColormap.from_list("shades", [palette.paper, palette.lines[0]])
    return [mixed(0.35 + 0.65 * (i + 1) / number) for i in range(number)]


# ---- a figure


def canvas(
    finding: str, drawn: Sequence[str] = ("",), height: float = HEIGHT, fitted: bool = False, rows: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure with a title and panels beside each other.

    Args:
        finding: what is to be seen, as a sentence without a full stop.
        drawn: of each panel what its upward axis is, with the unit.
        height: in inches.
        fitted: whether room is made for texts of any length at the left, which takes as long again as drawing.
        rows: of panels, of a figure that is fitted.
    """
    palette, panels = colors(), len(drawn)
    width = WIDTH if panels == 1 else 1.55 * WIDTH
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.06) if fitted else None
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor=palette.paper)
    axes = figure.subplots(rows, panels // rows, squeeze=False).ravel()
    if not fitted:
        figure.subplots_adjust(left=_LEFT / width, right=1, bottom=_BELOW / height)
        _make_room(figure, panels, _RIGHT)
    for one, what in zip(axes, drawn, strict=True):
        one.set_title(plain(what), loc="left", fontsize=LETTERS, color=palette.muted)
        one.set_facecolor(palette.paper)
        one.tick_params(labelsize=SMALL, colors=palette.muted, labelcolor=palette.ink)
        one.xaxis.label.set(fontsize=LETTERS, color=palette.ink)
        one.yaxis.label.set(fontsize=LETTERS, color=palette.ink)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(palette.muted)
        one.grid(color=palette.grid, linewidth=0.8)
        one.set_axisbelow(True)
    title(figure, finding)
    return figure, list(axes)


def title(figure: Figure, finding: str) -> None:
    """Write what was found above a figure, in as many lines as that takes."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(finding, int(_LINE_OF_TITLE * width / WIDTH))
    style = {"fontsize": TITLE, "fontweight": "bold", "color": colors().ink, "ha": "left", "x": 0.012}
    if figure.get_layout_engine() is None:  # which makes room only where no height is given
        style |= {"y": 1 - 0.07 / height, "va": "top"}
        figure.subplots_adjust(top=1 - (0.45 + 0.24 * max(1, len(lines))) / height)
    figure.suptitle(plain("\n".join(lines)), **style)


def finding_of(figure: Figure) -> str:
    """What the title of a figure says, in one line."""
    return figure.get_suptitle().replace("\n", " ").replace(r"\$", "$")


def plain(name: str) -> str:
    """A name in which a dollar sign begins no formula."""
    return name.replace("$", r"\$")


def over_epochs(axes: Any) -> None:
    """Epochs to the right, in whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")


def fixed_line(axes: Any, value: float, name: str, upright: bool = False) -> None:
    """A thin line at a value that is known beforehand, with its name, which may be empty, at its beginning."""
    palette = colors()
    (axes.axvline if upright else axes.axhline)(value, color=palette.muted, linewidth=1.0, linestyle=(0, (4, 3)))
    if not name:
        return
    if upright:
        place, across, shift, up = (value, 1.0), axes.get_xaxis_transform(), (4, -2), "top"
    else:
        below = _heights(axes, [(axes.get_xlim()[0], value)])[0] > 0.85
        place, across = (0.0, value), axes.get_yaxis_transform()
        shift, up = ((4, -3), "top") if below else ((4, 3), "bottom")
    axes.annotate(
        plain(name), place, xycoords=across, xytext=shift, textcoords="offset points", ha="left", va=up,
        color=palette.muted, fontsize=SMALL, zorder=4,
        bbox=_behind(),
    )  # fmt: skip


def _make_room(figure: Figure, panels: int, right: float) -> None:
    """So many inches at the right of every panel, or more where there are more already."""
    width = figure.get_figwidth()
    edge = min(width - right, width * figure.subplotpars.right)
    gap = width - edge + _LEFT
    figure.subplots_adjust(right=edge / width, wspace=gap / ((edge - _LEFT - (panels - 1) * gap) / panels))


def _behind() -> dict[str, Any]:
    """What lies between a name and the lines that it crosses."""
    return {"facecolor": colors().paper, "edgecolor": "none", "alpha": 0.75, "pad": 0.5}


def scale_beside(figure: Figure, axes: Any, drawn: Any, name: str) -> None:
    """What the colours of a heat map mean, beside its panel or panels."""
    palette = colors()
    if figure.get_layout_engine() is None:
        _make_room(figure, 1, 0.95)
    bar = figure.colorbar(drawn, ax=axes)
    bar.set_label(name, fontsize=LETTERS, color=palette.ink)
    bar.ax.tick_params(labelsize=SMALL, colors=palette.muted, labelcolor=palette.ink, which="both")
    bar.outline.set_edgecolor(palette.muted)  # type: ignore[operator]


class End(NamedTuple):
    """Of a line: its name, where it ends, and its colour."""

    name: str
    x: float
    y: float
    color: Any


def name_ends(axes: Any, ends: Sequence[End]) -> None:
    """Write the name of each line to the right of its end, moved up or down where names would meet.

    Args:
        axes: with all lines drawn, and the limits that stay.
        ends: of the lines; one whose value is not finite has no name.
    """
    if axes.figure.get_layout_engine() is None:
        longest = max((len(row) for end in ends for row in end.name.splitlines()), default=0)
        _make_room(axes.figure, axes.get_subplotspec().get_gridspec().ncols, 0.35 + 0.62 * SMALL / 72 * longest)
    _name(axes, ends, lambda _: 1.03)


def name_points(axes: Any, points: Sequence[End]) -> None:
    """Write the name of each point to its right, likewise; ``points`` as in :func:`name_ends`."""
    left, right = axes.get_xlim()
    groups: list[list[End]] = []
    for point in sorted(points, key=lambda point: point.x):
        if not groups or point.x - groups[-1][0].x > 0.25 * (right - left):
            groups.append([])
        groups[-1].append(point)
    for group in groups:
        _name(axes, group, lambda end: (end.x - left) / (right - left) + 0.025)


def _name(axes: Any, ends: Sequence[End], across: Callable[[End], float]) -> None:
    heights = _heights(axes, [(end.x, end.y) for end in ends])
    order = sorted((i for i, height in enumerate(heights) if math.isfinite(height)), key=lambda i: heights[i])
    gap = 1.3 * SMALL / (72 * 0.72 * axes.figure.get_figheight())  # axes are about this part of a figure
    for index, height in zip(order, apart([min(max(heights[i], 0.0), 1.0) for i in order], gap), strict=True):
        end = ends[index]
        moved = abs(height - heights[index]) > 0.3 * gap
        axes.annotate(
            plain(end.name), (end.x, end.y), xytext=(across(end), height), textcoords="axes fraction", va="center",
            color=end.color, fontsize=SMALL, annotation_clip=False, zorder=4, bbox=_behind(),
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3}
            if moved else None,
        )  # fmt: skip


def _heights(axes: Any, points: Sequence[tuple[float, float]]) -> list[float]:
    """How far up in the axes points are, 0 to 1 where they are within; nan where that is not known."""
    axes.get_xlim(), axes.get_ylim()  # fixes the limits, of which the transformations know
    to_axes = axes.transScale + axes.transLimits
    return [float(to_axes.transform(point)[1]) if math.isfinite(point[1]) else math.nan for point in points]


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places as near as can be to ``places``, ascending too, and none nearer to the next than ``gap``.

    Examples:
        >>> apart([0.0, 4.0, 4.0, 9.0], 1.0)
        [0.0, 3.5, 4.5, 9.0]
    """
    groups: list[tuple[float, int]] = []  # mean and number of those that touch: regression to an ascending order
    for index, place in enumerate(places):
        mean, count = place - index * gap, 1
        while groups and groups[-1][0] > mean:
            before, more = groups.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        groups.append((mean, count))
    level = [mean for mean, count in groups for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(level)]


# ---- as a file


def pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """The drawn figure, (height, width, 3) uint8."""
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return np.asarray(drawn.buffer_rgba())[..., :3].copy()


def write_png(target: Path, figure: Figure) -> None:
    """Write the figure as PNG, atomically."""
    write_image(target, pixels(figure))


def write_image(target: Path, image: np.ndarray[Any, Any]) -> None:
    """Write :func:`pixels` as PNG, atomically."""
    from PIL import Image

    with atomic_path(target) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def svg(figure: Figure) -> str:
    """The figure as SVG, the same text each time; where darkness is preferred, one drawn in LIGHT turns dark."""
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "lqkd"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}'
        for light, dark in zip(LIGHT.flat(), DARK.flat(), strict=True)
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    head, opening, rest = stream.getvalue().partition("<defs>")
    return f"{head}{style}\n {opening}{rest}"
