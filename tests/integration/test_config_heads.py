"""The commands in the comments at the head of every shipped configuration are ones that lqkd takes."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from lqkd.cli import main
from lqkd.cli.arguments import of
from lqkd.cli.overview import unknown

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def head(config: Path) -> str:
    """The comment that a file begins with, without its signs."""
    lines = config.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[1:] for line in lines[:end]).replace("\\\n", " ")


def commands(config: Path) -> list[list[str]]:
    """Module of each command and what follows it; ``...`` stands for the command before."""
    found: list[list[str]] = []
    for line in head(config).splitlines():
        words = shlex.split(line, posix=True) if line.startswith("   ") and "'" not in line else []
        if words[:1] == ["..."]:
            found.append([*found[-1], *words[1:]])
        elif "-m" in words:
            found.append(words[words.index("-m") + 1 :])
    return found


def test_a_head_has_commands_that_name_the_file() -> None:
    for config in CONFIGS:
        assert any(str(config.relative_to(ROOT)) in words for words in commands(config)), config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_the_commands_of_a_head_are_taken(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    given = {word.removeprefix("--") for words in commands(config) for word in words}
    told = re.findall(r"--((?:model|data|trainer|run)\.[\w.]+\w)", head(config))
    weights = [name for name in told if name not in given]  # told in a sentence
    for module, *arguments in commands(config):
        if module != "lqkd":
            assert importlib.util.find_spec(module) is not None, module
            continue
        assert unknown(arguments[0]) is None
        if arguments[0] == "compare":
            of("compare", arguments[1:])
        elif arguments[0] == "fit":
            more = [word for name in weights for word in (f"--{name}", "FILE")]
            with pytest.raises(SystemExit) as stop:
                main([*arguments, *more, "--print_config"])
            captured = capsys.readouterr()
            assert stop.value.code in (0, None), captured.err
            assert yaml.safe_load(captured.out)["model"] is not None
