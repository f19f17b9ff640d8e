"""Command lines in processes of their own that need not import torch: forks of one that has."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import gc
gc.disable()  # to look for garbage among what is imported takes a third of the time
import json, os, resource, sys, traceback
import sklearn.datasets, torch, torchvision, lightning.pytorch.cli
import lqkd.cli, lqkd.runs.lightning_cli, lqkd.data, lqkd.losses, lqkd.regularizers, lqkd.models, lqkd.callbacks
import lqkd.callbacks.regularizer.pictures as pictures
pictures.pictures = lambda *history: iter(())  # they would take most of the time
torch.set_num_threads(1)
gc.freeze(), gc.enable()  # what is shared is not looked through, and so not copied, in every fork
print("ready", flush=True)
def child(order, environment, log):
    os.setsid()
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    lightning.fabric.utilities.rank_zero.rank_zero_only.rank = int(os.environ.get("RANK", "0"))
    sys.argv = ["lqkd", *order["arguments"]]
    status = 1
    try:
        exec(order["before"], {"os": os, "resource": resource, "torch": torch})
        status = lqkd.cli.main()
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)

for line in sys.stdin:
    order, children = json.loads(line), []
    for rank, environment in enumerate(order["environments"]):
        children.append(os.fork())
        if children[-1] == 0:
            child(order, environment, order["log"] + (f".{rank}" if rank else ""))
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)
"""


class Forks:
    """Runs ``python -m lqkd ...`` one after the other, each in a fork of a process that has imported everything."""

    def __init__(self, server: subprocess.Popen[str], log: Path) -> None:
        self._server = server
        self.log = log

    def run(
        self,
        *arguments: str,
        meanwhile: Callable[[int], None] = lambda pid: None,
        before: str = "",
        environment: dict[str, str] | None = None,
    ) -> int:
        """Return the exit status, negative for a signal; ``meanwhile`` gets the process id while it runs."""
        (status,) = self.run_ranks(
            *arguments, meanwhile=lambda pids: meanwhile(pids[0]), before=before, environments=[environment or {}]
        )
        return status

    def run_ranks(
        self,
        *arguments: str,
        environments: Sequence[dict[str, str]],
        meanwhile: Callable[[list[int]], None] = lambda pids: None,
        before: str = "",
    ) -> list[int]:
        """Likewise, one process for each environment at the same time; the log is the first one's."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self.log.write_text("")
        order = {"arguments": arguments, "log": str(self.log), "before": before, "environments": environments}
        print(json.dumps(order), file=self._server.stdin, flush=True)
        try:
            meanwhile(json.loads(self._server.stdout.readline()))
        finally:
            statuses = json.loads(self._server.stdout.readline())
        return list(statuses)

    def run_function(self, function: Callable[..., None], *arguments: str, processes: int = 2) -> None:
        """Call a function of a test file with a rank and ``arguments`` in so many processes at the same time."""
        work = f"import runpy, sys\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        work += f"function = runpy.run_path({inspect.getfile(function)!r})[{function.__name__!r}]\n"
        work += f"function(int(os.environ['RANK']), *{arguments!r})\nsys.exit(0)"
        environments = [{"RANK": str(rank)} for rank in range(processes)]
        assert self.run_ranks(before=work, environments=environments) == [0] * processes, self.log.read_text()


@contextmanager
def forks(log: Path) -> Iterator[Forks]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LQKD_COMPILE": "0", "COLUMNS": "200"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes) as server:  # type: ignore[call-overload]
        assert server.stdout.readline() == "ready\n"
        yield Forks(server, log)
        server.stdin.close()


def send(pid: int, number: signal.Signals, when: Callable[[], bool], patience: float = 60.0) -> None:
    """Send a signal once ``when()`` holds, unless the process has ended before."""
    deadline = time.monotonic() + patience
    while not when():
        assert time.monotonic() < deadline
        if not alive(pid):
            return
        time.sleep(0.002)
    if alive(pid):
        os.kill(pid, number)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
