"""What is trained to distil a student from a folder: choices, and the configurations that they make."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lqkd.errors import UsageError, first_line
from lqkd.models.calls import Inputs
from lqkd.pipelines.asked import Asked
from lqkd.pipelines.found import Boxed, Found, Pairs, Photographs, Texts
from lqkd.pipelines.networks import TOPICS, TRAINED, Network, detector, language_model, named, starting_from, trained
from lqkd.quantization import Recipe, Rule, quantize_model
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import bias_owners
from lqkd.quantization.recipe import BLOCK_FORMATS, parse_bits

FLOAT, TEACHER, STUDENT = "float", "teacher", "student"
"""The trainings, and their folders: the student in floating point, the teacher, the student at few bits."""
_LARGEST = {"cuda": 224, "cpu": 128}
"""Pixels that a network sees unless more are asked for."""
_LARGEST_WITH_BOXES = {"cuda": 480, "cpu": 192}
"""Likewise of the shorter side, where things are to be found that are smaller than the image."""
_STEPS = 300
"""Steps that a training aims at: as many epochs as that takes, within limits."""
_AT_FEW_BITS = (5, 12)
"""Fewest and most epochs; at few bits one takes several times as long."""
_OF_LANGUAGE: list[dict[str, Any]] = [
    {"match": "Embedding", "weight_bits": 8},
    {"match": "head", "weight_bits": 8, "activation_bits": 32},
]
"""What has more bits in a language model."""
Size = int | tuple[int, int]
"""Pixels of what networks see: the side of a square, or height and width."""
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

    found: Found
    out: Path
    image_size: Size | None
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
        self, name: str, model: str, settings: Mapping[str, Any], image_size: Size | None, **trainer: Any
    ) -> dict[str, Any]:
        """A configuration of the training ``name``."""
        described = self.found.data()
        data: dict[str, Any] = {**described["init_args"], "batch_size": self.batch_size}
        if image_size is not None:
            data["image_size"] = image_size if isinstance(image_size, int) else [*image_size]
        task = self.found.task_at(image_size)
        if task is not None:
            settings = {**settings, "task": task}
        if self.mean is not None and self.std is not None:
            data |= {"mean": list(self.mean), "std": list(self.std)}
        return {
            "seed_everything": 0,
            "run": {"root": str(self.out.parent), "name": self.out.name, "version": name},
            "trainer": {"devices": 1, "enable_model_summary": False, **trainer},
            "model": {"class_path": f"lqkd.modules.{model}", "init_args": dict(settings)},
            "data": {"class_path": described["class_path"], "init_args": data},
        }

    def in_float(self, name: str, network: Network) -> dict[str, Any]:
        """The training of a network in floating point."""
        settings: dict[str, Any] = {"network": network.config}
        if network.weights is not None:
            settings |= {"weights": network.weights, "replace_head": True}
        anew, onwards, _ = self.found.optimizers
        optimizer = copy.deepcopy(anew if network.weights is None else onwards)  # YAML would have an alias
        settings |= {"optimizer": optimizer, "schedule": _cosine()}
        fewest, most = self.found.epochs_in_float
        epochs = self.epochs(most if network.weights is None else fewest, most)
        size = network.image_size or self.image_size
        return self.config(name, "ClassifierModule", settings, size, max_epochs=epochs)

    def result(self, name: str) -> str:
        """The network that a training leaves."""
        return str(self.out / name / TRAINED)


def plan(asked: Asked, found: Photographs | Pairs | Boxed | Texts, folder: Path, out: Path) -> Plan:
    """Choose what was not asked for.

    Args:
        asked: the settings.
        found: the data.
        folder: where published weights are kept.
        out: what it will be called when the trainings begin.

    Raises:
        UsageError: when a setting is not possible.
    """
    bits = asked.bits or found.bits
    parse_bits(bits)
    student = _network(asked.student or found.student, asked.student_weights, found, STUDENT, folder, out)
    teacher = None
    if asked.teacher is not None:
        teacher = _network(asked.teacher, asked.teacher_weights, found, TEACHER, folder, out)
    size, about_size = _image_size(asked, found, student)
    quantization, callbacks, about_bits = _quantization(student, bits, size)
    batch = asked.batch_size or min(found.most_in_batch, 2 ** max(1, int(math.log2(max(2, found.train / 2)))))
    training = _Training(found, out, size, batch, student.mean, student.std, asked.epochs)
    configs: dict[str, dict[str, Any]] = {}
    if not student.knows:
        configs[FLOAT] = training.in_float(FLOAT, student)
    if teacher is not None and not teacher.knows:
        configs[TEACHER] = training.in_float(TEACHER, teacher)
    own = student.weights if student.knows else training.result(FLOAT)
    of_teacher, learns = found.distils(student.config)
    settings = {
        "teacher": _teacher(training, teacher or student, own if teacher is None else None),
        "student": student.config,
        "student_weights": own,
        "quantization": quantization,
        **of_teacher,
        "student_optimizer": copy.deepcopy(found.optimizers[2]),
    }
    trainer = {"max_epochs": training.epochs(*_AT_FEW_BITS), "callbacks": callbacks}
    configs[STUDENT] = training.config(STUDENT, "DistillModule", settings, size, **trainer)
    told = [*_about_data(training, about_size), *_about_networks(configs, found, student, teacher)]
    told += [("bits", about_bits), ("learns from", learns)]
    return Plan(configs, [*told, *_about_training(configs, STUDENT, "student_optimizer", "distilled")])


def _network(
    name: str, weights: str | None, found: Photographs | Pairs | Boxed | Texts, setting: str, folder: Path, out: Path
) -> Network:
    place = Path(name).expanduser()
    if setting == TEACHER and (place.is_dir() or place.suffix in (".safetensors", ".pt", ".pth", ".ckpt")):
        if weights is not None:
            raise UsageError(f"teacher_weights={weights!r} is not possible beside the run or file teacher={name!r}")
        return trained(place, setting)
    if isinstance(found, Texts):
        network, weights = language_model(name, weights, setting)
    elif isinstance(found, Boxed):
        network = detector(name, len(found.classes), setting)
    else:
        network = named(name, len(found.classes), setting, pixels=isinstance(found, Pairs))
    file = f"{setting}_pretrained.safetensors"
    started = starting_from(network, weights, f"{setting}_weights", folder / file, out / file)
    if weights == TOPICS:  # they fit, and know another text
        return replace(started, told=f"weights of {TOPICS}, which has read Python's help", knows=False)
    return started


def _teacher(training: _Training, network: Network, own: str | None) -> dict[str, Any]:
    """The teacher, trained already or by the training before; ``own`` is the file of the student's float network."""
    weights = own or (network.weights if network.knows else training.result(TEACHER))
    settings: dict[str, Any] = {
        "network": copy.deepcopy(network.config),
        "weights": weights,
    }  # YAML would have an alias
    if training.found.val < _JUDGES and not isinstance(training.found, Texts):
        settings["minimum_accuracy"] = 0.0
    if network.knows and network.mean is not None and network.mean != training.mean:
        settings |= {"mean": list(network.mean), "std": list(network.std or ())}
    if network.image_size not in (None, training.image_size):
        settings["image_size"] = network.image_size
    return {"class_path": "lqkd.teachers.FrozenTeacher", "init_args": settings}


