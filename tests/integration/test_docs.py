"""The documentation site builds without a warning, and every page is in it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs: pip install 'lqkd[docs]'"),
]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path)], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in DOCS.glob("*.md")} | {path.parent.name for path in DOCS.glob("*/README.md")}
    assert pages == {path.parent.name for path in (tmp_path / "docs").glob("*/index.html")}
    balances = (tmp_path / "reference" / "balances" / "index.html").read_text(encoding="utf-8")
    assert "FixedBalance" in balances
    settings = (tmp_path / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    row = re.search(r"<tr>\s*<td><code>test_fraction</code></td>(.*?)</tr>", settings, flags=re.DOTALL)
    assert row is not None
    assert "<code>0.2</code>" in row[1]
    assert "held out for testing" in row[1]
    assert ":class:" not in "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "reference").rglob("*.html"))
