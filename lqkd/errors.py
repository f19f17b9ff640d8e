"""The one exception that means "the user asked for something that cannot be done"."""


class UsageError(ValueError):
    """A setting, file or checkpoint that lqkd cannot accept.

    The message is one sentence that names the setting, its value and what would be accepted. The command line
    prints it without a traceback and exits with status 2; in Python it is an ordinary :class:`ValueError`.
    """


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted within a sentence of ours."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:")
