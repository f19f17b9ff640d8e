"""The door of benchmarks.gpu: the stages one after the other, each a process with its own time limit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.gpu
from benchmarks.gpu.plan import EPOCHS, UNFINISHED, Settings
from lqkd.errors import UsageError
from lqkd.utils.files import write_json

STATUS = {0: "done", UNFINISHED: "unfinished"}
"""By the exit status of a stage."""
GRACE = 5.0
"""Seconds that a stage may take beyond its limit before it is killed."""


@dataclass(frozen=True)
class Stage:
    """One part of a visit.

    Attributes:
        name: of its module.
        share: the most of the visit's time that it gets.
        most: the most seconds that it gets.
    """

    name: str
    share: float
    most: float


STAGES = (
    Stage("sanity", 0.16, 120.0),
    Stage("steps", 0.2, 120.0),
    Stage("ways", 0.2, 90.0),
    Stage("accuracy", 1.0, 10.0**6),
)
PREPARE = Stage("prepare", 0.5, 300.0)
"""Beside the first stage, since it needs no GPU."""


class Visit:
    """The stages of one call, and what became of them.

    Args:
        out: folder of the results.
        data: folder of images and weights; None for $LQKD_DATA.
        seconds: the time of the call.
    """

    def __init__(self, out: Path, data: Path | None, seconds: float) -> None:
        self.out = out
        self.data = data
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self._records: dict[str, Any] = {}
        self._lock = threading.Lock()
        path = out / "stages.json"
        if path.exists():
            self._records = json.loads(path.read_text(encoding="utf-8"))

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> bool:
        """Run what is not done; whether all went well."""
        preparing = threading.Thread(target=self._run, args=(PREPARE,))
        preparing.start()
        for position, stage in enumerate(STAGES):
            if position == 1:
                preparing.join()
            if self._records.get(stage.name, {}).get("status") == "done" and stage is not STAGES[-1]:
                self._say(f"{stage.name} was done before")
                continue
            self._run(stage)
        return all(record["status"] == "done" for record in self._records.values())

    def _run(self, stage: Stage) -> None:
        limit = min(stage.most, stage.share * self.seconds, self.left() - GRACE)
        if limit <= 0:
            self._record(stage, "no time was left", 0.0)
            return
        self._say(f"{stage.name}, at most {limit:.0f} s")
        command = [sys.executable, "-m", f"benchmarks.gpu.{stage.name}", "--out", str(self.out)]
        command += ["--seconds", f"{limit:.1f}", *([] if self.data is None else ["--data", str(self.data)])]
        started = time.monotonic()
        with open(self.out / f"{stage.name}.log", "a", encoding="utf-8") as log:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen(command, start_new_session=True, **pipes)
            reading = threading.Thread(target=_copy, args=(process, log, stage.name))
            reading.start()
            try:
                process.wait(limit + GRACE)
                status = STATUS.get(process.returncode, f"failed with status {process.returncode}")
            except subprocess.TimeoutExpired:
                status = "took too long"
            finally:
                _kill(process)
            reading.join(GRACE)
        self._record(stage, status, time.monotonic() - started)

    def _record(self, stage: Stage, status: str, seconds: float) -> None:
        with self._lock:
            self._records[stage.name] = {"status": status, "seconds": round(seconds, 1)}
            write_json(self.out / "stages.json", self._records)
        self._say(f"{stage.name}: {status}")

    def _say(self, text: str) -> None:
        print(f"[{self.left():4.0f} s left] {text}", flush=True)


def _copy(process: subprocess.Popen[str], log: Any, name: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)
        log.flush()
        print(f"  {name}: {line}", end="", flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """End what a stage has left running, its own processes included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, with those of earlier calls")
    parser.add_argument("--minutes", type=float, default=13.0, help="time of this call, default: %(default)s")
    parser.add_argument("--data", type=Path, help="folder of images and weights; default: $LQKD_DATA")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the budget, for a rehearsal")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training, default: %(default)s")
    arguments = parser.parse_args()
    try:
        for name in ("minutes", "scale", "epochs"):
            if not getattr(arguments, name) > 0:
                raise UsageError(f"--{name} {getattr(arguments, name)} is not possible: it must be above 0")
        arguments.out.mkdir(parents=True, exist_ok=True)
        Settings(arguments.scale, arguments.epochs).keep(arguments.out)
    except UsageError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that stages are ended, too
    visit = Visit(arguments.out.resolve(), arguments.data, 60 * arguments.minutes)
    return 0 if visit.run() else 1


if __name__ == "__main__":
    sys.exit(main())
