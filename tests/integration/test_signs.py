"""Negative values that come after a first batch without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lqkd.quantization import Recipe
from tests.conftest import distiller

MakeTrainer = Callable[..., Trainer]

IMAGES = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def loader(negative: bool = True) -> DataLoader:
    images = torch.cat([IMAGES[:8].abs(), IMAGES[8:] if negative else IMAGES[8:].abs()])
    return DataLoader([(image, i % 10) for i, image in enumerate(images)], batch_size=8)


def told(make_trainer: MakeTrainer, quantizer: Any, *loaders: DataLoader, **settings: Any) -> list[str]:
    recipe = Recipe(bits="w4a4", first_layer_bits=4, activation_quantizer=quantizer)
    module = distiller(quantization=recipe)
    make_trainer(max_epochs=2, **settings).fit(module, *loaders)
    return [text for text in module.warnings if "negative" in text]


SENTENCE = (
    "quantizer 'conv1.input_quantizer' turns negative values (down to -2.98) into zero, since its first batch had none "
    "and its grid begins there: add a rule with match='conv1' and activation_quantizer={name: lsq, signed: true}, or "
    "begin with a batch that has some"
)


@pytest.mark.parametrize(
    "quantizer", ["lsq", "lsq_ewgs", "minmax", "mse", "pact", "dorefa", "apot", "n2uq", "lsq_power_of_two"]
)
def test_negative_values_after_a_first_batch_without_any_are_told_once(
    make_trainer: MakeTrainer, quantizer: str
) -> None:
    sentence = SENTENCE.replace("name: lsq", f"name: {quantizer}") if quantizer == "lsq_power_of_two" else SENTENCE
    assert told(make_trainer, quantizer, loader(), loader()) == [sentence]


def test_without_a_validation_training_batches_tell(make_trainer: MakeTrainer) -> None:
    assert told(make_trainer, "lsq", loader(), limit_val_batches=0) == [SENTENCE]


@pytest.mark.parametrize("quantizer", ["lsq_plus", {"name": "lsq", "signed": True}])
def test_grids_that_hold_negative_values_say_nothing(make_trainer: MakeTrainer, quantizer: Any) -> None:
    assert told(make_trainer, quantizer, loader(), loader()) == []


def test_nothing_is_said_where_none_come(make_trainer: MakeTrainer) -> None:
    assert told(make_trainer, "lsq", loader(negative=False), loader(negative=False)) == []
