"""Stage: what full trainings reach on the test images, several side by side."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.data import data_folder
from benchmarks.gpu.plan import UNFINISHED, Run, Settings, runs, settings_of, stage_parser
from benchmarks.gpu.recipes import BALANCES
from benchmarks.gpu.results import FAILED, Clock, Table, device, is_failure, machine, why
from benchmarks.gpu.training import Place, Training, train
from benchmarks.gpu.ways import Way, best_way
from lqkd.utils.files import write_json, write_safetensors

CURVE = 20
"""Epochs between two points of the curve on the validation images."""
SAVE = 60.0
"""Seconds between two times that all states are kept."""
RESERVE = 15.0
"""Seconds for the last states and evaluations."""


class Keeper:
    """Keeps what trainings have: points of the curve, states, results.

    Args:
        place: of the trainings.
        clock: of the stage.
    """

    def __init__(self, place: Place, clock: Clock) -> None:
        self.place = place
        self.clock = clock
        self._saved = time.monotonic()

    def at_chunk(self, trainings: list[Training]) -> None:
        """After a chunk of steps: whatever is due."""
        due = time.monotonic() - self._saved > SAVE
        for training in trainings:
            if training.diverged:
                self.fail(training.run, f"the loss is no number after {training.steps} steps")
            elif training.done:
                self.finish(training)
            else:
                self._curve(training)
                if due:
                    training.save(self.place.state(training.run))
        if due:
            self._saved = time.monotonic()
            steps = ", ".join(f"{t.run.name} {t.steps / t.total_steps:.0%}" for t in trainings)
            print(f"{self.clock.left():.0f} s left: {steps}", flush=True)

    def _curve(self, training: Training) -> None:
        feed = self.place.feed(training.run)
        epoch, rest = divmod(training.steps, feed.steps)
        if not rest and epoch % CURVE == 0:
            training.curve.append((epoch, round(training.accuracy(feed, "val", epoch - 1), 2)))

    def finish(self, training: Training) -> None:
        """Measure and keep the result, and the weights that other runs start from."""
        run, feed, epochs = training.run, self.place.feed(training.run), self.place.settings.scaled_epochs
        accuracy = training.accuracy(feed, "test", epochs - 1)
        if run.bits == "float":
            write_safetensors(self.place.out / "weights" / f"{run.name}.safetensors", training.student.state_dict())
        task, distill = BALANCES[run.method]
        result = {
            "test_accuracy": round(accuracy, 2),
            "epochs": epochs,
            "steps": training.total_steps,
            "batch": self.place.settings.batch,
            "balance": f"{task:g}:{distill:g}",
            "seconds_share": round(training.seconds, 1),
            "curve": training.curve,
            "note": training.note,
        }
        self._write(run, result)

    def fail(self, run: Run, reason: str) -> None:
        """Keep that a run has no result."""
        self._write(run, {"note": f"{FAILED}{reason}"})

    def _write(self, run: Run, result: dict[str, Any]) -> None:
        columns = {"run": run.name, "data": run.data, "bits": run.bits, "method": run.method, "seed": run.seed}
        write_json(result_file(self.place.out, run), columns | result | machine())
        self.place.state(run).unlink(missing_ok=True)
        tabulate(self.place.out)


def result_file(out: Path, run: Run) -> Path:
    return out / "runs" / f"{run.name}.json"


def tabulate(out: Path) -> None:
    """Make accuracy.csv of all results."""
    found = [result_file(out, run) for run in runs() if result_file(out, run).exists()]
    table = Table(out / "accuracy.csv", "run")
    known = {row["run"]: row["note"] for row in table.rows}
    for path in found:
        row = json.loads(path.read_text(encoding="utf-8"))
        if known.get(row["run"]) != row["note"]:
            table.add({key: value for key, value in row.items() if key != "curve"})


def forget_failures(out: Path) -> None:
    """Let the runs that failed on an earlier visit be tried again."""
    for path in (result_file(out, run) for run in runs()):
        if path.exists() and is_failure(json.loads(path.read_text(encoding="utf-8"))):
            path.unlink()


def pending(out: Path, settings: Settings) -> list[Run]:
    """The runs that have no result and whose float weights are there, the most valuable first."""
    open_ = [run for run in runs(settings.seeds) if not result_file(out, run).exists()]
    return [run for run in open_ if run.needs is None or (out / "weights" / f"{run.needs.name}.safetensors").exists()]


def side_by_side(place: Place, clock: Clock) -> None:
    """Train waves of runs in this process, as many at once as is fastest, until there is no more time.

    A wave that fails goes on from its last states with half as many at once, which also answers a lack of memory.
    """
    keeper = Keeper(place, clock)
    bound = len(runs())
    while (waiting := pending(place.out, place.settings)) and clock.left() > 0:
        steps = place.feed(waiting[0]).steps * place.settings.scaled_epochs
        way = best_way(place.out, steps, clock.left(), processes=False)
        wave: list[Training] = []
        for run in waiting[: min(way.runs, bound)]:
            try:
                wave.append(place.training(run, graph=way.graph))
            except Exception as error:
                keeper.fail(run, why(error))
        print(f"side by side: {', '.join(training.run.name for training in wave)}", flush=True)
        try:
            train(wave, place, clock, keeper.at_chunk)
        except Exception as error:
            print(f"failed with {len(wave)} at once: {why(error)}", flush=True)
            if len(wave) == 1:
                keeper.fail(wave[0].run, why(error))
            bound = max(1, len(wave) // 2)
            continue
        for training in wave:
            if not training.done and not training.diverged:
                training.save(place.state(training.run))


def processes(place: Place, way: Way, clock: Clock) -> None:
    """Train each run in a process of its own, as many at once as is fastest."""
    out, data = place.out, place.data
    working: dict[str, subprocess.Popen[bytes]] = {}
    while clock.left() > 0:
        working = {name: process for name, process in working.items() if process.poll() is None}
        waiting = [run for run in pending(out, place.settings) if run.name not in working]
        if not waiting and not working:
            break
        for run in waiting[: way.runs - len(working)]:
            limits = ["--seconds", str(max(1.0, clock.left())), "--only", run.name]
            command = [sys.executable, "-m", "benchmarks.gpu.accuracy", "--out", str(out), "--data", str(data), *limits]
            working[run.name] = subprocess.Popen(command)
        time.sleep(0.5)
    for process in working.values():
        process.wait()
    tabulate(out)


def main() -> int:
    parser = stage_parser(__doc__ or "")
    parser.add_argument("--only", help="name of the one run to train, by itself")
    arguments = parser.parse_args()
    out, data = arguments.out, data_folder(arguments.data)
    settings: Settings = settings_of(out)
    clock = Clock(arguments.seconds - (RESERVE if settings.whole else 2.0))
    place = Place(data, out, settings, device())
    if arguments.only is not None:
        run = next(run for run in runs() if run.name == arguments.only)
        keeper = Keeper(place, clock)
        try:
            training = place.training(run)
            train([training], place, clock, keeper.at_chunk)
        except Exception as error:
            keeper.fail(run, why(error))
            raise
        if not training.done and not training.diverged:
            training.save(place.state(run))
        return 0
    forget_failures(out)
    # The trainings of a rehearsal take less time than the start of a process.
    way = best_way(out, None, clock.left(), processes=settings.whole)
    print(f"{len(pending(out, settings))} runs can begin, {way.runs} at once in {way.name}", flush=True)
    if way.name == "processes":
        processes(place, way, clock)
    else:
        side_by_side(place, clock)
    results = [result_file(out, run) for run in runs(settings.seeds)]
    done = all(path.exists() and not is_failure(json.loads(path.read_text(encoding="utf-8"))) for path in results)
    return 0 if done else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
