"""The command line ``python -m lqkd``: which verb does what, and how mistakes are told.

What needs no PyTorch is told before it is loaded, which takes seconds.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lqkd.cli import arguments
from lqkd.errors import DivergenceError, FullDiskError, LostProcessError, Stopped, UsageError
from lqkd.cli.overview import overview, unknown
from lqkd.runs.folder import CONFIG
from lqkd.utils.escaping import terminal
from lqkd.utils.progress import Stages

_VERBS = {
    "sensitivity": "lqkd.studies.sensitivity",
    "compare": "lqkd.studies.compare",
    "report": "lqkd.studies.report",
    "export": "lqkd.export.command",
    "predict": "lqkd.export.predict",
}
"""Modules of the verbs that are none of Lightning's; ``predict`` is one of these where it is given images."""
_LIGHTNING = "lqkd.runs.lightning_cli"
_SLOW = ("numpy", "torch", "torchvision", "torchmetrics", "lightning.pytorch")
"""What takes seconds to load, in the order in which it can be loaded; PyTorch loading NumPy would swallow Ctrl-C."""
_SLOW_OF = {"lqkd.studies.report": (), "lqkd.export.predict": ("numpy", "torch")}
"""Of these, what a module needs that does not need all."""
_DESCRIBE = ("--config", "-c", "--model", "--help", "-h", "--print_config")
"""Beginnings of arguments without one of which nothing says what to do."""
_ENDS = {DivergenceError: 3, FullDiskError: 4, LostProcessError: 5}
"""Exit status after what ends a training before its time."""
_AGAIN = "; no file is half-written, and the same command starts again"
"""What there is to say of work that was stopped and left nothing to go on with."""
_ALLOW = "--allow-code"
"""Of Lightning's verbs, which take settings only."""
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""A file or folder that may not be read or written, or that lies below a file."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after a user's mistake, told in one line."""
    _silence_noise()
    try:
        with _stopping_at_sigterm():
            status = _run(sys.argv[1:] if args is None else list(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 141  # as of what SIGPIPE ends
    except (ValueError, OSError) as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"lqkd: error: {terminal(mistake)}", file=sys.stderr)
        return 2
    except tuple(_ENDS) as error:
        _tell(f"lqkd: error: {error}", everywhere=isinstance(error, LostProcessError))
        return _ENDS[type(error)]
    except Stopped as stop:
        _tell(f"lqkd: {stop.message or f'stopped by {signal.Signals(stop.number).name}{_AGAIN}'}")
        return int(stop.code or 0)
    except KeyboardInterrupt:  # outside of a training
        _tell(f"lqkd: interrupted{_AGAIN}")
        return 130


@contextmanager
def _stopping_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end what goes on as Ctrl-C does, unless who called has other plans for it.

    A training has a handler of its own, which saves first: :class:`lqkd.runs.stopping.StopOnSignal`.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked dies as any process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)  # launchers often send it twice; it is being done
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(given: list[str]) -> int:
    if given[:1] in (["--help"], ["-h"]):
        print(overview())
        return 0
    problem = unknown(given[0]) if given else "a verb is missing: fit, for instance"
    if problem is not None:
        raise UsageError(f"{problem} (see python -m lqkd --help)")
    verb, rest = given[0], given[1:]
    if verb in _VERBS and (verb != "predict" or arguments.names_images(rest)):
        read = arguments.of(verb, rest)
        return _load(_VERBS[verb]).main(read) or 0
    if verb == "resume":
        return _resume(*arguments.of_resume(rest))
    allowed, rest = _ALLOW in rest, [text for text in rest if text != _ALLOW]
    configs = _check_described(verb, rest)
    lightning = _load(_LIGHTNING)
    for config in configs:
        _load("lqkd.runs.provenance").check_config_code(config, allowed)
    lightning.LqkdCLI([verb, *rest])
    return 0


def _resume(read: arguments.Resume, settings: list[str]) -> int:
    lightning = _load(_LIGHTNING)
    resumption = _load("lqkd.runs.resume").find(read.run)
    _load("lqkd.runs.provenance").check_run_code(read.run, read.allow_code)
    finished = None if settings else resumption.finished()
    if finished is None:
        lightning.LqkdCLI(["fit", "--config", str(read.run / CONFIG), *settings], resumption)
    else:
        print(terminal(finished))
    return 0


def _check_described(verb: str, given: Sequence[str]) -> list[Path]:
    """Refuse a command without a configuration, and one whose file is not there; the files."""
    if not any(text.startswith(_DESCRIBE) or ".help" in text for text in given):
        other = ", or name a run and images without an option before them" if verb == "predict" else ""
        raise UsageError(f"{verb} needs a configuration: give --config FILE.yaml{other}")
    paths = []
    for option, value in zip(given, [*given[1:], ""], strict=True):
        name, equals, own = option.partition("=")
        path = Path(own if equals else value)
        if name not in ("--config", "-c"):
            continue
        if path.suffix in (".yaml", ".yml") and not path.exists():
            raise UsageError(f"--config {str(path)!r} does not exist: give a YAML file")
        paths.append(path)
    return paths


def _load(name: str) -> Any:
    """A module, and before it those that take seconds, with a bar unless they are there."""
    slow = [module for module in _SLOW_OF.get(name, _SLOW) if module not in sys.modules]
    if slow:
        with Stages(len(slow) + 1) as stage:
            for module in (*slow, name):
                stage("loading")
                importlib.import_module(module)
    return importlib.import_module(name)


def _silence_noise() -> None:
    """Drop messages that are not about the user's run: advertisements, and warnings that lqkd has dealt with."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=r".*LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=r".*Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable")  # BestAndLast sees to it
    warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint need to be provided")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime is found" not in record.getMessage()  # Lightning says whether there is a GPU
    )


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more, as behind ``| head``; then what is left of it is dropped."""
    try:
        print(flush=True)
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _tell(text: str, everywhere: bool = False) -> None:
    """Print to standard error, in the first process only unless that may be the one that is lost."""
    lightning = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if everywhere or getattr(getattr(lightning, "rank_zero_only", None), "rank", None) in (None, 0):
        print(terminal(text), file=sys.stderr, flush=True)


def _mistake(error: BaseException | None) -> str | None:
    """The user's mistake behind ``error``: the argument parser wraps what a class raises while it is built."""
    while error is not None and not isinstance(error, UsageError):
        if isinstance(error, OSError) and error.errno in _NO_ACCESS and error.filename is not None:
            return f"{str(error.filename)!r} cannot be used: {error.strerror}"
        error = error.__cause__
    return None if error is None else str(error)
