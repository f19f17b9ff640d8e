"""The exceptions that mean something to the command line: mistakes, and what ends a training before its time."""

import pickle
import re


class UsageError(ValueError):
    """A setting, file or checkpoint that lqkd cannot accept.

    The message is one sentence that names the setting, its value and what would be accepted. The command line
    prints it without a traceback and exits with status 2; in Python it is an ordinary :class:`ValueError`.
    """


class DivergenceError(RuntimeError):
    """A training whose loss or parameters are NaN or infinite.

    The message says at which step, what is not finite and which checkpoint is still good. The command line prints it
    without a traceback and exits with status 3.
    """


class FullDiskError(Exception):
    """A disk that is full, or a quota or limit that is used up, while a run wrote to it.

    The message says what is whole and how to go on. The command line prints it and exits with status 4.
    """


class ParityError(RuntimeError):
    """An exported model that does not compute what the student computes; the message says where it begins.

    The command line prints it and exits with status 1.
    """


class LostProcessError(Exception):
    """A training of several processes, one of which has ended without a word to the others.

    The message says how to go on. The command line prints it in every process that is left and exits with status 5.
    """


class Stopped(SystemExit):
    """What stopped because a signal, ``number``, asked it to; ``message`` says how to go on.

    Without a message nothing was done that would have to be gone on with. The exit status is the shell's for that
    signal: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(128 + number)
        self.number = number
        self.message = message


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted within a sentence of ours, without colours of a terminal.

    PyTorch's about a file that holds more than tensors is three pages of advice: what is there is said instead.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    held = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and held is not None:
        return f"it holds {held[1]}, code that is not run for a file's sake: save the state dict alone"
    return next(iter(text.splitlines()), type(error).__name__).rstrip(".:")
