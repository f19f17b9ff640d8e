"""One run of a study, as it goes on in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lqkd.errors import UsageError
from lqkd.runs.folder import CONFIG, SUMMARY
from lqkd.studies.settings import Study
from lqkd.utils.files import is_own_file, write_json, write_safetensors

FINISHED = "finished"
FAILED = "failed"
DIVERGED = "diverged"
STOPPED = "stopped"
_NOT_FINISHED = "not finished: start compare again to go on with it"
_STATUS = {0: FINISHED, 1: FAILED, 2: FAILED, 3: DIVERGED}
"""By exit status; with any other a run was stopped, or could not write, and goes on the next time."""


@dataclass(frozen=True)
class Task:
    """A variant and a seed, and where everything about them is.

    Attributes:
        study: folder of the study.
        variant: the variant's name.
        seed: of the run.
        threads: of PyTorch; None for its own choice.
    """

    study: Path
    variant: str
    seed: int
    threads: int | None = None

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def config(self) -> Path:
        """The variant's configuration."""
        return self.study / "variants" / f"{self.variant}.yaml"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.study / "runs" / self.variant / f"seed_{self.seed}"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.study / "logs" / self.variant / f"seed_{self.seed}.log"

    @property
    def outcome(self) -> Path:
        """How the run ended; missing while it has not."""
        return self.study / "outcomes" / self.variant / f"seed_{self.seed}.json"

    def ended(self) -> tuple[str, str]:
        """How the run ended and, where it failed, why: a status and a sentence."""
        if not is_own_file(self.outcome, self.study):
            return STOPPED, _NOT_FINISHED
        outcome = self._outcome()
        if outcome["status"] == FINISHED and not (self.folder / SUMMARY).is_file():
            if (self.folder / CONFIG).is_file():  # someone made it longer, by hand
                return STOPPED, _NOT_FINISHED
            return STOPPED, "its run folder is gone: start compare again to train it anew"
        return outcome["status"], outcome["message"]

    def _outcome(self) -> dict[str, str]:
        try:
            outcome = json.loads(self.outcome.read_text(encoding="utf-8"))
            return {key: str(outcome[key]) for key in ("status", "message")}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{str(self.outcome)!r} is damaged: it is not what compare writes") from error

    def __call__(self) -> None:
        """Train, or go on training, and write how it ended."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab", buffering=0) as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
        # Whatever an earlier stream still buffers belongs to another process.
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
        started = time.monotonic()
        status, message = self._train()
        if status in _STATUS:
            seconds = round(time.monotonic() - started, 1)
            write_json(self.outcome, {"status": _STATUS[status], "message": message, "seconds": seconds})

    def checkpoint(self) -> Any:
        """What submitit submits again when the cluster takes the machine away: this task, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _train(self) -> tuple[int, str]:
        """Exit status as of ``python -m lqkd``, and the sentence that goes with a failure."""
        import torch

        from lqkd.runs.status import exit_status

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        start = self.log.stat().st_size
        try:
            status = exit_status(self._fit)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0
        except Exception as error:  # a failure of one run is a row of the table
            traceback.print_exc()
            return 1, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
        if status == 0:
            return 0, ""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            log.seek(start)
            told = [line.strip() for line in log if line.startswith("lqkd: ")]
        return status, told[-1].removeprefix("lqkd: ").removeprefix("error: ") if told else f"exit status {status}"

    def _fit(self) -> int:
        from lqkd.runs.train import resume, run

        if (self.folder / CONFIG).is_file():
            resume(self.folder, allow_code=True)  # the study's own, maybe from another machine
            return 0
        shutil.rmtree(self.folder, ignore_errors=True)  # claimed by a process that was killed before it began
        arguments = ["fit", "--config", str(self.config), "--seed_everything", str(self.seed)]
        arguments += ["--run.root", str(self.study / "runs"), "--run.name", self.variant]
        arguments += ["--run.version", self.folder.name]
        weights = self._initial_weights()
        run(arguments if weights is None else [*arguments, "--model.init_args.student_weights", str(weights)])
        return 0

    def _initial_weights(self) -> Path | None:
        """A file with the weights that the seed gives a student without weights, the same for all variants."""
        import hashlib

        model = yaml.safe_load(self.config.read_text(encoding="utf-8"))["model"].get("init_args", {})
        student = model.get("student")
        if student is None or model.get("student_weights") is not None:
            return None
        described = json.dumps(student, sort_keys=True)
        name = f"seed_{self.seed}_{hashlib.sha256(described.encode()).hexdigest()[:8]}.safetensors"
        target = self.study / "initial_weights" / name
        if not target.is_file():
            write_safetensors(target, _build(student, self.seed).state_dict())
        return target


def tasks_of(study: Study, names: Sequence[str], seed: int) -> list[Task]:
    """The runs of one seed."""
    parallel = study.launcher.parallel if study.launcher.submitit is None else 1
    threads = None if parallel == 1 else max(1, (os.cpu_count() or 1) // parallel)
    return [Task(study.folder, name, seed, threads) for name in names]


def _build(student: Any, seed: int) -> Any:
    """The network that a configuration describes, with the weights that the seed gives it."""
    import torch
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--student", type=torch.nn.Module)
    config = parser.parse_object({"student": student})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return parser.instantiate_classes(config).student
