"""Memory and time of a distillation loss over a large vocabulary: whole maps against a few rows at a time.

    python -m benchmarks.vocabulary --csv FILE [--tokens 1024] [--vocabulary 49152] [--rounds 7]

Each contestant's forward and backward pass on the same logits, all in one process and in alternation, medians of the
processor's time. Memory is the peak that one such pass allocates, by PyTorch's own count: the gradient of the logits
included, the logits themselves not.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.qat_step import peak_memory
from lqkd.export.latency import machine
from lqkd.losses import CAKLD, DistillationLoss, ForwardKL, HintonKL, JensenShannon, ReverseKL
from lqkd.utils.memory import keep_freed_memory

CONTESTANTS: dict[str, Callable[[], DistillationLoss]] = {
    "HintonKL": lambda: HintonKL(temperature=1.0),
    "ForwardKL": ForwardKL,
    "ForwardKL, top_k 64": lambda: ForwardKL(top_k=64),
    "ReverseKL": ReverseKL,
    "JensenShannon": JensenShannon,
    "CAKLD": CAKLD,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=7, help="passes of each contestant that are timed")
    arguments = parser.parse_args()
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.tokens, arguments.vocabulary)
    teacher = 3 * torch.randn(shape, generator=generator)
    student = (teacher + torch.randn(shape, generator=generator)).requires_grad_()
    labels = torch.randint(arguments.vocabulary, (arguments.tokens,), generator=generator)

    def passes(loss: DistillationLoss) -> Callable[[], None]:
        def once() -> None:
            loss.reduce(loss(teacher, student, labels)).backward()
            student.grad = None  # within the step, so that every one begins without

        return once

    steps = {name: passes(make()) for name, make in CONTESTANTS.items()}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    first = next(iter(steps))
    with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = (
            "tokens",
            "vocabulary",
            "loss",
            "peak_memory_mb",
            "memory_ratio",
            "processor_milliseconds",
            "time_ratio",
        )
        writer.writerow((*names, "rounds", "threads", "machine", "torch"))
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(taken, seconds[first], strict=True))
            megabytes, share = round(memory[name] / 2**20, 1), round(memory[name] / memory[first], 3)
            milliseconds = round(1e3 * statistics.median(taken), 1)
            about = (arguments.rounds, torch.get_num_threads(), machine(), torch.__version__)
            writer.writerow((*shape, name, megabytes, share, milliseconds, round(ratio, 3), *about))
            print(f"{name:20} {megabytes:8} MB  {share:6}  {milliseconds:8} ms  {ratio:6.3f}")


if __name__ == "__main__":
    main()
