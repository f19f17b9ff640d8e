"""The model card and the table show names as text."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqkd.export import deploy, metadata
from lqkd.export.card import Summary, print_card, rows, write_card
from lqkd.export.parity import Parity
from tests.unit.export.networks import images, quantised


def test_names_from_data_are_text_on_the_card_and_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployed = deploy(quantised(), images(), [images()])
    network = {"class_path": "a.`b`", "init_args": {"x": "<i>"}}
    about = {
        "class_names": ["<b>cat</b>", "d|og\n# new", "[x](http://a)"],
        "teacher": {"network": network, "weights": "<u>.pt"},
        "preprocessing": {"channels": 3, "size": [8, 8], "scale": "none", "mean": [0.5], "std": [0.5]},
    }
    described = metadata.describe("portable", deployed, Parity(), about)
    summary = Summary(tmp_path / "[red]\x1b[2J<x>.onnx", 1, 1, 1, None)
    card = write_card(summary, described, Parity(), deployed).read_text()
    assert r"classes: &lt;b&gt;cat&lt;/b&gt;, d\|og\\n# new, [x\](http://a)." in card
    assert "teacher: `'b'(x=<i>)`, weights &lt;u&gt;.pt" in card
    assert card.startswith(r"# [red]\\x1b[2J&lt;x&gt;.onnx")
    print_card(summary, described, Parity())
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"[red]\x1b[2J<x>.onnx" in shown


@pytest.mark.parametrize(("differing", "told"), [(0, False), (10, False), (11, True)])
def test_what_keeps_the_answers_of_training_is_told_where_many_changed(differing: int, told: bool) -> None:
    deployed = deploy(quantised(), images(), [images()])
    parity = Parity(samples=1000, answer="first class", trained_differing=float(differing))
    described = metadata.describe("portable", deployed, parity, {}) | {"calibrated": ["conv1.input"]}
    shown = dict(rows(Summary(Path("student.onnx"), 1, 1, 1, None), described, parity))["same first class as trained"]
    assert ("residual_bits, function_bits and IntegerBiases in training keep it" in shown) == told
