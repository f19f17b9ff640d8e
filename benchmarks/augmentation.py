"""The cost of augmentation on its device, compiled and eager.

    python -m benchmarks.augmentation --csv FILE [--rounds N] [--device cuda]

128 images of 32 pixels: "crop, flip" as usual for CIFAR-10, and "crop, flip, erasing, mixup"; both end normalised. On a
CPU trainings leave it eager, for what is measured here; with RandAugment everywhere. "RandAugment, erasing, mixup" is
measured eager, to compare the others with. Everything runs in one process and in alternation, a number of batches each
round, after first ones that are not counted; what counts are the ratios of the medians. Where other work runs beside
it, the processor's time is steadier than that of the clock.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.input import BATCH, Random
from lqkd.data import Batch
from lqkd.export.latency import machine
from lqkd.modules.compilation import CompiledCall
from lqkd.utils.memory import keep_freed_memory

PLAIN = {"crop_padding": 4, "horizontal_flip": True}
MIXED = {**PLAIN, "random_erasing": 0.25, "mixup": 0.2}
SETTINGS: dict[str, dict[str, Any]] = {
    "crop, flip": PLAIN,
    "crop, flip, erasing, mixup": MIXED,
    "RandAugment, erasing, mixup": {**MIXED, "rand_augment": 2},
}
BATCHES = 20  # in a round


def contestants(settings: dict[str, Any], device: torch.device) -> dict[str, Callable[[int], None]]:
    """What a round of each does, by its number."""
    images = np.random.default_rng(0).integers(0, 256, (20 * BATCH, 32, 32, 3), dtype=np.uint8)
    runs: dict[str, Callable[[int], None]] = {}
    for label in ("eager", *([] if settings.get("rand_augment") else ["compiled"])):
        data = Random(images, **settings)
        data.setup("fit")
        if label == "compiled":
            data.compiled = CompiledCall(data.augment, "augmentation", device=device.type)

        def run(epoch: int, data: Random = data) -> None:
            taken = [*data.train_dataloader(), *data.train_dataloader()][:BATCHES]
            batches = [Batch(b.images.to(device), b.labels.to(device), b.indices.to(device)) for b in taken]
            for batch in batches:
                data.preprocess(batch, train=True, epoch=epoch)
            if device.type == "cuda":
                torch.cuda.synchronize()

        runs[label] = run
    return runs


def measure(name: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each contestant."""
    runs = contestants(SETTINGS[name], device)
    first = {label: seconds(run, 0)[0] for label, run in runs.items()}
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in runs}
    for turn in range(rounds):
        for label, run in runs.items():
            times[label].append(seconds(run, turn + 1))
    medians = {
        label: [statistics.median(column) / BATCHES for column in zip(*rows, strict=True)]
        for label, rows in times.items()
    }
    return [
        {
            "augmentation": name,
            "contestant": label,
            "batch": BATCH,
            "rounds": rounds,
            "milliseconds": round(1000 * wall, 3),
            "ratio_to_eager": round(wall / medians["eager"][0], 3),
            "processor_milliseconds": round(1000 * processed, 3),
            "processor_ratio_to_eager": round(processed / medians["eager"][1], 3),
            "first_round_seconds": round(first[label], 2),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        for label, (wall, processed) in medians.items()
    ]


def seconds(run: Callable[[int], None], epoch: int) -> tuple[float, float]:
    """By the clock, and of the processor."""
    started = time.perf_counter(), time.process_time()
    run(epoch)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each contestant that are timed")
    parser.add_argument("--device", default="cpu", help="where the batches are: cpu or cuda")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for name in SETTINGS:
        new = measure(name, arguments.rounds, torch.device(arguments.device))
        rows += new
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name:30}{'ms':>8}{'ratio':>8}{'processor':>10}{'first round s':>15}")
        for row in new:
            ratios = f"{row['ratio_to_eager']:8.3f}{row['processor_ratio_to_eager']:10.3f}"
            print(f"  {row['contestant']:28}{row['milliseconds']:8.3f}{ratios}{row['first_round_seconds']:15.2f}")


if __name__ == "__main__":
    main()
