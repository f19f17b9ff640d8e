"""The losses of a detector without anchors, against loops in float64 that follow the papers."""

from __future__ import annotations

import math

import pytest
import torch

from lqkd.losses.detection import Assigned, assign, fcos_losses, focal_loss, giou_loss
from lqkd.models import positions

AT = positions(64, 96, [8, 16, 32])
BOXES = torch.tensor(
    [[3.0, 5.0, 27.0, 30.0], [10.0, 8.0, 22.0, 20.0], [0.0, 0.0, 96.0, 64.0], [70.0, 30.0, 74.0, 33.0]]
)
LABELS = torch.tensor([2, 0, 1, 1])


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_positions_are_assigned_to_the_smallest_object_of_their_level_near_its_middle() -> None:
    found = assign(BOXES, LABELS, AT, reach=4.0)
    for place, ((x, y), stride) in enumerate(zip(AT.points.tolist(), AT.strides.tolist(), strict=True)):
        low, high = (0 if stride == 8 else 2 * stride), (math.inf if stride == 32 else 4 * stride)
        inside = []
        for label, (x1, y1, x2, y2) in zip(LABELS.tolist(), BOXES.tolist(), strict=True):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
            if min(sides) > 0 and near and low < max(sides) <= high:
                inside.append(((x2 - x1) * (y2 - y1), label, sides))
        if not inside:
            assert (int(found.labels[place]), float(found.centerness[place])) == (-1, 0)
            continue
        _, label, (left, top, right, bottom) = min(inside)
        centerness = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        assert int(found.labels[place]) == label
        assert float(found.centerness[place]) == pytest.approx(centerness, rel=1e-5)
    assert set(found.labels.tolist()) == {-1, 0, 1, 2}


def test_every_size_has_a_level_where_strides_do_not_double() -> None:
    at, label = positions(64, 64, [4, 16, 32]), torch.tensor([0])
    sides = (10, 30, 44, 60)
    boxes = [torch.tensor([[32.0 - side / 2, 32 - side / 2, 32 + side / 2, 32 + side / 2]]) for side in sides]
    found = [int((assign(box, label, at, reach=4.0).labels == 0).sum()) for box in boxes]
    assert min(found) > 0


def test_focal_loss_is_equation_5() -> None:
    logits, labels = numbers(4, 3), torch.tensor([0, 2, -1, 1])
    for row, label in enumerate(labels.tolist()):
        for column in range(3):
            p = 1 / (1 + math.exp(-float(logits[row, column])))
            p_t, alpha = (p, 0.25) if column == label else (1 - p, 0.75)
            expected = -alpha * (1 - p_t) ** 2 * math.log(p_t)
            assert float(focal_loss(logits, labels)[row, column]) == pytest.approx(expected, rel=1e-10)


def test_giou_loss_is_algorithm_1_for_boxes_that_overlap_hold_each_other_or_lie_apart() -> None:
    boxes = torch.tensor([[0, 0, 4, 4], [0, 0, 9, 9], [0, 0, 2, 1]], dtype=torch.float64)
    others = torch.tensor([[1, 2, 5, 6], [2, 3, 4, 5], [5, 7, 6, 9]], dtype=torch.float64)
    areas = [(16, 16, 6, 30), (81, 4, 4, 81), (2, 2, 0, 54)]  # of both, of what they share, of the hull
    expected = [1 - (i / (a + b - i) - (c - (a + b - i)) / c) for a, b, i, c in areas]
    assert giou_loss(boxes, others).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_loss_of_an_image_is_the_same_whatever_else_is_in_the_batch() -> None:
    """So that two processes have the gradient of one, and an image without an object is only background."""
    classes, raw, centerness = (
        numbers(2, len(AT.points), 3),
        numbers(2, len(AT.points), 4).abs(),
        numbers(2, len(AT.points)),
    )
    points = AT.points.double()
    boxes = torch.cat([points - 8 * raw[..., :2], points + 8 * raw[..., 2:]], dim=-1)
    nothing = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    each = [assign(*objects, AT, reach=4.0) for objects in ((BOXES, LABELS), nothing)]
    together = fcos_losses(classes, boxes, centerness, Assigned(*map(torch.stack, zip(*each, strict=True))))
    alone = fcos_losses(classes[:1], boxes[:1], centerness[:1], Assigned(*(part.unsqueeze(0) for part in each[0])))
    assert float(together[0]) == pytest.approx(float(alone[0]), rel=1e-12)
    assert float(together[1]) == pytest.approx(float(focal_loss(classes[1], each[1].labels).sum()), rel=1e-12)
    there = each[0].labels >= 0
    weight = each[0].centerness.double()[there]
    expected = (
        focal_loss(classes[0], each[0].labels).sum() / there.sum()
        + (giou_loss(boxes[0], each[0].boxes.double())[there] * weight).sum() / weight.sum()
        - (
            weight * centerness[0][there].sigmoid().log() + (1 - weight) * (-centerness[0][there]).sigmoid().log()
        ).mean()
    )
    assert float(together[0]) == pytest.approx(float(expected), rel=1e-6)
