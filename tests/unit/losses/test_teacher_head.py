"""Losses that ask a detector's teacher: what its head makes of the student's features, and where it sees objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import CWD, BinaryKL, CrossKD, ForegroundWeighted, Hints
from lqkd.losses.taps import Taps
from lqkd.models import SmallFCOS, TorchvisionDetector

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def detector() -> SmallFCOS:
    torch.manual_seed(0)
    network = SmallFCOS(3, width=4, depth=2).double()
    network(IMAGES)  # for the statistics of its batch norms
    return network.eval()


def fcos() -> TorchvisionDetector:
    torch.manual_seed(0)
    network = TorchvisionDetector("fcos_resnet18_fpn", 3, norm="batch_per_level", width=8).double()
    network(IMAGES)
    return network.eval()


def retinanet() -> TorchvisionDetector:
    torch.manual_seed(0)
    network = TorchvisionDetector("retinanet_resnet18_fpn", 3, norm="batch_per_level", width=8).double()
    network(IMAGES)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "tap", "returned"),
    [
        (detector, "pyramid.outputs.1", "classes_16"),
        (detector, "head.class_tower.norms.0.2", "classes_32"),
        (fcos, "backbone.fpn.extra_blocks.p6", "classes_64"),
        (fcos, "head.classification_head.conv.4.0", "classes_8"),
        (retinanet, "head.classification_head.conv.2.1.3", "classes_64"),
    ],
)
def test_what_follows_behind_a_tap_says_what_the_whole_network_says(make: object, tap: str, returned: str) -> None:
    network = make()  # type: ignore[operator]
    with Taps(network, [tap], "teacher").recording() as features:
        maps = network(IMAGES)
    torch.testing.assert_close(network.class_logits_from(tap)(features[0]), maps[returned])


@pytest.mark.parametrize("tap", ["pyramid", "head.box_tower.norms.0.0", "layer1"])
def test_a_tap_that_leads_to_no_class_of_one_level_is_refused(tap: str) -> None:
    with pytest.raises(UsageError, match="is not on the way to the classes of one level"):
        CrossKD().bind_teacher(SmallFCOS(3, width=4, depth=1), tap)
    with pytest.raises(UsageError, match="is not on the way to the classes of one level"):
        CrossKD().bind_teacher(TorchvisionDetector("fcos_resnet18_fpn", 3, norm="batch_per_level", width=8), tap)


def test_a_teacher_that_is_no_detector_is_refused() -> None:
    with pytest.raises(UsageError, match="CrossKD asks the head of a detector, which Linear has not"):
        CrossKD().bind_teacher(nn.Linear(2, 2), "0")
    with pytest.raises(UsageError, match="has a softmax over classes and background"):
        CrossKD().bind_teacher(TorchvisionDetector("ssdlite320_mobilenet_v3_large", 3), "backbone.extra.0")


def test_crosskd_has_a_gradient_where_both_agree_and_refuses_powers_that_have_none() -> None:
    for beta in (0.0, 1.0, 1.5):
        loss, features = CrossKD(beta), torch.ones(2, 8, 8, 8, dtype=torch.float64, requires_grad=True)
        loss.bind_teacher(detector(), "pyramid.outputs.0")
        loss(features.detach(), features).sum().backward()
        assert features.grad is not None
        assert features.grad.isfinite().all()
    for refused in (0.5, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"beta={refused} is not possible: it must be 0, or a number from 1 on"):
            CrossKD(refused)


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 8, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_cross_head_distillation_is_the_quality_focal_loss_of_the_teachers_head(beta: float) -> None:
    network, (teacher, student) = detector(), pair()
    loss = CrossKD(beta)
    loss.bind_teacher(network, "pyramid.outputs.1")
    head = network.class_logits_from("pyramid.outputs.1")
    with torch.no_grad():
        known, crossed = (sigmoid(head(x).numpy()) for x in (teacher, student))
    entropy = -(known * np.log(crossed) + (1 - known) * np.log(1 - crossed))
    expected = np.abs(known - crossed) ** beta * entropy
    np.testing.assert_allclose(loss(teacher, student).detach().numpy(), expected, rtol=1e-10)
    student.requires_grad_()
    before = [value.clone() for value in network.state_dict().values()]
    loss.reduce(loss(teacher, student)).backward()
    assert float(student.grad.abs().min()) > 0  # type: ignore[union-attr]
    assert all(map(torch.equal, before, network.state_dict().values()))
    assert not list(loss.parameters())


def test_a_foreground_weight_is_the_teachers_surest_class_over_its_mean() -> None:
    network, (teacher, student) = detector(), pair()
    loss = ForegroundWeighted(Hints())
    loss.bind_teacher(network, "pyramid.outputs.0")
    with torch.no_grad():
        logits = network.class_logits_from("pyramid.outputs.0")(teacher).numpy()
    richness = sigmoid(logits).max(axis=1, keepdims=True)
    expected = (teacher - student).numpy() ** 2 * richness / richness.mean()
    np.testing.assert_allclose(loss(teacher, student).numpy(), expected, rtol=1e-10)
    assert float(loss.reduce(loss(teacher, student))) == pytest.approx(expected.mean())


def test_a_foreground_weight_of_what_has_no_map_of_features_is_refused() -> None:
    with pytest.raises(UsageError, match="ForegroundWeighted is not possible around BinaryKL"):
        ForegroundWeighted(BinaryKL())


def test_a_weighted_channel_wise_loss_sums_over_positions_as_it_does_alone() -> None:
    network, (teacher, student) = detector(), pair()
    loss = ForegroundWeighted(CWD())
    loss.bind_teacher(network, "pyramid.outputs.0")
    assert float(loss.reduce(loss(teacher, student))) == pytest.approx(float(loss(teacher, student).sum((2, 3)).mean()))
