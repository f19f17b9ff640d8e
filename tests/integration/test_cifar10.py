"""Claims about the real CIFAR-10, where it is at hand (LQKD_DATA)."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lqkd.data import CIFAR10
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model

DATA = Path(os.environ.get("LQKD_DATA", "missing"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="LQKD_DATA is not set"),
    pytest.mark.usefixtures("compiled_kernels"),
]


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
    network.eval()
    right = sum(
        int((network(data.preprocess(batch, train=False, epoch=0).images).argmax(1) == batch.labels).sum())
        for batch in data.test_dataloader()
    )
    return 100 * right / 10_000


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual_bits": 8}, {"weight_quantizer": "minmax", "activation_quantizer": "minmax"}],
    ids=["default", "with additions", "minmax"],
)
def test_eight_bits_calibrated_without_training_stay_close_to_float(cifar10: CIFAR10, settings: dict[str, Any]) -> None:
    network = CifarResNet(20)
    load_weights(network, str(DATA / "weights" / "cifar10_resnet20.safetensors"))
    network, _ = quantize_model(network, Recipe(bits="w8a8", **settings))
    batch = next(iter(cifar10.train_dataloader()))
    initialize_quantizers(network, cifar10.preprocess(batch, train=False, epoch=0).images)
    assert accuracy(network, cifar10) == pytest.approx(91.73, abs=0.3)
