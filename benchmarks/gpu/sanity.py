"""Stage: every test marked ``gpu``, each with its outcome as soon as it is known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import UNFINISHED, stage_parser
from benchmarks.gpu.results import Table, machine

TESTS = Path(__file__).parents[2] / "tests" / "gpu"


class Outcomes:
    """A plugin of pytest that writes a row for each test.

    Args:
        table: where they go; tests that passed on an earlier visit are not run again.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self._passed = {row["test"] for row in table.rows if row["outcome"] == "passed"}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        message = ""
        if report.failed:
            message = str(report.longrepr).strip().splitlines()[-1][:300]
        elif report.skipped:
            message = report.longrepr[2]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "note": message}
        self.table.add(row | machine())


def main() -> int:
    arguments = stage_parser(__doc__ or "").parse_args()
    import pytest

    outcomes = Outcomes(Table(arguments.out / "sanity.csv", "test"))
    # One process: workers would report late, and share one GPU.
    options = ["-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
    status = pytest.main([*options, str(TESTS)], plugins=[outcomes])
    if status == pytest.ExitCode.TESTS_FAILED:
        return UNFINISHED
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else 1


if __name__ == "__main__":
    sys.exit(main())
