"""Where a skip is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
A_SKIP = "import pytest\n\n@pytest.mark.skipif(True, reason={!r})\ndef test_it():\n    pass\n"


def run(tmp_path: Path, text: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit status and output of pytest on a file with ``text``."""
    (tmp_path / "test_file.py").write_text(text)
    inherited = {k: v for k, v in os.environ.items() if k not in ("CI", "LQKD_NO_SKIPS", "LQKD_DATA")}
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", *arguments]
    environment = inherited | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("arguments", [(), ("-p", "xdist", "-n", "1")], ids=["here", "in a worker"])
def test_a_skip_fails_in_ci_and_is_named_with_its_reason(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, output = run(tmp_path, A_SKIP.format("no browser"), *arguments, CI="true")
    assert status == 1
    assert "test_file.py::test_it: no browser" in output


def test_a_file_that_is_skipped_whole_fails_in_ci(tmp_path: Path) -> None:
    status, output = run(tmp_path, "import pytest\npytest.importorskip('no_such_module')\n", LQKD_NO_SKIPS="1")
    assert status != 0
    assert "test_file.py: could not import 'no_such_module'" in output


def test_a_skip_is_none_of_ones_own_machine(tmp_path: Path) -> None:
    assert run(tmp_path, A_SKIP.format("no browser"))[0] == 0


def test_real_data_may_be_missing_where_no_folder_of_it_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, A_SKIP.format("LQKD_DATA is not set"), CI="true")[0] == 0
    assert run(tmp_path, A_SKIP.format("LQKD_DATA is not set"), CI="true", LQKD_DATA="nowhere")[0] == 1


def test_what_needs_a_gpu_is_skipped_without_one_in_ci_too(tmp_path: Path) -> None:
    needs_one = "import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    assert False\n"
    status, output = run(tmp_path, needs_one, "-rs", CI="true", CUDA_VISIBLE_DEVICES="")
    assert status == 0
    assert "there is no CUDA device" in output
