"""Students whose files are judged: ResNet-20 on CIFAR-10, MobileNets on Fashion-MNIST, trained at W8A8 and W4A4.

ResNet-20 has its published weights; MobileNetV2, of half the width, and MobileNetV3 small of timm are trained in
floating point for 1,200 steps of 128 images. Then :func:`lqkd.distill` trains each for 240 steps of 64 images by AdamW,
from the labels and its own float network, with 8 bits for additions and functions (for ncnn, which has these in
floating point, for additions alone) and with integer biases. All has the same seed and takes a few minutes on one core.
Networks are kept in a folder, from which the next run reads them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

import lqkd
from lqkd.callbacks import IntegerBiases
from lqkd.data import CIFAR10, FashionMNIST, ImageDataModule
from lqkd.models import CifarResNet, build_model, load_weights

NETWORKS = {"resnet20": "CIFAR-10", "mobilenetv2_050": "Fashion-MNIST", "mobilenetv3_small_100": "Fashion-MNIST"}
"""And their data."""
FLOAT_BATCH, FLOAT_STEPS, EPOCHS, RATE = 128, 150, 8, 3e-3
BATCH, STEPS, STUDENT_RATE, CALIBRATION, IMAGES = 64, 240, 3e-4, 8, 1000


@dataclass(frozen=True)
class Trained:
    """A student and what its file is judged on.

    Attributes:
        name, bits: of the network and its layers.
        student: trained, in eval mode.
        calibration: batches of training images.
        test, labels: 1,000 test images, evenly over the classes, and theirs.
    """

    name: str
    bits: str
    student: nn.Module
    calibration: list[Tensor]
    test: Tensor
    labels: Tensor


def students(roots: dict[str, str], kept: Path, names: list[str], target: str | None = None) -> Iterator[Trained]:
    """The students of networks at W8A8 and W4A4.

    Args:
        roots: folders with CIFAR-10 and Fashion-MNIST.
        kept: folder for networks.
        names: of networks.
        target: of the recipe.
    """
    for name in names:
        root = roots[NETWORKS[name]]
        network = _kept(kept / f"{name}_{EPOCHS * FLOAT_STEPS}_steps.pt", lambda: _float(name, root))  # noqa: B023
        data = _data(name, root, BATCH * STEPS)
        data.setup()
        given = islice(data.train_dataloader(), CALIBRATION)
        batches = [data.preprocess(batch, train=False, epoch=0).images for batch in given]
        test = [data.preprocess(batch, train=False, epoch=0) for batch in data.test_dataloader()]
        step = sum(len(batch.labels) for batch in test) // IMAGES
        images, labels = (
            torch.cat([getattr(batch, what) for batch in test])[::step][:IMAGES].contiguous()
            for what in ("images", "labels")
        )
        for bits in ("w8a8", "w4a4"):
            place = kept / "_".join([name, bits, target or "functions", f"{STEPS}_steps"])
            student = _kept(place.with_suffix(".pt"), lambda: _student(name, network, bits, target, root, place))  # noqa: B023
            yield Trained(name, bits, student, batches, images, labels)


def _data(name: str, root: str, images: int, batch: int = BATCH) -> ImageDataModule:
    given: dict[str, Any] = {"root": root, "batch_size": batch, "limit_train": images, "seed": 0, "crop_padding": 0}
    if NETWORKS[name] == "Fashion-MNIST":
        return FashionMNIST(**given)
    # the normalisation that the published weights were trained with
    return CIFAR10(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **given)


def _kept(file: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network in ``file``, made and written there where it is not."""
    if not file.exists():
        network = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network, file)
    found: nn.Module = torch.load(file, weights_only=False)
    return found.eval()


def _float(name: str, root: str) -> nn.Module:
    """The network ``name``, trained in floating point."""
    if name == "resnet20":
        resnet = CifarResNet(20)
        load_weights(resnet, str(Path(os.environ["LQKD_DATA"]) / "weights" / "cifar10_resnet20.safetensors"))
        return resnet
    seed_everything(0, verbose=False)
    data = _data(name, root, FLOAT_BATCH * FLOAT_STEPS, FLOAT_BATCH)
    data.setup()
    loader = data.train_dataloader()
    network = build_model(f"timm/{name}", num_classes=10, options={"in_chans": 1}).to(memory_format=torch.channels_last)
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * len(loader))
    for epoch in range(EPOCHS):
        for given in loader:
            batch = data.preprocess(given, train=True, epoch=epoch)
            loss = F.cross_entropy(network(batch.images.to(memory_format=torch.channels_last)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.to(memory_format=torch.contiguous_format)


def _student(name: str, network: nn.Module, bits: str, target: str | None, root: str, folder: Path) -> nn.Module:
    return lqkd.distill(
        network,
        train=_data(name, root, BATCH * STEPS),
        bits=lqkd.Recipe(bits=bits, residual_bits=8, function_bits=None if target else 8, target=target),
        folder=folder,
        epochs=1,
        trainer={"callbacks": [IntegerBiases()], "max_steps": STEPS, "limit_val_batches": 4},
        student_optimizer=lambda parameters: torch.optim.AdamW(parameters, STUDENT_RATE),
        channels_last=True,
    ).network
