"""A configuration stands for no more values than a configuration has."""

from __future__ import annotations

from pathlib import Path

import pytest

from lqkd.cli import main
from lqkd.errors import UsageError
from lqkd.utils.yaml_text import check_yaml, load_yaml

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 900 + "]" * 900], ids=["aliases", "itself", "nested"])
def test_a_text_that_stands_for_too_much_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"'c\.yaml' is not accepted: its aliases or nesting stand for more than"):
        check_yaml(text, "c.yaml")


def test_aliases_of_a_person_are_written_out() -> None:
    assert load_yaml("a: &x {b: 1}\nc: [*x, *x]", "c.yaml") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_a_training_refuses_it_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(BOMB)
    try:
        status = main(["fit", "--config", str(tmp_path / "c.yaml")])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert f"'{tmp_path}/c.yaml' is not accepted: its aliases" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["resume", "report", "sensitivity"])
def test_no_verb_writes_out_the_configuration_of_a_run_that_stands_for_too_much(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(BOMB)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    assert main([verb, str(tmp_path)]) == 2
    assert f"'{tmp_path}/config.yaml' is not accepted: its aliases" in capsys.readouterr().err
