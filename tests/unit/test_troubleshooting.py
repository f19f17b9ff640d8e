"""The messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = [" ".join(block.split()) for block in re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)]
BETWEEN = "\0"  # where a value stands in an f-string


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else BETWEEN for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def literals() -> str:
    """All texts of the package, one a line."""
    files = sorted((ROOT / "lqkd").rglob("*.py"))
    return "\n".join(text for path in files for text in _texts(ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_a_quoted_message_is_in_the_code(message: str, literals: str) -> None:
    parts = [part.strip(" ") for part in message.split("...")]
    parts = [part for part in parts if re.search(r"\w\W+\w", part)]
    assert parts
    assert [part for part in parts if part not in literals] == []
