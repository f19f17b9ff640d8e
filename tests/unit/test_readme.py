"""README's figure, its numbers and the table of runtimes are those of the tables in results/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import figure, runtimes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def measured() -> tuple[float, figure.Accuracies]:
    return figure.read(ROOT / "results")


@pytest.mark.parametrize("bits", [4, 2])
def test_the_table_has_the_means_of_the_runs(bits: int, measured: tuple[float, figure.Accuracies]) -> None:
    _, series = measured
    begins = {2: "| ResNet-20 at W2A2", 4: "| the same at W4A4"}[bits]
    row = next(line for line in README.splitlines() if line.startswith(begins))
    told = [float(number) for number in re.findall(r"(\d\d\.\d) %", row.partition(" | ")[2])]
    assert told == [round(figure.mean(series[name][bits]), 1) for name in (*figure.VARIANTS, figure.PTQ)]


def test_the_figure_is_there_for_light_and_dark_pages(measured: tuple[float, figure.Accuracies]) -> None:
    for name in re.findall(r'="(results/\w+\.svg)"', README):
        assert 10_000 < (ROOT / name).stat().st_size < 100_000
    in_float, series = measured
    for dark in (False, True):
        texts = [text.get_text() for text in figure.draw(in_float, series, dark).axes[0].texts]
        for bits in (4, 2):
            for values in series.values():
                assert any(f"{figure.mean(values[bits]):.1f} %" in text for text in texts)
        assert any(f"{in_float:.1f} %" in text for text in texts)


def test_the_picture_has_its_numbers_in_words(measured: tuple[float, figure.Accuracies]) -> None:
    in_float, series = measured
    (words,) = re.findall(r'alt="([^"]+)"', README)
    for value in (in_float, *(figure.mean(values[2]) for values in series.values())):
        assert f"{value:.1f} %" in words


def test_readme_is_read_in_two_minutes() -> None:
    assert len(README.splitlines()) <= 115


def test_the_page_about_export_has_the_table_of_runtimes_as_it_was_measured() -> None:
    assert runtimes.table() in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
