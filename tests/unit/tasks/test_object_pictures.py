"""Which found objects are there, and how photographs with them are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torchvision.ops import box_iou

from lqkd.tasks.object_pictures import are_there, drawn_over, found_beside_truth, pixels_of
from lqkd.utils.figures import finding_of


def rows(boxes: torch.Tensor, labels: torch.Tensor, scores: list[float]) -> torch.Tensor:
    return torch.cat([boxes, torch.tensor(scores)[:, None], labels[:, None].float()], dim=1)


def test_an_object_is_there_once_in_its_place_and_class() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.rand(2, 30, 2, generator=generator) * 20
        boxes = torch.cat([corners[0], corners[0] + 5 + corners[1]], dim=1)
        labels = torch.randint(2, (30,), generator=generator)
        (found, there), (classes, of_there) = boxes.split([20, 10]), labels.split([20, 10])
        left, expected = set(range(10)), []
        for one, of_class in zip(found, classes, strict=True):  # the surest takes what it overlaps the most
            overlaps = {i: float(box_iou(one[None], there[i][None])) for i in left if of_there[i] == of_class}
            best = max(overlaps, key=lambda i: overlaps[i], default=-1)
            expected.append(best >= 0 and overlaps[best] >= 0.5)
            left -= {best} if expected[-1] else set()
        assert are_there(found, classes, there, of_there).tolist() == expected


def test_nothing_is_right_where_nothing_is_there() -> None:
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert are_there(torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), *nothing).tolist() == [False, False]
    assert are_there(*nothing, torch.rand(2, 4), torch.zeros(2, dtype=torch.int64)).tolist() == []


def test_the_title_says_how_many_each_network_finds() -> None:
    boxes, labels = torch.tensor([[10.0, 10, 40, 40], [50, 50, 80, 80]]), torch.tensor([0, 1])
    photograph = np.zeros((96, 96, 3), np.uint8)
    found = {
        "teacher": rows(boxes, labels, [0.9, 0.8])[None],
        "student": rows(boxes, torch.tensor([0, 0]), [0.9, 0.8])[None],  # one of another class
        "other": rows(boxes, labels, [0.9, 0.4])[None],  # one that is not sure
    }
    figure = found_beside_truth([photograph], [(boxes, labels)], found, ["a", "b"])
    assert finding_of(figure).startswith(
        "Of 2 labelled objects the teacher finds 2, the student finds 1, the other finds 1;"
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "labels: 2 objects",
        "teacher: 2 of them, 0 others",
        "student: 1 of them, 1 others",
        "other: 1 of them, 0 others",
    ]


def test_boxes_in_pixels_of_what_the_network_sees_are_drawn_on_a_larger_photograph() -> None:
    photograph = np.full((480, 640, 3), 128, np.uint8)
    small, large = torch.tensor([[20.0, 20, 60, 60]]), torch.tensor([[80.0, 80, 240, 240]])
    label = torch.tensor([0])
    drawn = drawn_over(photograph, rows(small, label, [0.9]), (120, 160), ["a"])
    assert (
        drawn == drawn_over(photograph, rows(large, label, [0.9]), (480, 640), ())
    ).mean() > 0.99  # but for the name
    assert (drawn != photograph).any()


def test_what_was_normalised_is_a_photograph_again() -> None:
    pixels = torch.randint(256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    seen = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    again = np.stack(pixels_of(seen, mean, std))
    assert (again == pixels.permute(0, 2, 3, 1).numpy()).all()
