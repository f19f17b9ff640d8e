"""Names and texts out of files, escaped for where they go.

A class folder, a file or a sentence in a stranger's run may be called anything: a formula, a tag, a code that moves the
cursor. Pages of HTML are escaped by their templates.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that let text run in another direction than it is written in."""
_FORMULA = ("=", "+", "-", "@", "'")
"""What a spreadsheet takes for a formula when a cell begins with it, and the mark that keeps it from doing so."""


def terminal(text: Any) -> str:
    """``text`` in one line that a terminal shows and does not obey: a control character becomes its escape."""
    return "".join(_escape(c) if _is_control(c) else c for c in str(text))


def markdown(text: Any) -> str:
    """``text`` as it is read in a line or a cell of Markdown: no tag, link, emphasis or further cell comes of it."""
    escaped = re.sub(r"[\\`*|]|\](?=[(\[:])", lambda found: f"\\{found[0]}", terminal(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: Any) -> str:
    """``text`` between the backticks of Markdown, where nothing else is read as a mark."""
    return "`" + terminal(text).replace("`", "'") + "`"


def csv_cell(value: Any) -> Any:
    """``value`` for a cell of a CSV file; of a number or nothing it is the same.

    A text with which a formula could begin gets a ``'`` before it, as OWASP advises, and so does one that begins with
    ``'``; control characters and backslashes become escapes. No two texts become the same one.
    """
    if not isinstance(value, str):
        return value
    text = terminal(value.replace("\\", "\\\\"))
    return f"'{text}" if text.startswith(_FORMULA) else text


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
