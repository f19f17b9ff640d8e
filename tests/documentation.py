"""The fenced blocks of README and docs/, and what a test does with each of them.

A block of ``bash``, or without a language, holds commands; ``python`` and ``yaml`` are what they say; ``text`` is
quoted output. A block that cannot run anywhere has a comment above it, which a reader of the page does not see::

    <!-- not run: needs SLURM -->

A ``python`` or ``yaml`` block whose first line is a comment with a file's name is that file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS, OUTPUT = ("bash", ""), "text"
LANGUAGES = (*COMMANDS, "python", "yaml", OUTPUT)

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_NAME = re.compile(r"\A# (\S+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: its path below the repository.
        line: of the opening fence, from 1.
        language: what stands behind the fence.
        text: between the fences.
        reason: why it is not run; None when it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def file(self) -> str | None:
        """Name of the file that the block is."""
        found = _NAME.match(self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages, page by page; of all languages when none is named."""
    return [b for path in PAGES for b in read_blocks(path) if not languages or b.language in languages]


def read_blocks(path: Path) -> Iterator[Block]:
    """The blocks of one page."""
    text = path.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(str(path.relative_to(ROOT)), line, found["language"], found["text"], found["reason"])


def files() -> dict[str, str]:
    """Name and text of every file that the pages print."""
    return {block.file: block.text for block in blocks("python", "yaml") if block.file is not None}


@dataclass(frozen=True)
class Command:
    """One command of a block: environment variables and words, as the shell would split them."""

    environment: dict[str, str]
    words: list[str]

    @property
    def module(self) -> str | None:
        """What ``python -m`` or torchrun's ``-m`` names; None when it is no module."""
        return self.words[self.words.index("-m") + 1] if "-m" in self.words[:-1] else None

    @property
    def arguments(self) -> list[str]:
        """What the module is given."""
        return self.words[self.words.index("-m") + 2 :]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, in order."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            first, words = words[:end], words[end + 1 :]
            values = 0
            while re.match(r"[A-Z_]+=", first[values]):
                values += 1
            yield Command(dict(word.split("=", 1) for word in first[:values]), first[values:])
