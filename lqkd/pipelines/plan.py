"""What is trained to distil a student from a folder of photographs: choices, and the configurations that they make."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lqkd.errors import UsageError, first_line
from lqkd.models.calls import Inputs
from lqkd.pipelines.asked import Asked
from lqkd.pipelines.networks import TRAINED, Network, named, starting_from, trained
from lqkd.pipelines.photographs import Photographs
from lqkd.quantization import Recipe, quantize_model
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import bias_owners
from lqkd.quantization.recipe import parse_bits

FLOAT, TEACHER, STUDENT = "float", "teacher", "student"
"""The trainings, and their folders: the student in floating point, the teacher, the student at few bits."""
_LARGEST = {"cuda": 224, "cpu": 128}
"""Pixels that a network sees unless more are asked for."""
_STEPS = 300
"""Steps that a training aims at: as many epochs as that takes, within limits."""
_IN_FLOAT, _AT_FEW_BITS = (10, 20), (5, 12)
"""Fewest and most epochs; random weights get the most. At few bits an epoch takes several times as long."""
_JUDGES = 50
"""Validation images below which they cannot tell a teacher from chance."""


@dataclass(frozen=True)
class Plan:
    """Everything that was chosen.

    Attributes:
        configs: configurations as ``fit`` takes them, by the name of the training, in order.
        told: the choices, what each is about and what it is.
    """

    configs: dict[str, dict[str, Any]]
    told: list[tuple[str, str]]


@dataclass(frozen=True)
class _Training:
    """What all trainings have in common."""

    found: Photographs
    out: Path
    image_size: int
    batch_size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    asked_epochs: int | None

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return max(1, self.found.train // self.batch_size)

    def epochs(self, fewest: int, most: int) -> int:
        """What was asked for, or as many as the steps that are aimed at take."""
        return self.asked_epochs or min(most, max(fewest, math.ceil(_STEPS / self.steps)))

    def config(
        self, name: str, model: str, settings: Mapping[str, Any], image_size: int, **trainer: Any
    ) -> dict[str, Any]:
        """A configuration of the training ``name``."""
        data: dict[str, Any] = {
            "root": str(self.found.root.resolve()),
            "image_size": image_size,
            "batch_size": self.batch_size,
            "crop_scale": [0.5, 1.0],
        }
        if self.mean is not None and self.std is not None:
            data |= {"mean": list(self.mean), "std": list(self.std)}
        return {
            "seed_everything": 0,
            "run": {"root": str(self.out.parent), "name": self.out.name, "version": name},
            "trainer": {"devices": 1, "enable_model_summary": False, **trainer},
            "model": {"class_path": f"lqkd.modules.{model}", "init_args": dict(settings)},
            "data": {"class_path": "lqkd.data.ImageFolder", "init_args": data},
        }

    def in_float(self, name: str, network: Network) -> dict[str, Any]:
        """The training of a network in floating point."""
        settings: dict[str, Any] = {"network": network.config}
        if network.weights is not None:
            settings |= {"weights": network.weights, "replace_head": True}
        rate = 0.05 if network.weights is None else 0.01
        settings |= {"optimizer": _sgd(rate, 5e-4), "schedule": _cosine()}
        fewest, most = _IN_FLOAT
        epochs = self.epochs(most if network.weights is None else fewest, most)
        size = network.image_size or self.image_size
        return self.config(name, "ClassifierModule", settings, size, max_epochs=epochs)

    def result(self, name: str) -> str:
        """The network that a training leaves."""
        return str(self.out / name / TRAINED)


def plan(asked: Asked, found: Photographs, folder: Path, out: Path) -> Plan:
    """Choose what was not asked for.

    Args:
        asked: the settings.
        found: the data.
        folder: where published weights are kept.
        out: what it will be called when the trainings begin.

    Raises:
        UsageError: when a setting is not possible.
    """
    parse_bits(asked.bits)
    classes = len(found.classes)
    student = _network(asked.student, asked.student_weights, classes, STUDENT, folder, out)
    teacher = None
    if asked.teacher is not None:
        teacher = _network(asked.teacher, asked.teacher_weights, classes, TEACHER, folder, out)
    size, about_size = _image_size(asked, found, student)
    quantization, callbacks, about_bits = _quantization(student, asked.bits, size)
    batch = asked.batch_size or min(32, 2 ** max(1, int(math.log2(max(2, found.train / 2)))))
    training = _Training(found, out, size, batch, student.mean, student.std, asked.epochs)
    configs: dict[str, dict[str, Any]] = {}
    if not student.knows:
        configs[FLOAT] = training.in_float(FLOAT, student)
    if teacher is not None and not teacher.knows:
        configs[TEACHER] = training.in_float(TEACHER, teacher)
    own = student.weights if student.knows else training.result(FLOAT)
    settings = {
        "teacher": _teacher(training, teacher or student, own if teacher is None else None),
        "student": student.config,
        "student_weights": own,
        "quantization": quantization,
        "distillation_loss": {"class_path": "lqkd.losses.HintonKL"},
        "balance": {"class_path": "lqkd.balances.FixedBalance", "init_args": {"task": 0.5, "distill": 0.5}},
        "student_optimizer": _sgd(0.01, 1e-4),
    }
    trainer = {"max_epochs": training.epochs(*_AT_FEW_BITS), "callbacks": callbacks}
    configs[STUDENT] = training.config(STUDENT, "DistillModule", settings, size, **trainer)
    told = [*_about_data(training, about_size), *_about_networks(configs, found, student, teacher)]
    told += [("bits", about_bits), ("learns from", "0.5 of the labels, 0.5 of HintonKL from the teacher")]
    return Plan(configs, [*told, *_about_training(configs, STUDENT, "student_optimizer", "distilled")])


def _network(name: str, weights: str | None, classes: int, setting: str, folder: Path, out: Path) -> Network:
    place = Path(name).expanduser()
    if setting == TEACHER and (place.is_dir() or place.suffix in (".safetensors", ".pt", ".pth", ".ckpt")):
        if weights is not None:
            raise UsageError(f"teacher_weights={weights!r} is not possible beside the run or file teacher={name!r}")
        return trained(place, setting)
    network = named(name, classes, setting)
    file = f"{setting}_pretrained.safetensors"
    return starting_from(network, weights, f"{setting}_weights", folder / file, out / file)


def _teacher(training: _Training, network: Network, own: str | None) -> dict[str, Any]:
    """The teacher, trained already or by the training before; ``own`` is the file of the student's float network."""
    weights = own or (network.weights if network.knows else training.result(TEACHER))
    settings: dict[str, Any] = {
        "network": copy.deepcopy(network.config),
        "weights": weights,
    }  # YAML would have an alias
    if training.found.val < _JUDGES:
        settings["minimum_accuracy"] = 0.0
    if network.knows and network.mean is not None and network.mean != training.mean:
        settings |= {"mean": list(network.mean), "std": list(network.std or ())}
    if network.image_size not in (None, training.image_size):
        settings["image_size"] = network.image_size
    return {"class_path": "lqkd.teachers.FrozenTeacher", "init_args": settings}


