"""torchvision's detectors as students: quantised, trained, and written as one integer file of maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

import lqkd
from lqkd.data import DigitScenes
from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.losses import PKD, BinaryKL, HintonKL
from lqkd.models import TorchvisionDetector
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe, Rule, initialize_quantizers, quantize_model, reestimate_batchnorm
from lqkd.quantization.layers import QuantizedLayer
from lqkd.quantization.quantizers import LevelwiseStep
from lqkd.tasks import Asked, TorchvisionDetection
from lqkd.teachers import FrozenTeacher

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TARGETS = [{"boxes": torch.tensor([[4.0, 5, 40, 60]]), "labels": torch.tensor([1])}] * 4
DETECTORS: dict[str, dict[str, Any]] = {
    "fcos": {"name": "fcos_resnet18_fpn", "norm": "batch_per_level", "width": 16},
    "retinanet": {"name": "retinanet_resnet18_fpn", "frozen_norm": True, "width": 16},
    "ssdlite": {"name": "ssdlite320_mobilenet_v3_large"},
}


def built(family: str, classes: int = 3) -> TorchvisionDetector:
    torch.manual_seed(0)
    network = TorchvisionDetector(**DETECTORS[family], num_classes=classes)
    for name, buffer in network.named_buffers():  # of frozen norms, which are no identity in weights that are loaded
        if DETECTORS[family].get("frozen_norm"):
            buffer.copy_(
                0.5 + torch.rand(buffer.shape) if name.endswith("var") else torch.randn(buffer.shape) * 0.2 + 0.5
            )
    reestimate_batchnorm(network, [IMAGES])  # or values would vanish in a network that is not trained
    return network


def parity(model: onnx.ModelProto) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(one.value for one in model.metadata_props if one.key == "lqkd.parity"))
    return found


@pytest.mark.parametrize("family", DETECTORS)
def test_a_student_becomes_an_integer_file_with_every_map_as_trained(family: str) -> None:
    task: Any = TorchvisionDetection(family, 3)  # type: ignore[arg-type]
    network = built(family)
    student, report = quantize_model(network, task.recipe(Recipe("w4a4", residual_bits=8), network))
    initialize_quantizers(student, IMAGES)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.001)
    task.loss(task.outputs(student(IMAGES), Asked("student", 4)), (IMAGES, TARGETS)).backward()
    optimizer.step()
    bits = {row.name: row.weight_bits for row in report.layers}
    assert {bits[name] for name in network.last_layers} == {8}
    assert any(isinstance(one, LevelwiseStep) for one in student.modules()) == (family != "ssdlite")
    model = to_onnx(student, IMAGES, calibration=[IMAGES], task=task)
    assert parity(model)["passed"]
    returned = [output.name for output in model.graph.output]
    assert returned == [*student.eval()(IMAGES[:1])]
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"NonMaxSuppression", "BatchNormalization", "TopK"}


def test_group_norm_of_a_head_is_refused_at_export_with_what_helps() -> None:
    network, task = TorchvisionDetector("fcos_resnet18_fpn", 3, width=64), TorchvisionDetection("fcos", 3)
    student, _ = quantize_model(network, task.recipe(Recipe("w4a4"), network))
    initialize_quantizers(student, IMAGES)
    with pytest.raises(UsageError, match=r"operator GroupNorm in head.classification_head.conv.1 .*batch_per_level"):
        to_onnx(student, IMAGES, calibration=[IMAGES], task=task)


def test_a_whole_detector_of_torchvision_is_refused_with_what_to_take_in_its_place() -> None:
    from torchvision.models.detection import fcos_resnet50_fpn

    network = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(UsageError, match=r"FCOS of torchvision .* take lqkd.models.TorchvisionDetector"):
        TorchvisionDetection("fcos", 3).recipe(Recipe("w4a4"), network)


def test_a_distillation_by_default_compares_what_the_detector_predicts_and_leaves_a_picture(tmp_path: Path) -> None:
    network = TorchvisionDetector("ssdlite320_mobilenet_v3_large", 3)
    batches = [(IMAGES, TARGETS)]
    made = lqkd.distill(
        network,
        train=batches,
        test=batches,
        task=TorchvisionDetection("ssdlite", 3),
        folder=tmp_path / "run",
        epochs=1,
        trainer={"enable_progress_bar": False, "accelerator": "cpu"},
    )
    said = yaml.safe_load((made.folder / "config.yaml").read_text())
    assert said["python"]["distillation"] == {"distill": "HintonKL"}
    assert (made.folder / "boxes.png").exists()


class Watched(DigitScenes):
    """Scenes that are small."""

    def __init__(self) -> None:
        super().__init__(scenes=60, image_size=(64, 64), batch_size=4, eval_batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("family", DETECTORS)
def test_after_twenty_steps_of_distillation_every_map_of_the_file_is_that_of_the_student(family: str) -> None:
    task = TorchvisionDetection(family, 10)  # type: ignore[arg-type]
    level = "backbone.fpn.layer_blocks.0" if family != "ssdlite" else "backbone.extra.0"
    float_network, data = built(family, 10), Watched()
    module = DistillModule(
        student=built(family, 10),
        teachers={"own": FrozenTeacher(float_network, minimum_accuracy=0.0, precision="fp32")},
        distillation={
            "classes": Term(HintonKL() if family == "ssdlite" else BinaryKL(), "own"),
            "pyramid": Term(PKD(), "own", taps=[Tap(level, level)]),
        },
        task=task,
        quantization=Recipe("w4a4", residual_bits=8),
        student_optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
    )
    before = {name: value.clone() for name, value in module.student.named_parameters()}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=20, limit_val_batches=1, enable_model_summary=False, **quiet
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 20
    assert any(not torch.equal(before[name], value) for name, value in module.student.named_parameters())
    images = seen(data)
    model = to_onnx(module.student, images[:4], calibration=[images], test=[images], task=task)
    found = parity(model)
    assert found["passed"]
    assert len(found["outputs"]) == len(module.student.eval()(images[:1]))


def seen(data: DigitScenes) -> Tensor:
    batch: Any = next(iter(data.val_dataloader()))
    prepared = data.preprocess(batch, train=False, epoch=0)
    return prepared.images


@pytest.mark.parametrize("bits", [4, 32])
def test_a_frozen_backbone_stays_as_it_is_quantised_or_not(bits: int) -> None:
    student = built("retinanet", 10)
    student.backbone.body.requires_grad_(False)
    module = DistillModule(
        student=student,
        teachers={"own": FrozenTeacher(built("retinanet", 10), minimum_accuracy=0.0, precision="fp32")},
        distillation={"classes": Term(BinaryKL(), "own")},
        task=TorchvisionDetection("retinanet", 10),
        quantization=Recipe("w4a4", rules=[Rule("backbone.body.*", weight_bits=bits, activation_bits=bits)]),
        student_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    )
    names = [name for name in built("retinanet", 10).state_dict() if name.startswith("backbone.body.")]
    before = {name: value.clone() for name, value in module.student.state_dict().items()}
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "enable_model_summary": False}
    Trainer(accelerator="cpu", devices=1, **settings, **quiet).fit(module, datamodule=Watched())
    after = module.student.state_dict()
    quantised = isinstance(module.student.backbone.body.layer1[0].conv1, QuantizedLayer)
    assert quantised == (bits == 4)
    assert all(torch.equal(after[name], before[name]) for name in names)
    head = "head.classification_head.cls_logits.weight"
    assert not torch.equal(after[head], before[head])


def test_a_frozen_batch_norm_stays_as_it_is_while_the_student_trains() -> None:
    network, task = built("retinanet"), TorchvisionDetection("retinanet", 3)
    norms = {name: of.clone() for name, of in network.named_buffers() if "bn" in name}
    network.train()
    task.loss(task.outputs(network(IMAGES), Asked("student", 4)), (IMAGES, TARGETS)).backward()
    assert norms
    assert all(torch.equal(of, norms[name]) for name, of in network.named_buffers() if name in norms)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
