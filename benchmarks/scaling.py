"""How the cost of a distillation step grows with what a user may make larger, and whether faster than that.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling --csv FILE [--rounds N] [--axes width classes ...]

A step at W4A4, as DistillModule takes it, of residual networks for small images, with one thing made larger at a time:
width, depth, pairs of taps (each a term of the loss), teachers, classes. All sizes of an axis run in one process and in
alternation. The slope of a row is the exponent with which the time grows from the size before: 1 is linear. For the
width it is taken over the operations, which grow with its square. Times are of the processor, which other work on the
machine changes less; "fit" is what it takes to make the module and to fit its quantizers, once in a training.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD

from lqkd.losses import HintonKL, Hints
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule, Tap
from lqkd.modules.optimizers import student_groups
from lqkd.quantization import Recipe, initialize_quantizers
from lqkd.teachers import FrozenTeacher, TeacherEnsemble

BATCH = 32
SIZES: dict[str, tuple[int, ...]] = {
    "width": (8, 16, 32, 64),
    "depth": (8, 14, 26, 50, 98),
    "terms": (1, 2, 4, 8),
    "teachers": (1, 2, 4, 8),
    "classes": (10, 100, 1_000, 10_000, 100_000),
}
WORSE = 1.15
"""A slope above it is worse than linear, by more than the times tell."""


def module_of(axis: str, size: int) -> DistillModule:
    """A module with ``size`` of what ``axis`` names; everything else stays small."""
    torch.manual_seed(0)
    shape: dict[str, int] = {"depth": 26 if axis == "terms" else 14, "width": 16, "num_classes": 10}
    own = {"width": "width", "depth": "depth", "classes": "num_classes"}.get(axis)
    if own is not None:
        shape[own] = size
    taps = None
    if axis == "terms":  # the outputs of as many blocks, of the twelve that there are
        blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(4)]
        taps = [Tap(name, name) for name in blocks[:size]]
    teachers = [FrozenTeacher(CifarResNet(**shape), precision="fp32") for _ in range(size if axis == "teachers" else 1)]
    module = DistillModule(
        teachers[0] if len(teachers) == 1 else TeacherEnsemble(teachers),
        CifarResNet(**shape),
        quantization=Recipe(bits="w4a4"),
        distillation_loss=HintonKL() if taps is None else Hints(),
        taps=taps,
    )
    channels = {1: 16, 2: 32, 3: 64}
    shapes: list[tuple[int, ...]] = [(1, shape["num_classes"])]
    if taps is not None:
        stages = [int(tap.teacher[len("layer")]) for tap in taps]
        shapes = [(1, channels[stage], 64 // 2 ** (stage + 1), 64 // 2 ** (stage + 1)) for stage in stages]
    module.distillation.connect({"distill": (shapes, shapes)})
    return module


def step_of(axis: str, size: int) -> Callable[[], Any]:
    """A training step, its quantizers fitted."""
    images, labels = torch.randn(BATCH, 3, 16, 16), torch.randint(10, (BATCH,))
    module = module_of(axis, size)
    initialize_quantizers(module.student, images, batch_statistics=True)
    module.train()
    optimizer = SGD(student_groups(module.student, module.distillation.losses), lr=1e-3, momentum=0.9)

    def step() -> None:
        module.losses((images, labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Time of the processor, and what ``run`` returns."""
    started = time.process_time()
    returned = run()
    return time.process_time() - started, returned


def measure(axis: str, sizes: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each size of an axis."""
    step_of(axis, sizes[0])()  # compiles kernels
    made = {size: seconds(lambda size=size: step_of(axis, size)) for size in sizes}  # type: ignore[misc]
    for _, step in made.values():
        step()
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, (_, step) in made.items():
            times[size].append(seconds(step)[0])
    medians = {size: statistics.median(values) for size, values in times.items()}
    fits = {size: spent for size, (spent, _) in made.items()}
    rows: list[dict[str, Any]] = []
    for before, size in zip((None, *sizes), sizes, strict=False):
        row: dict[str, Any] = {"axis": axis, "size": size}
        for name, spent in (("step", medians), ("fit", fits)):
            row[f"{name}_milliseconds"] = round(1000 * spent[size], 2)
            row[f"{name}_slope"] = "" if before is None else round(slope(axis, spent, before, size), 2)
        rows.append(row)
    for name, spent in (("step", medians), ("fit", fits)):
        whole = slope(axis, spent, sizes[0], sizes[-1])
        verdict = "worse than linear" if whole > WORSE else "not worse than linear"
        print(f"{axis}, {sizes[0]} to {sizes[-1]}: a {name} grows with the exponent {whole:.2f}, {verdict}", flush=True)
    return rows


def slope(axis: str, spent: Mapping[int, float], before: int, size: int) -> float:
    """The exponent with which time grows between two sizes."""
    growth = (size / before) ** (2 if axis == "width" else 1)
    return math.log(spent[size] / spent[before]) / math.log(growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each size that are timed")
    parser.add_argument("--axes", nargs="+", choices=SIZES, default=list(SIZES), help="default: %(default)s")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    settings = {"batch": BATCH, "rounds": arguments.rounds, "torch": torch.__version__}
    for axis in arguments.axes:
        rows += [row | settings for row in measure(axis, SIZES[axis], arguments.rounds)]
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
