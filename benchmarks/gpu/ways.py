"""Stage: how many trainings at once are fastest, on streams of one process or in processes."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.data import data_folder
from benchmarks.gpu.plan import UNFINISHED, Run, settings_of, stage_parser
from benchmarks.gpu.results import FAILED, Clock, Table, device, machine, synchronize, why
from benchmarks.gpu.training import CHUNK, EAGER_STEPS, Place, Training
from lqkd.data import Batch

MEASURED = Run("cifar10", "w2a2", "hints", 0)
STREAMS, EAGER, PROCESSES = "streams", "streams without graphs", "processes"
COUNTS = {STREAMS: (1, 2, 4, 8, 12), EAGER: (1, 4), PROCESSES: (4, 8)}
COUNTS_OF_REHEARSAL = {STREAMS: (1, 2), PROCESSES: (1,)}


@dataclass(frozen=True)
class Way:
    """A way to train several runs at once.

    Attributes:
        name: ``streams``, ``streams without graphs`` or ``processes``.
        runs: how many at once.
        rate: optimizer steps a second, of all together.
    """

    name: str
    runs: int
    rate: float

    @property
    def graph(self) -> bool:
        return self.name != EAGER


def measured(out: Path) -> list[Way]:
    """What this stage has found out."""
    path = out / "ways.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["steps_per_second"]]
    return [Way(row["way"], int(row["runs"]), float(row["steps_per_second"])) for row in rows]


def best_way(out: Path, steps: int | None, seconds: float, processes: bool = True) -> Way:
    """The fastest way of those that bring every run to its end.

    A cut within a wave costs all of its runs: so the fastest of the ways whose wave of ``steps`` each is over in
    ``seconds``. Where none is, the fastest of all: a later visit goes on.

    Args:
        out: folder of the results; without a measurement four at once.
        steps: of each run; None where only the fastest is asked for.
        seconds: that are left.
        processes: whether several processes come into question.
    """
    ways = [way for way in measured(out) if processes or way.name != PROCESSES]
    if not ways:
        return Way(STREAMS, 4, 0.0)
    in_time = [way for way in ways if steps is not None and way.runs * steps <= way.rate * seconds]
    return max(in_time or ways, key=lambda way: way.rate)


def rate(trainings: list[Training], batch: Batch, seconds: float) -> float:
    """Steps a second of all trainings together, on one batch again and again."""
    for _ in range(EAGER_STEPS + 1 if trainings[0].device.type == "cuda" else 1):
        for training in trainings:
            training.step(batch, None)
        synchronize()
    chunk = CHUNK[trainings[0].device.type]
    started, rounds = time.monotonic(), 0
    while rounds == 0 or time.monotonic() - started < seconds:
        for _ in range(chunk):
            for training in trainings:
                training.step(batch, None)
        synchronize()
        rounds += 1
    return rounds * chunk * len(trainings) / (time.monotonic() - started)


def in_one_process(place: Place, count: int, graph: bool, seconds: float) -> tuple[float, str]:
    """Steps a second of ``count`` trainings, and what is to be said about it."""
    trainings = [place.training(MEASURED, graph=graph) for _ in range(count)]
    found = rate(trainings, place.feed(MEASURED).batches(0, 0, 1), seconds)
    return found, trainings[0].note


def in_processes(out: Path, data: Path, count: int, seconds: float, patience: float) -> float:
    """Likewise, each in a process of its own; all begin when the last one is ready."""
    command = [sys.executable, "-m", "benchmarks.gpu.ways", "--out", str(out), "--data", str(data)]
    command += ["--child", "--seconds", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(count)]  # type: ignore[call-overload]
    deadline = Clock(patience)
    try:
        for child in children:
            for line in child.stdout:
                if line == "ready\n":
                    break
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        answers = [child.communicate(timeout=max(1.0, deadline.left()))[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return sum(float(answer.split()[-1]) for answer in answers)


def child(place: Place, seconds: float) -> None:
    """One of :func:`in_processes`."""
    training = place.training(MEASURED)
    batch = place.feed(MEASURED).batches(0, 0, 1)
    rate([training], batch, 0.0)
    print("ready", flush=True)
    sys.stdin.readline()
    print(rate([training], batch, seconds), flush=True)


def main() -> int:
    parser = stage_parser(__doc__ or "")
    parser.add_argument("--child", action="store_true", help="be one of several processes that are measured")
    arguments = parser.parse_args()
    out, data, clock = arguments.out, data_folder(arguments.data), Clock(arguments.seconds)
    settings = settings_of(out)
    place = Place(data, out, settings, device())
    if arguments.child:
        child(place, arguments.seconds)
        return 0
    table = Table(out / "ways.csv", "way", "runs")
    seconds = 3.0 if settings.whole else 0.0
    wanted = [(name, n) for name, counts in (COUNTS if settings.whole else COUNTS_OF_REHEARSAL).items() for n in counts]
    for name, count in wanted:
        if table.has(name, count) or clock.left() < 4 * seconds:
            continue
        found, note = 0.0, ""
        try:
            if name == PROCESSES:
                found = in_processes(out, data, count, seconds, clock.left())
            else:
                found, note = in_one_process(place, count, name == STREAMS, seconds)
        except Exception as error:
            note = f"{FAILED}{why(error)}"
        told = round(found, 2) if found else ""
        table.add({"way": name, "runs": count, "steps_per_second": told, "note": note} | machine())
    return 0 if all(table.has(*key) for key in wanted) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
