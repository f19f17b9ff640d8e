"""The verdict on a regularizer: what is healthy, what is not, and what is advised."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lqkd.callbacks.regularizer.moments import EpochWeights
from lqkd.callbacks.regularizer.verdict import verdict

HEALTHY = EpochWeights(
    0, mean=3.0, spread=1.0, minimum=0.5, maximum=9.0, effective=2.0, at_maximum=0.0, contribution=1.0, optimum=1.0
)
FAR = {"mean": 0.033, "spread": 0.02, "effective": 0.031}
"""Weights under the barrier while divergences are about 30."""
EASY = {"mean": 1.0, "spread": 6.0, "effective": 0.02, "contribution": 0.1}
"""All weight where teacher and student agree."""

HARD = {"mean": 1.0, "spread": 5.0, "effective": 9.0, "contribution": 9.0, "optimum": 29.0}
"""Weight where teacher and student differ most."""

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("healthy", {}, "3"),
    ("healthy", {"share": 0.4}, "40%"),
    # small weights
    ("collapsed", {"mean": 0.09, "contribution": None, "optimum": None}, "0.09"),
    ("healthy", {"mean": 0.11, "contribution": None, "optimum": None}, "0.11"),
    ("healthy", {**FAR, "contribution": 0.93, "optimum": 1.0}, "0.033"),
    ("healthy", {**FAR, "contribution": 0.11, "optimum": 1.0}, "0.033"),
    ("collapsed", {**FAR, "contribution": 0.09, "optimum": 1.0}, "0.09"),
    ("collapsed", {**FAR, "contribution": 0.93, "optimum": 0.0}, "0.033"),
    ("collapsed", {**FAR, "contribution": 0.93, "optimum": 0.0, "share": 0.3}, "30.00%"),
    ("collapsed", {**FAR, "contribution": 0.93, "optimum": 1.0, "share": 0.009}, "0.90%"),
    ("healthy", {**FAR, "contribution": 0.93, "optimum": 1.0, "share": 0.011}, "1%"),
    ("collapsed", {**FAR, "optimum": None, "share": 0.009}, "0.90%"),
    ("healthy", {**FAR, "optimum": None, "share": 0.3}, "30%"),
    # weights that are large where nothing is at stake
    ("collapsed", {**EASY, "optimum": None}, "0.02"),
    ("healthy", {**EASY, "optimum": 0.12}, "0.02"),
    ("collapsed", {**EASY, "optimum": 1.1}, "0.02"),
    ("healthy", {"effective": float("nan")}, "3"),
    # weights that are large where all is at stake
    ("dominant", {**HARD, "share": 0.96}, "9"),
    ("healthy", {**HARD, "share": 0.94}, "94%"),
    ("healthy", {**HARD, "share": None}, "1"),
    ("healthy", {**HARD, "effective": 4.9, "share": 0.99}, "99%"),
    # weights that are all the same
    ("saturated", {"at_maximum": 0.91}, "91%"),
    ("healthy", {"at_maximum": 0.9}, "3"),
    ("healthy", {"at_maximum": None}, "3"),
    ("uniform", {"mean": 1.5, "spread": 0.0149}, "1.5"),
    ("healthy", {"mean": 1.5, "spread": 0.0151}, "1.5"),
    ("uniform", {"mean": 7.5, "spread": 0.0749}, "7.5"),
    ("uniform", {"mean": 0.033, "spread": 0.0001, "effective": 0.033}, "0.033"),
    ("diverged", {"mean": float("nan")}, "nan"),
    ("diverged", {"mean": float("inf")}, "inf"),
]


@pytest.mark.parametrize(("kind", "changes", "number"), CASES)
def test_the_verdict_follows_the_last_epoch_and_gives_its_number(
    kind: str, changes: dict[str, Any], number: str
) -> None:
    judged = verdict([replace(HEALTHY, mean=0.01), replace(HEALTHY, **changes)])
    assert judged.kind == kind
    assert number in judged.sentence
    assert ("model.init_args." in judged.sentence) == (kind != "healthy")


def test_every_advised_option_is_one_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from lqkd.cli import main

    sentences = [verdict([replace(HEALTHY, **changes)]).sentence for _, changes, _ in CASES]
    options = {key.rstrip(".") for text in sentences for key in re.findall(r"model\.init_args[\w.]+", text)}
    assert len(options) >= 6
    config = str(Path(__file__).parents[3] / "configs" / "regularizer.yaml")
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    for option in options:
        place = shown
        for key in option.split("."):
            assert key in place, option
            place = place[key]


def test_the_verdict_of_a_named_term_names_it_and_its_own_settings() -> None:
    sentence = verdict([replace(HEALTHY, at_maximum=0.95)], "logits").sentence
    assert sentence.startswith("logits: ")
    assert "model.init_args.distillation.logits.regularizer.init_args.max_weight" in sentence
