"""The panel's Fashion-MNIST: whose labels are spoiled, and who is left out of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.panel import TEACHERS, VALIDATION, NoisyPanelNetwork, PanelFashionMNIST, PanelNetwork
from tests.unit.data.test_fashion_mnist import idx


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many rows as it takes, of which row n shows nothing and has the class n % 10."""
    folder = tmp_path_factory.mktemp("fashion")
    for part, count in (("train", TEACHERS + VALIDATION), ("t10k", 10)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 28, 28), np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return folder


def made(root: Path, **settings: Any) -> PanelFashionMNIST:
    data = PanelFashionMNIST(root=str(root), trust_fraction=0.2, **settings)
    data.setup("fit")
    return data


def wrong(data: PanelFashionMNIST, rows: torch.Tensor) -> torch.Tensor:
    return data.images(rows)[1] != rows % 10


def test_labels_are_wrong_in_training_and_among_held_out_rows_and_never_in_validation(root: Path) -> None:
    data = made(root, wrong_labels=0.4, seed=3)
    assert wrong(data, data.train_indices).double().mean() == pytest.approx(0.4, abs=0.02)
    assert wrong(data, data.trust_indices).double().mean() == pytest.approx(0.4, abs=0.04)
    assert not wrong(data, data.val_indices).any()
    other = made(root, wrong_labels=0.4, seed=4)
    assert torch.equal(data.images(torch.arange(TEACHERS))[1], other.images(torch.arange(TEACHERS))[1])


def test_only_the_classes_that_are_named_have_wrong_labels(root: Path) -> None:
    data = made(root, wrong_labels=1.0, wrong_classes=[2, 3])
    rows = data.train_indices
    assert torch.equal(wrong(data, rows), torch.isin(rows % 10, torch.tensor([2, 3])))


def test_with_few_labels_the_held_out_rows_are_some_of_these(root: Path) -> None:
    data = made(root, labelled=1000)
    assert [int((data.images(rows)[1] >= 0).sum()) for rows in (data.train_indices, data.trust_indices)] == [800, 200]
    assert len(data.trust_indices) == 200
    assert not torch.isin(data.train_indices, data.trust_indices).any()
    known = made(root).labelled_rows(1000)  # what their float network is trained on
    assert (data.images(known)[1] >= 0).all()
    assert torch.isin(data.trust_indices, known).all()


def test_half_of_the_channels_are_noise_that_the_image_decides_and_the_logits_are_as_they_were() -> None:
    torch.manual_seed(0)
    clean, noisy = PanelNetwork().eval(), NoisyPanelNetwork().eval()
    noisy.load_state_dict(clean.state_dict())
    seen: list[torch.Tensor] = []
    noisy.noisy.register_forward_hook(lambda _, inputs, output: seen.append(output))
    images = torch.randn(600, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(noisy(images), clean(images))
        noisy(images[7:9])
        features = torch.nn.Sequential(*list(clean.children())[:9])(images)
    shown, again = seen
    assert torch.equal(shown[7:9], again)  # whatever stands beside it in the batch
    torch.testing.assert_close(shown[:, ::2], features[:, ::2])
    drawn = shown[:, 1::2].double()  # max(0, n) of a normal n, where batch norm has no weights yet
    assert drawn.mean() == pytest.approx((2 * torch.pi) ** -0.5, abs=0.005)
    assert drawn.square().mean() == pytest.approx(0.5, abs=0.01)
    both = torch.corrcoef(torch.stack([drawn.flatten(), features[:, 1::2].double().flatten()]))
    assert both[0, 1].abs() < 0.01