def _quantization(student: Network, bits: str, size: Size | None) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Recipe, callbacks and what they are: where possible those with which the file computes what was trained.

    Raises:
        UsageError: when the student could not be exported.
    """
    from lqkd.export.deploy import check_deployable  # whose packages are optional

    if size is None:
        return _of_text(student, bits)
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
        check_deployable(network, Inputs.of(torch.zeros(2, 3, *_sides(size))))
    except Exception as error:  # of any type, when a network takes no such image
        raise UsageError(f"student={student.name!r} at {bits} could not be exported: {first_line(error)}") from error
    return chosen, callbacks, told


def _of_text(student: Network, bits: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Likewise of a language model: on the grid of a GGUF file, whose file it becomes, or another that has none.

    Raises:
        UsageError: when the student could not be exported.
    """
    recipe = Recipe(bits, rules=[] if bits in BLOCK_FORMATS else [Rule(**rule) for rule in _OF_LANGUAGE])
    network, _ = quantize_model(student.build(), recipe)
    if bits not in BLOCK_FORMATS:
        told = f"{bits}, 8 for the weights of embeddings and of the last layer; no file is made of these"
        return {"bits": bits, "rules": copy.deepcopy(_OF_LANGUAGE)}, [], told
    from lqkd.export.gguf_file import check_gguf_grids, require  # whose packages are optional

    try:
        require()
        check_gguf_grids(network)
    except UsageError as error:
        raise UsageError(
            f"student={student.name!r} at {bits} could not be exported: {error}; or give bits=w4a32"
        ) from error
    return {"bits": bits}, [], f"{bits} of a GGUF file, in which embeddings, the first and the last layer have q8_0"


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _image_size(asked: Asked, found: Photographs | Pairs | Boxed | Texts, student: Network) -> tuple[Size | None, str]:
    if isinstance(found, Texts):
        if asked.image_size is not None:
            raise UsageError(f"image_size={asked.image_size} is not possible: {asked.folder!r} holds texts")
        return None, ""
    if isinstance(found, Pairs | Boxed):
        largest, multiple = (_LARGEST, 16) if isinstance(found, Pairs) else (_LARGEST_WITH_BOXES, 32)
        return _in_proportion(asked.image_size, found.size, largest, multiple)
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


