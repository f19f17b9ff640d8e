"""Sentences on the terminal: broken between words where a person reads them, whole in a file."""

from __future__ import annotations

import shutil
import sys
import textwrap

from lqkd.utils.escaping import terminal


def tell(text: str, indent: int = 0) -> None:
    """Print ``text``, which may hold names out of files, in as many lines as a terminal needs, one line in a file.

    Args:
        text: to be printed.
        indent: spaces before all lines but the first.
    """
    lines = [terminal(text)]
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
        lines = textwrap.wrap(
            lines[0], width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    print("\n".join(lines), flush=True)
