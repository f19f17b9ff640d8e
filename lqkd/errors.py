"""The exceptions that mean something to the command line: a user's mistake, and a training that came to nothing."""


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


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted within a sentence of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:")
