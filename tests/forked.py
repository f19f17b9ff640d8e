"""Command lines in processes of their own that need not import torch: forks of one that has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SERVER = """
import json, os, resource, sys
import sklearn.datasets, torch, torchvision, lightning.pytorch.cli
import lqkd.cli, lqkd.data, lqkd.losses, lqkd.regularizers, lqkd.models, lqkd.callbacks
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 1
        try:
            os.environ.update(order["environment"])
            sys.argv = ["lqkd", *order["arguments"]]
            exec(order["before"])
            status = lqkd.cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
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
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self.log.write_text("")
        order = {"arguments": arguments, "log": str(self.log), "before": before, "environment": environment or {}}
        print(json.dumps(order), file=self._server.stdin, flush=True)
        meanwhile(int(self._server.stdout.readline()))
        return int(self._server.stdout.readline())


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
