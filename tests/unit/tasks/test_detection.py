"""The task of detection: what a batch is, what is measured, and which layers keep 8 bits."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.models import SmallFCOS
from lqkd.quantization import Recipe, Rule, quantize_model
from lqkd.quantization.quantizers import LevelwiseStep
from lqkd.tasks import Asked, Detection
from lqkd.tasks.average_precision import box_metrics
from lqkd.tasks.scenes import Objects

NAMES = ["cat", "dog", "bird"]


def predicted(images: int) -> tuple[list[dict[str, torch.Tensor]], list[Objects]]:
    """Boxes of all sizes, found in part, moved, of another class, twice, or not at all."""
    draw = torch.Generator().manual_seed(0)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=draw)

    found, true = [], []
    for image in range(images):
        count = image % 5  # of which some images have none
        corners, sides = uniform(count, 2, high=300), uniform(count, 2, low=8, high=160)
        boxes, labels = torch.cat([corners, corners + sides], 1), torch.randint(0, 3, (count,), generator=draw)
        moved = torch.cat([boxes + uniform(count, 4, low=-0.1, high=0.1) * sides.repeat(1, 2), boxes[: count // 2] + 9])
        said = torch.cat([labels, (labels[: count // 2] + image) % 3])
        kept = uniform(len(moved)) < 0.85
        found.append({"boxes": moved[kept], "labels": said[kept], "scores": uniform(int(kept.sum()))})
        true.append(Objects(boxes, labels))
    return found, true


def by_pycocotools(found: list[dict[str, torch.Tensor]], true: list[Objects]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(image: int, box: list[float], label: int, **more: Any) -> dict[str, Any]:
        sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        area = sides[2] * sides[3]
        return {"image_id": image, "bbox": sides, "category_id": label, "area": area, "iscrowd": 0} | more

    truths = [
        (n, b, c) for n, one in enumerate(true) for b, c in zip(one.boxes.tolist(), one.labels.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(true))],
            "categories": [{"id": label, "name": name} for label, name in enumerate(NAMES)],
            "annotations": [entry(n, b, c, id=place) for place, (n, b, c) in enumerate(truths, 1)],
        }
        coco.createIndex()
        answers = [
            entry(image, box, label, score=score)
            for image, one in enumerate(found)
            for box, label, score in zip(*(one[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
        ]
        evaluation = COCOeval(coco, coco.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_map_is_that_of_pycocotools() -> None:
    found, true = predicted(40)
    metrics = box_metrics(NAMES)
    for start in range(0, 40, 7):
        metrics.update(found[start : start + 7], true[start : start + 7])
    ours, theirs = metrics.compute(), by_pycocotools(found, true)
    numbers = [float(ours[name]) for name in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")]
    assert numbers == pytest.approx(theirs.stats[:6].tolist(), abs=5e-5)
    assert 0.2 < numbers[0] < 0.9
    precisions = theirs.eval["precision"][:, :, :, 0, 2]  # (overlaps, recalls, classes) of all sizes, 100 an image
    by_class = [float(precisions[:, :, label].mean()) for label in range(3)]
    assert [float(ours[f"map_of_{name}"]) for name in NAMES] == pytest.approx(by_class, abs=5e-5)


def test_what_no_object_says_anything_about_is_not_a_number() -> None:
    metrics = box_metrics(NAMES)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    metrics.update([nothing], [Objects(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1]))])
    measured = metrics.compute()
    assert float(measured["map_of_dog"]) == 0.0
    assert all(measured[name].isnan() for name in ("map_of_cat", "map_large"))


def test_without_an_image_that_has_targets_no_number_is_there() -> None:
    measured = box_metrics(NAMES).compute()
    assert len(measured) == 9
    assert all(value.isnan() for value in measured.values())


def test_images_of_several_sizes_are_padded_to_one_that_the_network_takes() -> None:
    task = Detection(NAMES)
    images = [torch.ones(3, 40, 64), torch.ones(3, 33, 70)]
    targets = [{"boxes": torch.tensor([[1.0, 2, 30, 36]]), "labels": torch.tensor([2])}] * 2
    batch = (images, targets)
    padded = task.inputs(batch)
    assert (padded.shape, float(padded.sum())) == ((2, 3, 64, 96), 3.0 * (40 * 64 + 33 * 70))
    network = SmallFCOS(3, width=4, depth=1)
    outputs = task.outputs(network(padded), Asked("network", 2))
    task.check_batch(outputs, batch)
    assert task.rows(outputs, batch).logits.shape == (2 * (8 * 12 + 4 * 6 + 2 * 3), 3)
    task.loss(outputs, batch).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ({"boxes": [[1, 2, 9, 9]], "labels": [3]}, "label 3 of a box is out of range: the task has 3 classes"),
        ({"boxes": [[9, 2, 1, 9]], "labels": [0]}, r"the box \[9.0, 2.0, 1.0, 9.0\] has no area"),
        ({"boxes": [[9, 2, math.inf, 9]], "labels": [0]}, r"the box \[9.0, 2.0, inf, 9.0\] has no area"),
        ({"boxes": [[40, 2, 50, 9]], "labels": [0]}, "lies outside of its image of 32x32 pixels"),
        ({"boxes": [[1, 2, 9, 9]], "labels": [0, 1]}, r"has boxes \(1, 4\) and labels \(2,\)"),
        ({"boxes": [[1, 2, 9, 9]]}, "a target of the batch has 'boxes': a dict with 'boxes' and 'labels' is needed"),
    ],
)
def test_targets_that_cannot_be_are_refused(target: dict[str, Any], complaint: str) -> None:
    task, images = Detection(3), torch.zeros(1, 3, 32, 32)
    tensors = {
        key: torch.tensor(value, dtype=torch.float32 if key == "boxes" else None) for key, value in target.items()
    }
    outputs = task.outputs(SmallFCOS(3, width=4, depth=1).eval()(images), Asked("network", 1))
    with pytest.raises(UsageError, match=complaint):
        task.check_batch(outputs, (images, [tensors]))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"classes": 2.0}, "classes=2.0 is not possible: a whole number or a list of names"),
        ({"classes": True}, "classes=True is not possible"),
        ({"classes": ["a.b", "a_b"]}, "classes 'a.b' and 'a_b' would both be logged as 'map_of_a_b'"),
        ({"strides": "abc"}, "strides='abc' is not possible: whole numbers that rise"),
        ({"strides": [8.5, 16]}, "is not possible: whole numbers that rise"),
        ({"reach": "x"}, "reach='x' of task Detection is not possible: a number above 0 is needed"),
        ({"most_objects": 1.5}, "most_objects=1.5 of task Detection is not possible: a whole number is needed"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Detection(**{"classes": 3} | settings)


def test_a_list_of_images_is_a_batch_without_targets() -> None:
    task, images = Detection(3), [torch.ones(3, 40, 64), torch.ones(3, 33, 70), torch.ones(3, 32, 32)]
    assert task.unlabelled(images)
    part = task.part(images, slice(1, 3))
    assert [one.shape for one in part] == [image.shape for image in images[1:]]
    assert task.inputs(part).shape == (2, 3, 64, 96)


def test_every_row_knows_its_image() -> None:
    task, images = Detection(3), [torch.ones(3, 40, 64), torch.ones(3, 33, 70)]
    rows = task.rows(torch.arange(2.0).view(2, 1, 1).expand(2, 84, 8), images)
    of_rows, count = task.samples_of_rows(rows, images)
    assert count == 2
    assert torch.equal(of_rows.float(), rows.logits[:, 0])


def test_the_layers_that_answer_keep_8_bits_unless_the_recipe_says_otherwise() -> None:
    def bits(**settings: Any) -> dict[str, tuple[int, bool]]:
        network = SmallFCOS(3, width=4, depth=1)
        model, _ = quantize_model(network, Detection(3).recipe(Recipe("w2a2", **settings), network))
        layers = {name: model.get_submodule(name) for name in (*SmallFCOS.last_layers, "head.box_tower.convolutions.0")}
        assert all(isinstance(layer.input_quantizer, LevelwiseStep) for layer in layers.values())
        return {name: (layer.weight_quantizer.bits, layer.input_quantizer.shared) for name, layer in layers.items()}

    last, of_tower = dict.fromkeys(SmallFCOS.last_layers, (8, False)), {"head.box_tower.convolutions.0": (2, False)}
    assert bits() == last | of_tower
    assert bits(rules=[Rule("head.boxes", weight_bits=4)]) == last | {"head.boxes": (4, False)} | of_tower
    assert bits(last_layer_bits=None, per_level=False) == dict.fromkeys([*last, *of_tower], (2, True))


def test_inputs_on_other_grids_than_lsq_have_one_for_all_levels() -> None:
    towers = {"head.class_tower.convolutions.0", "head.box_tower.convolutions.0"}
    for settings, levelled in (
        ({"activation_quantizer": "pact"}, set()),
        ({"bits": "w1a1"}, set(SmallFCOS.last_layers)),  # which keep 8 bits
        ({"rules": [Rule("head.boxes", activation_quantizer="minmax")]}, towers | {"head.classes", "head.centerness"}),
    ):
        network = SmallFCOS(3, width=4, depth=1)
        model, _ = quantize_model(network, Detection(3).recipe(Recipe(**settings), network))
        layers = dict(model.named_modules())
        found = {name for name in layers if isinstance(layers.get(f"{name}.input_quantizer"), LevelwiseStep)}
        assert found == levelled
