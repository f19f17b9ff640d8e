"""Training under the arithmetic of fixed-point hardware, from a trained student to its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lqkd.callbacks import IntegerBiases
from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.losses import Hints
from lqkd.models import CifarResNet
from lqkd.modules import Tap
from lqkd.quantization import Recipe, quantizers
from tests.conftest import digits, distiller, network

RECIPE = Recipe("w4a4", target="power_of_two", residual_bits=8)


def seen() -> CifarResNet:
    """A network whose batch norms have seen data."""
    torch.manual_seed(1)
    student = network().train()
    with torch.no_grad():
        for _ in range(3):
            student(torch.randn(32, 1, 8, 8))
    return student


def test_what_was_trained_is_what_the_file_computes(make_trainer: Callable[..., Trainer]) -> None:
    module = distiller(student=seen(), quantization=RECIPE)
    before = [float(quantizer.scale.detach()) for quantizer in quantizers(module.student).values()]
    trainer = make_trainer(max_epochs=2, callbacks=[IntegerBiases()])
    trainer.fit(module, datamodule=digits(8))
    after = quantizers(module.student).values()
    assert all(float(q.scale.detach()) != scale for q, scale in zip(after, before, strict=True))
    assert all(torch.frexp(quantizer.step()).mantissa == 0.5 for quantizer in after)
    images = torch.randn(64, 1, 8, 8)
    to_onnx(module.student, images[:8], format="power_of_two", calibration=[images], test=[images])


def test_a_tap_that_comes_to_be_behind_batch_norm_is_told(make_trainer: Callable[..., Trainer]) -> None:
    taps = [Tap("conv1", "conv1"), Tap("layer1", "layer1")]
    module = distiller(student=seen(), quantization=RECIPE, distillation_loss=Hints(), taps=taps, regularizer=None)
    with pytest.warns(UserWarning, match="tap on the student's 'conv1' is behind batch norm, .* folds 'bn1' into it"):
        make_trainer().fit(module, datamodule=digits(1))


def test_batch_norms_that_have_seen_nothing_are_not_folded_unseen(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="they have never seen data: give student_weights of a trained student"):
        make_trainer().fit(distiller(quantization=RECIPE), datamodule=digits(3))
    trainer = make_trainer()
    trainer.fit(distiller(student=seen(), quantization=RECIPE), datamodule=digits(3))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_trainer(max_epochs=2)
    resumed.fit(distiller(quantization=RECIPE), datamodule=digits(3), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert resumed.global_step == 6
