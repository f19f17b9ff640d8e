"""Half precision: what trains, on which dtypes the quantizers compute, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lqkd.errors import UsageError
from lqkd.modules.trainer_checks import check_trainer_settings
from lqkd.quantization import QUANTIZERS, Recipe, initialize_quantizers, quantize_model, quantizers
from tests.conftest import digits, distiller, network
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
pytestmark = pytest.mark.usefixtures("compiled_kernels")
RECIPES = [
    Recipe(bits="w4a4"),
    Recipe(bits="w2a2", weight_quantizer="apot", activation_quantizer="n2uq"),
    Recipe(bits="w1a1"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_twenty_steps_in_bfloat16_mixed_precision_learn_and_keep_float32_parameters(
    make_trainer: MakeTrainer, recipe: Recipe
) -> None:
    module = distiller(quantization=recipe)
    recorder = Recorder(lambda t, m: t.callback_metrics["train/loss"].item())
    trainer = make_trainer(precision="bf16-mixed", callbacks=[recorder], max_steps=20, max_epochs=-1)
    trainer.fit(module, datamodule=digits(10))
    assert len(recorder.seen) == 20
    assert all(math.isfinite(loss) for loss in recorder.seen)
    assert sum(recorder.seen[-5:]) < sum(recorder.seen[:5])
    for quantizer in quantizers(module.student).values():
        assert quantizer.initialized
        assert {value.dtype for value in quantizer.state_dict().values() if value.is_floating_point()} <= {
            torch.float32
        }


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_a_precision_that_two_optimizers_cannot_train_in_is_refused(precision: str) -> None:
    with pytest.raises(UsageError, match=rf"trainer.precision='{precision}' is not possible.*use bf16-mixed"):
        check_trainer_settings(SimpleNamespace(precision=precision))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_a_quantised_network_trains_twenty_steps_under_autocast_on_its_own(recipe: Recipe, dtype: torch.dtype) -> None:
    model, _ = quantize_model(network(), recipe)
    x = torch.randn(20, 1, 8, 8)
    labels = torch.arange(20) % 10
    with torch.autocast("cpu", dtype):
        initialize_quantizers(model, x)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype):
            logits = model(x)
        assert logits.dtype == dtype
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["lsq", "minmax", "mse", "lsq_plus"])
def test_eight_bit_codes_of_half_precision_data_are_those_of_the_same_data_in_float32(name: str) -> None:
    x = torch.randn(3000)
    quantizer = QUANTIZERS[name](8, batched=True)
    quantizer.initialize(x)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            codes = quantizer.codes(half)
        assert torch.equal(codes, quantizer.codes(half.float()))
        assert quantizer(half).dtype == dtype


class Plain(LightningModule):
    """A quantised network in somebody's own module, which a precision plugin of Lightning converts."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0].to(self.dtype)).float(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.bits)
def test_a_precision_plugin_leaves_grids_in_float32(make_trainer: MakeTrainer, recipe: Recipe, precision: str) -> None:
    torch.set_default_dtype(torch.bfloat16)  # as such a plugin does around the making of a network
    try:
        model, _ = quantize_model(network(), recipe)
    finally:
        torch.set_default_dtype(torch.float32)
    trainer = make_trainer(precision=precision, max_steps=3, max_epochs=-1)
    trainer.fit(Plain(model), datamodule=digits(4))
    assert model.conv1.weight.dtype != torch.float32
    for quantizer in quantizers(model).values():
        assert quantizer.initialized
        held = [value for value in quantizer.state_dict().values() if value.is_floating_point()]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in held)


def test_a_network_computes_in_half_precision_what_it_computed_before() -> None:
    model, _ = quantize_model(network(), Recipe(bits="w4a4"))
    with torch.no_grad():
        for layer in (model.layer1[0].conv1, model.layer2[0].conv1):
            layer.weight.mul_(1e-6)  # whose batch norm makes up for it
    x = torch.randn(20, 1, 8, 8)
    initialize_quantizers(model, x, batch_statistics=True)
    steps = {name: quantizer.scale.clone() for name, quantizer in quantizers(model).items()}
    model.eval().bfloat16()
    assert all(torch.equal(quantizer.scale, steps[name]) for name, quantizer in quantizers(model).items())
    weight = model.layer1[0].conv1.quantized_weight()
    assert weight.dtype == torch.bfloat16
    assert weight.count_nonzero() > weight.numel() / 2
    assert model(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", ModelParallelStrategy(), SimpleNamespace(class_path="lightning.pytorch.strategies.FSDPStrategy")],
)
def test_a_strategy_that_cuts_weights_over_processes_is_refused(strategy: Any) -> None:
    with pytest.raises(UsageError, match=r"is not possible: it cuts weights .* use ddp, with model\.gradient_check"):
        check_trainer_settings(SimpleNamespace(strategy=strategy))
