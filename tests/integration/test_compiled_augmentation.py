"""Augmentation that is compiled with the networks: the same images, compiled once for all epochs.

The graphs are those of a GPU, and run eagerly on the CPU here; what a GPU makes of them is in ``tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lqkd.data import Batch, Digits, ImageDataModule, SegmentationFolder
from lqkd.modules import compilation
from lqkd.modules.compilation import Compilation
from tests.integration.test_compilation import LOGGER, told
from tests.photographs import CLASSES, write_photographs

CROPPED = {"crop_padding": 1, "horizontal_flip": True}
MIXED = {**CROPPED, "random_erasing": 0.5, "mixup": 0.5, "cutmix": 1.0, "mix_probability": 0.8}
GPU = torch.device("cuda")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, and run without code being generated, which takes most of the time."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    counters.clear()


def digits(**settings: Any) -> Digits:
    data = Digits(batch_size=16, limit_train=48, seed=3, **settings)
    data.setup("fit")
    return data


def epochs(data: ImageDataModule, count: int = 2) -> list[Batch]:
    """All batches of so many epochs, augmented, and a short one at the end of each."""
    done = []
    for epoch in range(count):
        loader: Any = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = [*loader]
        short = Batch(*(part[:5] for part in batches[0][:3]))
        done += [data.preprocess(batch, train=True, epoch=epoch) for batch in (*batches, short)]
    return done


def compiled(data: ImageDataModule) -> tuple[list[Batch], Compilation]:
    compilation = Compilation(True)
    compilation.start_augmentation(data, GPU)
    return epochs(data), compilation


@pytest.mark.parametrize("settings", [CROPPED, MIXED], ids=["cropped", "mixed"])
def test_one_graph_serves_all_epochs_and_short_batches_run_eagerly(traced: None, settings: dict[str, Any]) -> None:
    expected = epochs(digits(**settings))
    batches, compilation = compiled(digits(**settings))
    assert counters["stats"]["unique_graphs"] == 1
    (call,) = compilation._calls.values()
    assert (call.passes, call.eager) == (8, 2)
    for ours, theirs in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None)


def test_masks_are_mirrored_with_their_images_in_one_graph(traced: None, tmp_path: Path) -> None:
    write_photographs(tmp_path)

    def pairs() -> SegmentationFolder:
        data = SegmentationFolder(root=str(tmp_path), classes=CLASSES, image_size=(8, 8), num_workers=0)
        data.setup("fit")
        return data

    expected = epochs(pairs())
    batches, _ = compiled(pairs())
    assert counters["stats"]["unique_graphs"] == 1
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(
    ("settings", "device", "reason"),
    [
        ({}, "cpu", "on a CPU it takes longer compiled"),
        ({"rand_augment": 2}, "cuda", "rand_augment=2 sorts images by what is done to them"),
    ],
)
def test_what_stays_eager_is_told(
    settings: dict[str, Any], device: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, compilation = digits(**settings), Compilation(True)
    with caplog.at_level("INFO", LOGGER):
        compilation.start_augmentation(data, torch.device(device))
    assert told(caplog) == [f"compile: the augmentation runs eagerly: {reason}"]
    assert data.compiled is None


def test_the_time_of_its_compilation_is_told_once_and_it_ends_with_the_training(
    traced: None, caplog: pytest.LogCaptureFixture
) -> None:
    data = digits(**CROPPED)
    with caplog.at_level("INFO", LOGGER):
        _, compilation = compiled(data)
        compilation.end_step(0.0)
        compilation.end_step(0.0)
    time, odd = told(caplog)
    assert time.startswith("compile: augmentation, in ")
    assert odd.startswith("compile: a batch of 5x1x8x8, 5 runs eagerly")
    assert compilation.seconds > 0
    compilation.stop()
    assert data.compiled is None


class Own(Digits):
    """Prepares batches by itself."""

    def preprocess(self, batch: Batch, *, train: bool, epoch: int) -> Batch:
        return batch._replace(images=batch.images.float())


def test_an_own_preparation_that_is_not_compiled_is_told() -> None:
    data = Own(batch_size=16, limit_train=48)
    data.setup("fit")
    _, compilation = compiled(data)
    assert compilation.verdict() == "compile: the augmentation ran eagerly: Own has a preprocess of its own"
