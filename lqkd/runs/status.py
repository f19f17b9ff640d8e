"""How a command ends: its exit status, and one sentence in place of a traceback."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lqkd.errors import DivergenceError, FullDiskError, LostProcessError, ParityError, Stopped, UsageError
from lqkd.utils.escaping import terminal

_ENDS: dict[type[Exception], int] = {ParityError: 1, DivergenceError: 3, FullDiskError: 4, LostProcessError: 5}
"""Exit status after what ends a training before its time, or an export."""
_AGAIN = "; no file is half-written, and the same command starts again"
"""What there is to say of work that was stopped and left nothing to go on with."""
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
"""A file or folder that may not be read or written, or that lies below a file."""


def exit_status(command: Callable[[], int]) -> int:
    """Run a command and return its exit status: its own, or 2 after a user's mistake, told in one line."""
    _silence_noise()
    try:
        with _stopping_at_sigterm():
            status = command()
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
