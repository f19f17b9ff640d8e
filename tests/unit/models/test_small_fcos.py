"""The small detector, and the objects in what it says."""

from __future__ import annotations

import torch

from lqkd.losses.detection import assign
from lqkd.models import SmallFCOS, detections, positions


def test_the_default_detector_is_small() -> None:
    assert sum(parameter.numel() for parameter in SmallFCOS().parameters()) < 1e6


def test_what_positions_are_to_say_is_decoded_to_the_objects_they_were_assigned_to() -> None:
    at = positions(128, 128, [8, 16, 32])
    boxes = torch.tensor([[4.0, 6, 30, 28], [60, 50, 126, 120], [64, 8, 84, 24]])
    labels = torch.tensor([1, 0, 2])
    assigned = assign(boxes, labels, at, reach=2.0)
    classes = torch.full((1, len(at.points), 3), -9.0)
    for place in (assigned.labels >= 0).nonzero().flatten().tolist():
        classes[0, place, assigned.labels[place]] = 5.0
    (found,) = detections(
        classes, assigned.boxes.unsqueeze(0), assigned.centerness.logit(eps=1e-4).unsqueeze(0), (128, 128)
    )
    seen = {(int(label), *box) for label, box in zip(found["labels"], found["boxes"].tolist(), strict=True)}
    assigned_to = {
        (int(assigned.labels[place]), *assigned.boxes[place].tolist())
        for place in (assigned.labels >= 0).nonzero().flatten().tolist()
    }
    assert seen == assigned_to
    assert len(seen) == 3
    assert bool((found["scores"].diff() <= 0).all())


def test_a_surer_answer_hides_what_overlaps_it_in_its_own_class_only() -> None:
    boxes = torch.tensor([[[4.0, 6, 30, 28], [5, 6, 30, 28], [4, 6, 31, 28]]])
    classes = torch.tensor([[[5.0, -9], [3, -9], [-9, 4]]])  # twice the first class, then the second
    (found,) = detections(classes, boxes, torch.full((1, 3), 9.0), (32, 32))
    assert found["labels"].tolist() == [0, 1]
    assert found["boxes"].tolist() == [[4, 6, 30, 28], [4, 6, 31, 28]]
