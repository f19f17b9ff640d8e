"""Every number that a setting of ours takes: what is none, or cannot be meant, is refused by name when it is given."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lqkd.balances
import lqkd.callbacks
import lqkd.data
import lqkd.losses
import lqkd.modules
import lqkd.regularizers
import lqkd.regularizers.guards
import lqkd.regularizers.players
import lqkd.tasks
from lqkd.data.augmentation import Augmentation
from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.modules.optimizers import optimizer_of
from lqkd.teachers import FrozenTeacher, TeacherEnsemble
from lqkd.teachers.cache import TeacherCache

ROOMS = (
    lqkd.callbacks, lqkd.data, lqkd.losses, lqkd.modules, lqkd.balances, lqkd.regularizers,
    lqkd.regularizers.guards, lqkd.regularizers.players, lqkd.tasks,
)  # fmt: skip
OTHERS = [Augmentation, CifarResNet, FrozenTeacher, TeacherCache, TeacherEnsemble]
MADE_INSIDE = ("TensorBatches", "TokenBatches", "WorkerBatches", "Stage")  # a stage is checked by its scheduler
UNBOUNDED = ("maximum", "max_weight", "gradient_clip_val")  # infinity is their word for no bound
ANY_WHOLE_NUMBER = ("seed", "ignore_index")
BUILT_IN_PYTHON = ("lqkd.losses", "lqkd.regularizers", "lqkd.balances")  # with numbers of which no file tells the type


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


def needed(kind: type) -> dict[str, Any]:
    """Arguments without which a class cannot be made."""
    given: dict[str, Callable[[], Any]] = {
        "network": network,
        "classes": lambda: 3 if issubclass(kind, lqkd.tasks.Task) else ["a", "b"],
        "loss": lqkd.losses.Hints if kind is lqkd.losses.ForegroundWeighted else lqkd.losses.HintonKL,
        "detector": lambda: "fcos",
        "student": network,
        "root": lambda: "nowhere",
        "val": lambda: "nowhere",
        "test": lambda: "nowhere",
        "relation_heads": lambda: 2,
        "folder": lambda: Path("nowhere"),
        "teacher": lambda: FrozenTeacher(network()),
        "teachers": lambda: [FrozenTeacher(network()) for _ in range(2)],
    }
    parameters = inspect.signature(kind).parameters.values()
    names = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    names += ["teacher", "student"] * (kind is lqkd.modules.DistillModule)  # the one or teachers, by name
    return {name: given[name]() for name in names}


def numbers(kind: type) -> Iterator[tuple[str, str]]:
    """Name and annotation of every setting of ``kind``, its parents' among them, that is a number or several."""
    seen = set()
    for parent in kind.__mro__:
        if not parent.__module__.startswith("lqkd.") or "__init__" not in vars(parent):
            continue
        parameters = inspect.signature(parent.__init__).parameters  # type: ignore[misc]
        for name, parameter in parameters.items():
            if name not in seen and re.match(r"(tuple\[|Sequence\[)?(int|float)\b", str(parameter.annotation)):
                seen.add(name)
                yield name, str(parameter.annotation)
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            return


CLASSES = [
    *OTHERS,
    *(
        kind
        for room in ROOMS
        for name in sorted({*vars(room), *getattr(room, "__all__", ())})  # a room may import when first asked
        for kind in [getattr(room, name)]
        if inspect.isclass(kind) and not inspect.isabstract(kind) and name not in MADE_INSIDE
    ),
]
SETTINGS = {
    f"{kind.__name__}.{name}": (kind, name, annotation)
    for kind in CLASSES
    if not (issubclass(kind, lqkd.data.ImageDataModule) and not hasattr(kind, "default_mean"))
    for name, annotation in numbers(kind)
}


def test_the_list_is_not_empty() -> None:
    assert len(SETTINGS) > 200
    assert {"Digits.mixup", "FrozenTeacher.minimum_accuracy", "GradNorm.teacher_share"} <= SETTINGS.keys()


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_no_number_or_cannot_be_meant_is_refused_by_name(setting: str) -> None:
    kind, name, annotation = SETTINGS[setting]
    bad: list[Any] = [] if name in (*ANY_WHOLE_NUMBER, "mean") else [-1]
    if "float" in annotation:
        bad += [math.nan, -math.inf] + [math.inf] * (name not in UNBOUNDED)
    if kind.__module__.startswith(BUILT_IN_PYTHON):
        bad.append("0.5")
    several = annotation.startswith(("tuple", "Sequence"))
    fixed = needed(kind)
    for value in bad:
        given: Any = [value] * (len(getattr(kind, "default_mean", (0, 0))) if several else 1)
        beside = (
            {"std": [1.0] * len(given)} if name == "mean" else {"mean": [0.0] * len(given)} if name == "std" else {}
        )
        with pytest.raises(UsageError, match=name):
            kind(**fixed | beside | {name: given if several else value})
    if "int" in annotation:
        with suppress(UsageError):  # where zero means nothing, and nothing else is raised
            kind(**fixed | {name: 0})


@pytest.mark.parametrize(
    ("name", "value"), [("crop_padding", 8), ("crop_padding", 100_000), ("rand_augment", 10**9), ("mixup", 1e9)]
)
def test_an_augmentation_that_would_leave_nothing_of_the_images_or_never_end_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}="):
        lqkd.data.Digits(**{name: value}).setup()


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_of_an_optimizer_is_finite(setting: str, value: float) -> None:
    make = partial(torch.optim.SGD, **{"lr": 0.1, setting: value})
    with pytest.raises(UsageError, match=f"student_optimizer: {setting}={value} is not possible"):
        optimizer_of(make, "student_optimizer", network().parameters())


def test_both_numbers_of_a_pair_are_finite() -> None:
    make = partial(torch.optim.Adam, lr=0.1, eps=math.inf)
    with pytest.raises(UsageError, match="eps=inf"):
        optimizer_of(make, "optimizer", network().parameters())
