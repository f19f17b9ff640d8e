"""Which checkpoint an exported file came from, and whether its run has another one by now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lqkd.run_folder import BEST, CHECKPOINTS

REPORTS = "*.report.json"
"""What ``export`` leaves beside every file."""


def fingerprint(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(checkpoint, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def outdated(file: Path, said: dict[str, Any]) -> str | None:
    """One sentence when the run in whose folder ``file`` lies has another best checkpoint than ``file`` came from.

    Args:
        file: an exported file.
        said: what it, or the report beside it, says of itself: ``checkpoint``, a fingerprint.

    Returns:
        ``None`` when they are the same, or when either is not known, as of a file outside of a run folder.
    """
    checkpoint, recorded = file.parent / CHECKPOINTS / BEST, said.get("checkpoint")
    if not recorded or not checkpoint.is_file() or fingerprint(checkpoint) == recorded:
        return None
    return (
        f"{str(file)!r} is of an earlier student: {CHECKPOINTS}/{BEST} of its run has changed since; export it again "
        f"with --format {said.get('format', 'portable')} --overwrite"
    )


def outdated_exports(folder: Path) -> dict[Path, str]:
    """Every exported file in the run folder ``folder`` that is of an earlier student, with a sentence that says so."""
    found = {}
    for path in sorted(folder.glob(REPORTS)):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            file = folder / str(said["file"])
            found[file] = outdated(file, said)
        except (ValueError, KeyError, TypeError, AttributeError):  # damaged: told by whoever reads all of it
            continue
    return {file: sentence for file, sentence in found.items() if sentence is not None}
