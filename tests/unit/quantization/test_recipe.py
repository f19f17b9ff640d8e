"""Recipes: presets, rules and quantizers with arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.quantization import LSQ, QUANTIZERS, Recipe, Rule, initialize_quantizers, quantize_model
from lqkd.quantization.recipe import LayerSettings, resolve

LAYERS = {"stem": "Conv2d", "body": "Conv2d", "head": "Linear"}


class Widened(LSQ):
    """LSQ with an argument of its own."""

    def __init__(self, bits: int, *, width: float = 1.0, **settings: Any) -> None:
        super().__init__(bits, **settings)
        self.width = width


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short names whatever the version has; recipes only look them up."""
    for name in ("irnet", "react", "twn"):
        monkeypatch.setitem(QUANTIZERS, name, LSQ)


def body(recipe: Recipe) -> LayerSettings:
    return resolve(recipe, LAYERS)["body"]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("w8a8", (8, 8, "lsq", "lsq")),
        ("w4a8", (4, 8, "lsq", "lsq")),
        ("w4a4", (4, 4, "lsq", "lsq")),
        ("w3a3", (3, 3, "lsq", "lsq")),
        ("w2a2", (2, 2, "lsq", "lsq")),
        ("w1a1", (1, 1, "irnet", "react")),
        ("w2a32", (2, 32, "lsq", "lsq")),
        ("ternary", (2, 8, "twn", "lsq")),
    ],
)
def test_a_preset_sets_bits_and_the_quantizers_for_them(bits: str, expected: tuple[int, int, str, str]) -> None:
    settings = body(Recipe(bits=bits))
    assert (
        settings.weight_bits,
        settings.activation_bits,
        settings.weight_quantizer,
        settings.activation_quantizer,
    ) == expected


@pytest.mark.parametrize("bits", ["w1a1", "ternary"])
def test_the_first_and_last_layer_of_a_preset_have_a_quantizer_for_eight_bits(bits: str) -> None:
    settings = resolve(Recipe(bits=bits), LAYERS)
    assert {settings[name].weight_quantizer for name in ("stem", "head")} == {"lsq"}
    assert {settings[name].activation_quantizer for name in ("stem", "head")} == {"lsq"}


def test_a_named_quantizer_wins_over_that_of_the_preset() -> None:
    settings = body(
        Recipe(bits="ternary", weight_quantizer="irnet", rules=[Rule("body", activation_quantizer="react")])
    )
    assert (settings.weight_quantizer, settings.activation_quantizer) == ("irnet", "react")


def test_a_quantizer_can_be_a_mapping_with_arguments() -> None:
    spec = {"name": f"{__name__}.Widened", "width": 2.5}
    model, _ = quantize_model(nn.Sequential(nn.Linear(3, 2)), Recipe(weight_quantizer=spec))
    assert isinstance(model[0].weight_quantizer, Widened)
    assert model[0].weight_quantizer.width == 2.5
    initialize_quantizers(model, torch.randn(2, 3))
    assert type(model[0].input_quantizer) is LSQ


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "lsq", "wide": 1}, "layer '0': quantizer LSQ does not take .*wide"),
        ({"name": "lsq", "bits": 3}, "argument bits of quantizer LSQ cannot be set"),
        ({"name": "lsqq"}, "quantizer 'lsqq' is unknown: use .*lsq"),
        ({"class_path": "lsq"}, "is not understood: write a name, or a mapping"),
        ("torch.nn.Linear", "quantizer 'torch.nn.Linear' is unknown"),
    ],
)
def test_an_impossible_quantizer_is_refused_in_one_sentence(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        quantize_model(nn.Sequential(nn.Linear(3, 2)), Recipe(weight_quantizer=spec))
    assert "\n" not in str(caught.value)


def test_the_last_rule_that_matches_wins_by_glob_or_class() -> None:
    rules = [Rule("Conv2d", weight_bits=3), Rule("b*", weight_bits=5), Rule("head", weight_bits=6)]
    settings = resolve(Recipe(rules=rules), LAYERS)
    assert [settings[name].weight_bits for name in LAYERS] == [3, 5, 6]


def test_a_rule_that_changes_bits_gets_the_quantizer_of_the_new_bits() -> None:
    assert body(Recipe(rules=[Rule("body", weight_bits=1)])).weight_quantizer == "irnet"
