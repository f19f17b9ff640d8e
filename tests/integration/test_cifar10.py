"""Claims about the real CIFAR-10, where it is at hand (LQKD_DATA)."""

from __future__ import annotations

import os
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from lqkd.data import CIFAR10
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model

DATA = Path(os.environ.get("LQKD_DATA", "missing"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="LQKD_DATA is not set")]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> CIFAR10:
    root = tmp_path_factory.mktemp("cifar10")
    with tarfile.open(DATA / "cifar10.tar.gz") as archive:
        archive.extractall(root, filter="data")
    # The normalisation that the published weights were trained with.
    data = CIFAR10(root=str(root), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), cache_dir=str(root / "cache"))
    data.setup()
    return data


@torch.no_grad()
def accuracy(network: torch.nn.Module, data: CIFAR10) -> float:
    """Of 2560 test images, in per cent."""
    network.eval()
    right = [
        network(data.preprocess(batch, train=False, epoch=0).images).argmax(1) == batch.labels
        for batch in islice(data.test_dataloader(), 20)
    ]
    return 100 * float(torch.cat(right).float().mean())


def trained() -> CifarResNet:
    network = CifarResNet(20)
    load_weights(network, str(DATA / "weights" / "cifar10_resnet20.safetensors"))
    return network


@pytest.fixture(scope="module")
def of_float(cifar10: CIFAR10) -> float:
    return accuracy(trained(), cifar10)


def test_published_weights_have_their_accuracy(of_float: float) -> None:
    """On all 10,000 images it is the published 91.73 %."""
    assert of_float == pytest.approx(92.23, abs=0.05)


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual_bits": 8}, {"weight_quantizer": "minmax", "activation_quantizer": "minmax"}],
    ids=["default", "with additions", "minmax"],
)
def test_eight_bits_calibrated_without_training_stay_close_to_float(
    cifar10: CIFAR10, of_float: float, settings: dict[str, Any]
) -> None:
    network, _ = quantize_model(trained(), Recipe(bits="w8a8", **settings))
    batch = next(iter(cifar10.train_dataloader()))
    initialize_quantizers(network, cifar10.preprocess(batch, train=False, epoch=0).images)
    assert accuracy(network, cifar10) == pytest.approx(of_float, abs=0.3)
