"""What describes the project agrees with what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import lqkd

ROOT = Path(__file__).parents[2]


def test_the_citation_names_this_version_and_the_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == lqkd.__version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert any("2509.20854" in reference["url"] for reference in citation["references"])


def test_a_commit_is_checked_by_what_the_dev_extra_installs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    installed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\ndev = [")[2]
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {"ruff", "mypy", "nbstripout", "hadolint"}
    assert all(re.search(rf'"{tool}(-bin)?>=', installed) for tool in tools)


@pytest.mark.parametrize("path", re.findall(r"`((?:lqkd|tests|docs)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
def test_what_the_guide_for_contributors_names_is_there(path: str) -> None:
    assert (ROOT / path).exists()
