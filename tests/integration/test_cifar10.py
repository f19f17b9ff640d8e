"""Claims about the real CIFAR-10, where it is at hand (LQKD_DATA)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lqkd.data import CIFAR10
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.cifar10 import DATA, part_of_cifar10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="LQKD_DATA is not set"),
    pytest.mark.usefixtures("compiled_kernels"),
]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> CIFAR10:
    return part_of_cifar10(tmp_path_factory.mktemp("cifar10"))


def trained() -> CifarResNet:
    network = CifarResNet(20)
    load_weights(network, str(DATA / "weights" / "cifar10_resnet20.safetensors"))
    return network


@torch.no_grad()
def predicted(network: torch.nn.Module, data: CIFAR10) -> tuple[Tensor, Tensor]:
    """Classes of all test images, and their labels."""
    network.eval()
    batches = (data.preprocess(batch, train=False, epoch=0) for batch in data.test_dataloader())
    seen = [(network(batch.images).argmax(1), batch.labels) for batch in batches]
    classes, labels = (torch.cat(part) for part in zip(*seen, strict=True))
    return classes, labels


@pytest.fixture(scope="module")
def in_float(cifar10: CIFAR10) -> tuple[Tensor, Tensor]:
    return predicted(trained(), cifar10)


def test_the_published_weights_have_their_accuracy(in_float: tuple[Tensor, Tensor]) -> None:
    classes, labels = in_float
    assert 100 * (classes == labels).float().mean() == pytest.approx(
        91.73, abs=1.3
    )  # two standard errors of 2,000 images


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual_bits": 8}, {"weight_quantizer": "minmax", "activation_quantizer": "minmax"}],
    ids=["default", "with additions", "minmax"],
)
def test_eight_bits_calibrated_without_training_stay_close_to_float(
    cifar10: CIFAR10, in_float: tuple[Tensor, Tensor], settings: dict[str, Any]
) -> None:
    network, _ = quantize_model(trained(), Recipe(bits="w8a8", **settings))
    batch = next(iter(cifar10.train_dataloader()))
    initialize_quantizers(network, cifar10.preprocess(batch, train=False, epoch=0).images)
    classes, labels = predicted(network, cifar10)
    told = in_float[0]
    assert 100 * (classes == told).float().mean() >= 99
    assert 100 * float(((classes == labels).float() - (told == labels).float()).mean()) == pytest.approx(0, abs=0.3)