def _in_proportion(
    asked: int | None, size: tuple[int, int], largest: Mapping[str, int], multiple: int
) -> tuple[Size, str]:
    """The size of images with masks or boxes, in the proportions of most of them, in multiples of a number."""
    if asked is not None:
        return (asked, asked), f"{asked} pixels square, as asked"
    factor = min(1.0, largest["cuda" if torch.cuda.is_available() else "cpu"] / min(size))
    height, width = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
    return (height, width), f"{height} by {width} pixels, of photographs of {size[0]} by {size[1]}"


def _about_data(training: _Training, about_size: str) -> Iterator[tuple[str, str]]:
    found = training.found
    yield from zip(("data", *[""] * 9), found.told(), strict=False)
    if about_size:
        yield "images", about_size
        yield "", "in training a cut of at least half of a photograph, mirrored half of the time"
    yield "batches", f"{training.batch_size} {found.things}, {training.steps} to an epoch"


def _about_networks(
    configs: Mapping[str, Any], found: Found, student: Network, teacher: Network | None
) -> Iterator[tuple[str, str]]:
    yield "student", student.name
    yield "", student.told
    yield from _about_training(configs, FLOAT, "optimizer", "first trained in floating point")
    yield "teacher", "the student's own float network" if teacher is None else teacher.name
    if teacher is not None:
        yield "", teacher.told
        yield from _about_training(configs, TEACHER, "optimizer", "first trained")
    if found.val < _JUDGES and not isinstance(found, Texts):
        yield "", f"not compared with chance: {found.val} images to validate are too few"


def _about_training(configs: Mapping[str, Any], name: str, optimizer: str, begins: str) -> Iterator[tuple[str, str]]:
    if name in configs:
        epochs = configs[name]["trainer"]["max_epochs"]
        made = configs[name]["model"]["init_args"][optimizer]
        kind, rate = made["class_path"].rpartition(".")[2], made["init_args"]["lr"]
        yield "", f"{begins}: {epochs} epoch{'s' if epochs != 1 else ''}, {kind} (lr {rate:g})"


def _cosine() -> dict[str, Any]:
    return {"class_path": "lqkd.modules.Cosine", "init_args": {"warmup_fraction": 0.05}}
