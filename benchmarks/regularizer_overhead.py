"""What a learnable regularizer costs: a distillation step of ResNet-20 with each, against the same step without.

    python -m benchmarks.regularizer_overhead --json FILE [--rounds N] [--batch B]

W4A4 from ResNet-56 on random images in the shape of CIFAR-10; forward of both networks, one backward, both optimizers.
All contestants run in one process and in alternation, each round in another order; what counts is the median over the
rounds of each one's time over that of "none" in the same round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lqkd.balances import FixedBalance
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.modules.optimizers import regularizer_groups
from lqkd.quantization import Recipe, initialize_quantizers
from lqkd.regularizers import ElementwiseMLP, LearnableTable, LookAhead, Regularizer, SampleWeight
from lqkd.teachers import FrozenTeacher

CONTESTANTS: dict[str, Callable[[], Regularizer | None]] = {
    "none": lambda: None,
    "ElementwiseMLP, barrier": lambda: ElementwiseMLP(guard="barrier"),
    "ElementwiseMLP, entropy, look-ahead": lambda: ElementwiseMLP(guard="entropy", player=LookAhead()),
    "SampleWeight, barrier": lambda: SampleWeight(guard="barrier"),
    "LearnableTable, barrier": lambda: LearnableTable(guard="barrier"),
}


def step_of(make: Callable[[], Regularizer | None], images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One training step, as DistillModule takes it, without Lightning around it."""
    torch.manual_seed(0)
    module = DistillModule(
        FrozenTeacher(CifarResNet(56)),
        CifarResNet(20),
        quantization=Recipe(bits="w4a4"),
        regularizer=make(),
        balance=FixedBalance(),
    )
    module.distillation.connect({"distill": ([(1, 10)], [(1, 10)])})
    initialize_quantizers(module.student, images, batch_statistics=True)
    module.train()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(module.student.parameters(), lr=1e-3, momentum=0.9)]
    groups = regularizer_groups(module.distillation, module.balance)
    if groups:
        optimizers.append(torch.optim.Adam(groups, lr=1e-3))

    def step() -> None:
        module.losses((images, labels)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each contestant that are timed")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.randint(10, (arguments.batch,))
    steps = {name: step_of(make, images, labels) for name, make in CONTESTANTS.items()}
    for step in (*steps.values(), *steps.values()):
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(steps[name]))
    ratios = {
        name: statistics.median(own / none for own, none in zip(values, times["none"], strict=True))
        for name, values in times.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
        "ratio_to_none": {name: round(value, 4) for name, value in ratios.items()},
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in medians.items():
        print(f"{name:38}{1000 * value:8.1f} ms{ratios[name]:8.3f}")


if __name__ == "__main__":
    main()
