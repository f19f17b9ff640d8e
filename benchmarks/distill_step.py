"""The cost of quantization-aware distillation: a step of lqkd against plain distillation without quantization.

    python -m benchmarks.distill_step --json FILE [--csv FILE] [--rounds N] [--batch B]

ResNet-20 from ResNet-56 on random images in the shape of CIFAR-10: forward of both networks, one backward, optimizers.
"naive" is a plain fp32 student with a plain fp32 teacher, both eager, and the usual loss of Hinton et al.; lqkd trains
its student at W4A4 and channels_last by DistillModule's own losses, with a live teacher and with a cache of the
teacher's answers that was written before. All contestants run in one process and in alternation, each round in another
order; what counts is the median over the rounds of each one's time over that of "naive" in the same round. Where other
work runs beside it, the processor's time is steadier than that of the clock. Freed memory is kept, as the command line
keeps it.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.balances import BoundedUncertaintyBalance
from lqkd.data import Batch
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.modules.optimizers import regularizer_groups
from lqkd.quantization import Recipe, initialize_quantizers
from lqkd.regularizers import ElementwiseMLP, Regularizer
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from lqkd.teachers.inference import computes_bf16
from lqkd.utils.memory import keep_freed_memory

TARGETS = {"lqkd, live teacher": 0.70, "lqkd, cached teacher": 0.55}
"""Largest ratio to the naive step."""


def naive_step(images: Tensor, labels: Tensor, memory_format: torch.memory_format) -> Callable[[], None]:
    torch.manual_seed(0)
    teacher, student = (CifarResNet(depth).to(memory_format=memory_format).to(images.device) for depth in (56, 20))
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    temperature = 4.0

    def step() -> None:
        with torch.no_grad():
            taught = teacher(images)
        logits = student(images)
        soft = F.kl_div((logits / temperature).log_softmax(1), (taught / temperature).softmax(1), reduction="batchmean")
        (F.cross_entropy(logits, labels) + temperature**2 * soft).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lqkd_step(
    images: Tensor, labels: Tensor, regularizer: Regularizer | None, cache: TeacherCache | None, channels_last: bool
) -> Callable[[], None]:
    """One training step, as DistillModule takes it, without Lightning around it."""
    torch.manual_seed(0)
    indices = torch.arange(len(labels), device=labels.device)
    module = DistillModule(
        FrozenTeacher(CifarResNet(56)),
        CifarResNet(20),
        quantization=Recipe(bits="w4a4"),
        regularizer=regularizer,
        balance=BoundedUncertaintyBalance(),
        channels_last=channels_last,
        teacher_cache=cache,
    ).to(images.device)
    module.distillation.connect({"distill": ([(1, 10)], [(1, 10)])})
    initialize_quantizers(module.student, images, batch_statistics=True)
    (teacher,) = module.teachers()
    teacher.accelerate(bf16=teacher.wants_bf16(images.device))
    if cache is not None:
        key: dict[str, Any] = {"data": {"augmentation": {}}}
        module.passes.cache = cache.open(key, indices, 1, ["teacher"], lambda: [[("output", (10,))]])
    module.train()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(module.student.parameters(), lr=1e-3, momentum=0.9)]
    groups = regularizer_groups(module.distillation, module.balance)
    optimizers.append(torch.optim.Adam(groups, lr=1e-3))

    def step() -> None:
        module.losses(Batch(images, labels, indices), cached=True).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    started = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def measure(rounds: int, batch: int, folder: str) -> list[dict[str, Any]]:
    """A row for each contestant."""
    torch.manual_seed(1)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    cache = TeacherCache(folder)
    learned = partial(ElementwiseMLP, guard="barrier")
    steps = {
        "naive": naive_step(images, labels, torch.contiguous_format),
        "naive, channels_last": naive_step(images, labels, torch.channels_last),
        "lqkd, live teacher": lqkd_step(images, labels, learned(), None, True),
        "lqkd, cached teacher": lqkd_step(images, labels, learned(), cache, True),
        "lqkd, live teacher, contiguous student": lqkd_step(images, labels, learned(), None, False),
        "lqkd, cached teacher, contiguous student": lqkd_step(images, labels, learned(), cache, False),
        "lqkd, cached teacher, no regularizer": lqkd_step(images, labels, None, cache, True),
    }
    first = {name: seconds(step) for name, step in steps.items()}  # compiles kernels, writes the cache
    for step in steps.values():
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(steps[name]))

    def ratio(name: str, clock: int) -> float:
        pairs = zip(times[name], times["naive"], strict=True)
        return round(statistics.median(own[clock] / naive[clock] for own, naive in pairs), 3)

    return [
        {
            "step": name,
            "milliseconds": round(1000 * statistics.median(wall for wall, _ in values), 1),
            "ratio_to_naive": ratio(name, 0),
            "processor_ratio_to_naive": ratio(name, 1),
            "target": TARGETS.get(name),
            "first_step_seconds": round(first[name][0], 2),
            "teacher": "fp32" if name.startswith("naive") or not computes_bf16(images.device) else "bf16",
            "batch": batch,
            "rounds": rounds,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--csv", type=Path, help="another file for it, as a table")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each contestant that are timed")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    arguments = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.rounds, arguments.batch, folder)
    arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        target = "" if row["target"] is None else f"   target <= {row['target']}"
        print(f"{row['step']:42}{row['milliseconds']:8.1f} ms{row['ratio_to_naive']:8.3f}", end="")
        print(f"{row['processor_ratio_to_naive']:8.3f} of the processor{target}")


if __name__ == "__main__":
    main()
