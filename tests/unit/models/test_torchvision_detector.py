"""torchvision's detectors as networks that return maps, held against torchvision's own whole detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import resnet18

from lqkd.errors import UsageError
from lqkd.models import TorchvisionDetector, load_weights
from lqkd.tasks import Asked, TorchvisionDetection

NAMES = ("fcos_resnet18_fpn", "retinanet_resnet18_fpn", "ssdlite320_mobilenet_v3_large")
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[4.0, 5, 40, 60], [20, 2, 90, 30]])
NONE = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def small(name: str, **settings: Any) -> TorchvisionDetector:
    torch.manual_seed(0)
    return TorchvisionDetector(name, 3, **settings | ({} if "ssd" in name else {"width": 64}))


def whole(network: TorchvisionDetector, task: TorchvisionDetection) -> nn.Module:
    """torchvision's own detector with the same weights, whose transform leaves images as they are."""
    as_is = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    limits = {"score_thresh": task.min_score, "nms_thresh": task.overlap, "detections_per_img": task.most_objects}
    if network.family == "ssdlite":
        made = detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4, **as_is, **limits
        )
        made.transform.fixed_size = (96, 64)  # width and height
    else:
        settings = {"min_size": 64, "max_size": 96, **as_is, **limits}
        if network.family == "fcos":
            made = detection.FCOS(network.backbone, 3, head=FCOSHead(64, 1, 3), **settings)
        else:
            made = detection.RetinaNet(network.backbone, 3, head=RetinaNetHead(64, 9, 3), **settings)
    made.load_state_dict(network.state_dict())
    return made


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_objects_are_those_of_torchvision(name: str) -> None:
    network = small(name)
    task = TorchvisionDetection(network.family, 3, min_score=0.001, most_objects=20)  # type: ignore[arg-type]
    theirs, background = whole(network, task), int(network.family == "ssdlite")
    labels = torch.tensor([0, 2])
    batch = (IMAGES, [{"boxes": BOXES, "labels": labels}, NONE])
    given = [{"boxes": BOXES, "labels": labels + background}, NONE]
    for training in (True, False):
        network.train(training), theirs.train(training)
        answers = task.outputs(network(IMAGES), Asked("student", 2))
        if training:
            expected = sum(theirs(list(IMAGES), given).values())
            torch.testing.assert_close(task.loss(answers, batch), expected)
            network.load_state_dict(theirs.state_dict())  # of one batch, counted once by each
            continue
        task.check_batch(answers, batch)
        found = task.predictions(answers, batch)
        for ours, objects in zip(found, theirs(list(IMAGES)), strict=True):
            count = len(objects["scores"])
            assert count > 0
            torch.testing.assert_close(ours[:count, :4], objects["boxes"])
            torch.testing.assert_close(ours[:count, 4], objects["scores"])
            assert torch.equal(ours[:count, 5].long(), objects["labels"] - background)
            assert not ours[count:].any()


@pytest.mark.parametrize("name", NAMES)
def test_weights_for_coco_become_those_of_its_eighty_categories(name: str, tmp_path: Any) -> None:
    settings: dict[str, Any] = {} if "ssd" in name else {"width": 64}
    theirs = TorchvisionDetector(name, 90 if "ssd" in name else 91, **settings)
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    ours = TorchvisionDetector(name, 80, **settings)
    load_weights(ours, str(tmp_path / "coco.pth"))
    maps = [network.eval()(IMAGES[:1]) for network in (theirs, ours)]
    logits = [of[next(iter(of))][0, :, 0, 0] for of in maps]
    if "ssd" in name:
        all_of, some_of = logits[0].view(-1, 91), logits[1].view(-1, 81)[:, 1:]
    else:
        all_of, some_of = logits[0].view(-1, 91), logits[1].view(-1, 80)
    person, bicycle, toothbrush = 1, 2, 90  # COCO's numbers of the first, second and last category
    assert torch.equal(some_of[:, [0, 1, -1]], all_of[:, [person, bicycle, toothbrush]])
    assert torch.equal(*(of["boxes_64"] for of in maps))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backbone_begins_with_weights_for_imagenet(frozen: bool, tmp_path: Any) -> None:
    resnet = resnet18(num_classes=2)
    for norm in (module for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    given = {"width": 64, "frozen_norm": frozen, "backbone_weights": str(tmp_path / "resnet18.pth")}
    body: Any = TorchvisionDetector("retinanet_resnet18_fpn", 3, **given).backbone.eval()
    resnet.eval()
    expected = resnet.layer2(resnet.layer1(resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(IMAGES))))))
    torch.testing.assert_close(body.body(IMAGES)["0"], expected)
    with pytest.raises(
        UsageError, match=r"are not those of torchvision's resnet34: 'layer1\.2\.conv1\.weight' differs"
    ):
        TorchvisionDetector("retinanet_resnet34_fpn", 3, **given)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"name": "fasterrcnn_resnet50_fpn"}, "is no detector that is known"),
        ({"name": "fcos_resnet18_fpn", "num_classes": 0}, "num_classes=0"),
        ({"name": "fcos_resnet18_fpn", "norm": "batch"}, "norm='batch'"),
        ({"name": "fcos_resnet18_fpn", "width": 48}, "width=48 is not possible with group norm"),
        ({"name": NAMES[2], "frozen_norm": True}, "frozen_norm is not possible with ssdlite320"),
    ],
)
def test_a_detector_that_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        TorchvisionDetector(**{"num_classes": 3} | settings)
