"""In CI a test that is skipped is a test that fails, but for the reasons listed here.

Active where ``CI`` is ``true`` or ``LQKD_NO_SKIPS`` is ``1``, which ``.ci/run`` sets.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

NO_GPU = "there is no CUDA device"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


ACCEPTED = {
    "LQKD_DATA is not set": lambda: "LQKD_DATA" not in os.environ,  # data sets and weights are in no repository
    NO_GPU: lambda: not _has_gpu(),  # which no package brings; benchmarks.gpu runs these tests where there is one
}
"""The reason of a skip, and when it is good enough. All else that a machine may lack ``.ci/run`` installs."""


def _refused(terminal: Any) -> list[str]:
    """Name and reason of all that was skipped without a reason that is accepted."""
    if os.environ.get("CI") != "true" and os.environ.get("LQKD_NO_SKIPS") != "1":
        return []
    reports = terminal.stats.get("skipped", [])
    skipped = [(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")) for report in reports]
    return [f"{name}: {reason}" for name, reason in skipped if not ACCEPTED.get(reason, lambda: False)()]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not _has_gpu():
        pytest.skip(NO_GPU)


def pytest_sessionfinish(session: pytest.Session) -> None:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")  # which a worker of xdist has not
    if terminal is not None and not session.exitstatus and _refused(terminal):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if refused := _refused(terminalreporter):
        terminalreporter.section("skipped, which fails here unless tests/skips.py accepts the reason", red=True)
        for line in refused:
            terminalreporter.line(line)
