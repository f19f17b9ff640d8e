"""Runs on this machine: processes that fork from one which has imported everything, a few at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from lqkd.errors import Stopped
from lqkd.studies.job import Task

_PRELOADED = "lqkd.studies.preload"
_PATIENCE = 10.0
"""Seconds that a run has to save itself once the process that started it is gone."""


def run_here(tasks: Sequence[Task], parallel: int, ended: Callable[[Task], None], waiting: Callable[..., None]) -> None:
    """Run the tasks in order, ``parallel`` at a time.

    Ctrl-C and SIGTERM are passed on to the runs, which save and stop. When this process is killed they stop, too.

    Args:
        tasks: what to run.
        parallel: processes at the same time.
        ended: called after each, whatever came of it.
        waiting: called every few seconds with the tasks that run.

    Raises:
        Stopped: after Ctrl-C or SIGTERM, once all runs have stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    left, running = list(tasks), dict[BaseProcess, Task]()
    with _Signals() as signals:
        while (left and signals.received is None) or running:
            while left and len(running) < parallel and signals.received is None:
                process: BaseProcess = context.Process(target=_child, args=(left[0],))
                process.start()
                running[process] = left.pop(0)
            wait([process.sentinel for process in running], timeout=1.0)
            if signals.received is not None:
                signals.pass_on(running)
            for dead in [process for process in running if not process.is_alive()]:
                dead.join()
                ended(running.pop(dead))
            waiting(list(running.values()))
    if signals.received is not None:
        name = signal.Signals(signals.received).name
        raise Stopped(signals.received, f"stopped by {name}; the same command goes on with the study")


def _child(task: Task) -> None:
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    task()


def _stop_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE / 2)
    os._exit(1)


class _Signals:
    """Notes Ctrl-C and SIGTERM and passes them on; a second one kills the runs, which then have not saved."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._count = self._told = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._count += 1

    def pass_on(self, running: dict[BaseProcess, Task]) -> None:
        if self._told == self._count:
            return
        self._told = self._count
        for process in running:
            process.terminate() if self._count == 1 else process.kill()
