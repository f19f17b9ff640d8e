"""What ends a training on the screen: a table, what that means, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lqkd.errors import UsageError
from lqkd.quantization.recipe import BLOCK_FORMATS
from lqkd.runs.folder import NETWORKS, SUMMARY
from lqkd.runs.networks import networks_of
from lqkd.runs.provenance import REPORTS
from lqkd.runs.student import describe_student
from lqkd.runs.verdicts import in_a_sentence, measured_on, verdicts
from lqkd.tasks.values import name_of
from lqkd.utils.schema import SUMMARY as SCHEMA
from lqkd.utils.schema import read_json
from lqkd.utils.screen import tell
from lqkd.utils.tables import print_table

PAGE = "report.html"
"""What ``report`` leaves in a run folder."""


@rank_zero_only
def print_outcome(folder: Path) -> None:
    """Print what teacher, student and files are worth and take, what that means, and what there is to do with them.

    On the test split, or on the validation split where a finished training had no other.

    Args:
        folder: of a run that has ended.
    """
    summary = read_json(folder / SUMMARY, SCHEMA)
    metric, split = name_of(summary["metric"]), measured_on(summary)[1]
    if rows := networks_of(folder, summary):
        print_table(f"{metric} on the {split}", ("network", metric, "size"), rows)
    for sentence in _sentences(summary):
        tell(sentence)
    tell(f"run folder: {folder}")
    for what, how in _next(folder, summary):
        tell(f"{what}: {how}", indent=2)


def _sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["weight_bits"] or measured_on(summary)[0] is None:  # the table says all of a network in floating point
        yield in_a_sentence(summary)
    if summary["regularizer"] is None and summary["balance"] is not None and summary["steps"]:
        yield "no regularizer: every element of the distillation loss has the same, fixed weight"
    told = [one.sentence for one in verdicts(summary).values()]
    yield from told
    yield from (f"warning: {text}" for text in summary.get("warnings", ()) if text not in told)


def _next(folder: Path, summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What there is, and what can be done next."""
    files = sorted(path.name.removesuffix(REPORTS.removeprefix("*")) for path in folder.glob(REPORTS))
    yield from (("file", str(folder / name)) for name in files)
    option = _format(folder)
    if not files and summary["weight_bits"] and option is not None:
        yield "next, a file to take away", f"python -m lqkd export {folder}{option}"
    if (folder / PAGE).is_file():
        yield "page", str(folder / PAGE)
    else:
        yield "next, a page about it", f"python -m lqkd report {folder}"


def _format(folder: Path) -> str | None:
    """The option of ``export`` for the file of a student's grid; None of a language model on a grid without one."""
    said: dict[str, Any] = {}
    with suppress(UsageError):  # there is no such file, or it is damaged: told by whoever needs it
        said = describe_student(folder / NETWORKS[0])
    if (said.get("quantization") or {}).get("bits") in BLOCK_FORMATS:
        return " --format gguf"
    return None if (said.get("student") or {}).get("class_path") == "lqkd.models.GPT" else ""
