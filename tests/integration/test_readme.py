"""README's examples work as they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lqkd.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[2]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands(verb: str) -> list[list[str]]:
    """Arguments of every ``python -m lqkd`` command of that verb on the quickstart."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.split("&&")[-1])[3:] for line in lines if "python -m lqkd" in line]
    return [arguments for arguments in found if arguments[0] == verb and "configs/quickstart.yaml" in arguments]


RANKING = "ranking/recipe.yaml"
"""What one command of README writes and the next one reads."""


def test_the_first_two_blocks_are_the_two_commands() -> None:
    assert [block.strip() for block in blocks("bash")[:2]] == [
        "pip install -e . && python -m lqkd fit --config configs/quickstart.yaml",
        'pip install -e ".[dev]" && pytest',
    ]


@pytest.mark.parametrize("arguments", [c for c in commands("fit") if RANKING not in c], ids=" ".join)
def test_a_command_on_the_quickstart_is_accepted(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    if "--print_config" in arguments:
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    else:
        assert main([*arguments, "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]) == 0


def test_the_ranking_writes_what_the_fit_after_it_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    (ranking,) = commands("sensitivity")
    (fit,) = [arguments for arguments in commands("fit") if RANKING in arguments]
    there = str(tmp_path / "ranking")
    assert main([there if argument == "ranking" else argument for argument in ranking]) == 0
    fit = [f"{there}/recipe.yaml" if argument == RANKING else argument for argument in fit]
    assert main([*fit, "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]) == 0


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split("lqkd.")[-1].split("\n")[0][:30])
def test_a_yaml_example_is_accepted(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(ROOT)
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(yaml.safe_load(block)))
    arguments = ["--config", str(tmp_path / "example.yaml"), "--trainer.fast_dev_run", "true"]
    assert main(["fit", "--config", "configs/quickstart.yaml", *arguments, "--run.root", str(tmp_path)]) == 0


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_example_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})