def _quantization(student: Network, bits: str, size: int) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Recipe, callbacks and what they are: where possible those with which the file computes what was trained.

    Raises:
        UsageError: when the student could not be exported.
    """
    from lqkd.export.deploy import check_deployable  # whose packages are optional

    callbacks = [{"class_path": "lqkd.callbacks.BatchNormReestimation"}]
    chosen: dict[str, Any] = {"bits": bits}
    told = f"{bits}, 8 in the first and last layer"
    network, _ = quantize_model(student.build(), Recipe(bits=bits))
    try:
        better, _ = quantize_model(student.build(), Recipe(bits=bits, residual_bits=8))
        if not bias_owners(better, foldable(better).folded):
            raise UsageError("no layer has a bias on an integer's grid")
        network, chosen = better, {"bits": bits, "residual_bits": 8}
        callbacks.append({"class_path": "lqkd.callbacks.IntegerBiases"})
        told += " and in additions, biases as integer kernels have them"
    except UsageError as error:
        told += f"; additions and biases stay in floating point: {error}"
    try:
        check_deployable(network, Inputs.of(torch.zeros(2, 3, size, size)))
    except Exception as error:  # of any type, when a network takes no such image
        raise UsageError(f"student={student.name!r} at {bits} could not be exported: {first_line(error)}") from error
    return chosen, callbacks, told


def _image_size(asked: Asked, found: Photographs, student: Network) -> tuple[int, str]:
    if asked.image_size is not None:
        if student.image_size not in (None, asked.image_size):
            raise UsageError(
                f"image_size={asked.image_size} is not possible with {student.name}, which takes {student.image_size}"
            )
        return asked.image_size, f"{asked.image_size} pixels square, as asked"
    if student.image_size is not None:
        return student.image_size, f"{student.image_size} pixels square, the only size that the student takes"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = _LARGEST[device]
    if found.side >= most:
        why = "" if device == "cuda" else ", since there is no GPU; image_size asks for others"
        return most, f"{most} pixels square{why}"
    size = found.side if found.side <= 64 else found.side // 16 * 16
    return size, f"{size} pixels square, of photographs whose shorter side has {found.side}"


def _about_data(training: _Training, about_size: str) -> Iterator[tuple[str, str]]:
    found, names = training.found, training.found.classes
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    yield "data", f"{found.train + found.val + found.test} images of {len(names)} classes: {listed}"
    yield "", f"{found.train} to train, {found.val} to validate, {found.test} to test"
    yield "images", about_size
    yield "", "in training a cut of at least half of a photograph, mirrored half of the time"
    yield "batches", f"{training.batch_size} images, {training.steps} to an epoch"


def _about_networks(
    configs: Mapping[str, Any], found: Photographs, student: Network, teacher: Network | None
) -> Iterator[tuple[str, str]]:
    yield "student", student.name
    yield "", student.told
    yield from _about_training(configs, FLOAT, "optimizer", "first trained in floating point")
    yield "teacher", "the student's own float network" if teacher is None else teacher.name
    if teacher is not None:
        yield "", teacher.told
        yield from _about_training(configs, TEACHER, "optimizer", "first trained")
    if found.val < _JUDGES:
        yield "", f"not compared with chance: {found.val} images to validate are too few"


def _about_training(configs: Mapping[str, Any], name: str, optimizer: str, begins: str) -> Iterator[tuple[str, str]]:
    if name in configs:
        epochs = configs[name]["trainer"]["max_epochs"]
        rate = configs[name]["model"]["init_args"][optimizer]["init_args"]["lr"]
        yield "", f"{begins}: {epochs} epoch{'s' if epochs != 1 else ''}, SGD (lr {rate:g})"


def _sgd(rate: float, decay: float) -> dict[str, Any]:
    return {"class_path": "torch.optim.SGD", "init_args": {"lr": rate, "momentum": 0.9, "weight_decay": decay}}


def _cosine() -> dict[str, Any]:
    return {"class_path": "lqkd.modules.Cosine", "init_args": {"warmup_fraction": 0.05}}
