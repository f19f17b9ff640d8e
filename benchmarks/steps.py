"""The cost of a training step, all that results/README.md has of lqkd beside float32, in less than ten minutes.

    python -m benchmarks.steps --out DIR [--threads 1 2] [--quick]

Runs ``benchmarks.qat_step`` (W4A4 and W2A2 of ResNet-20 and MobileNetV2, W4A4 of ResNet-18) and
``benchmarks.distill_step``, one after the other, each with every number of threads, and writes their rows into
``DIR/qat_step.csv``, with the number of the run, and ``DIR/distill_step.csv`` as soon as they are there. Nothing else
should run on the machine; the columns of the processor's time bear it better.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path

QAT = (
    "--networks resnet20 --bits w4a4 w2a2 --rounds 16",
    "--networks mobilenet_v2 --bits w4a4 w2a2 --batch 64 --rounds 12",
    "--networks resnet18 --bits w4a4 --batch 32 --rounds 6",
)
DISTILL = "--rounds 12"
QUICK = "--rounds 1 --batch 2"


def measured(command: list[str], table: Path, threads: int) -> list[dict[str, str]]:
    """The rows of one benchmark, in a process of its own: the number of threads is that of its start."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", *command, "--csv", str(table)], check=True, env=environment)
    with open(table, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table.unlink()
    return rows


def written(rows: list[dict[str, str]], table: Path) -> None:
    with open(table, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for both tables")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="one round of small batches: whether all of it runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    part, more = arguments.out / "part.csv", QUICK.split() if arguments.quick else []
    steps: list[dict[str, str]] = []
    distilled: list[dict[str, str]] = []
    for threads in arguments.threads:
        for run in QAT:
            command = ["benchmarks.qat_step", *run.split(), "--contestants", "fp32", "lqkd", *more]
            number = str(1 + len({row["run"] for row in steps}))
            steps += [{"run": number} | row for row in measured(command, part, threads)]
            written(steps, arguments.out / "qat_step.csv")
        log = str(arguments.out / "distill_step.json")
        command = ["benchmarks.distill_step", "--json", log, *DISTILL.split(), *more]
        distilled += measured(command, part, threads)
        written(distilled, arguments.out / "distill_step.csv")


if __name__ == "__main__":
    main()
