"""Study files and the arguments of compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lqkd.cli.arguments import of
from lqkd.errors import UsageError
from lqkd.studies.settings import Study
from lqkd.studies.sweep import check_sweep, wandb_sweep


def read(tmp_path: Path, described: dict[str, Any], *arguments: str) -> tuple[Study, dict[str, Any]]:
    (tmp_path / "base.yaml").write_text("trainer: {max_epochs: 3, precision: 32}\n")
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "base": "base.yaml", "variants": {"a": {}}} | described, sort_keys=False)
    )
    study, base, _ = of("compare", ["--config", str(path), *arguments])
    return study, base


def test_the_base_lies_beside_the_study_file(tmp_path: Path) -> None:
    _, base = read(tmp_path, {})
    assert base == {"trainer": {"max_epochs": 3, "precision": 32}}


def test_settings_of_the_file_and_then_of_the_command_line_win(tmp_path: Path) -> None:
    described = {"settings": {"trainer.max_epochs": 5, "data": {"x": 1}}}
    _, base = read(tmp_path, described, "--set", "trainer.max_epochs=7", "data.x=[2]")
    assert base == {"trainer": {"max_epochs": 7, "precision": 32}, "data": {"x": [2]}}


def test_name_root_and_seeds_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    study, _ = read(tmp_path, {}, "--name", "n", "--root", "r", "--seeds", "4", "5")
    assert (study.folder, study.seeds) == (Path("r/n"), [4, 5])


def test_a_setting_that_is_no_yaml_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--set a=\[1 is not possible: '\[1' is no YAML value"):
        read(tmp_path, {}, "--set", "a=[1")


def test_the_first_variant_is_the_baseline_unless_one_is_named(tmp_path: Path) -> None:
    variants: dict[str, Any] = {"variants": {"b": {}, "a": None}}
    assert read(tmp_path, variants)[0].compared_with == "b"
    assert read(tmp_path, variants | {"baseline": "a"})[0].compared_with == "a"


def test_cached_answers_go_to_a_folder_of_the_study(tmp_path: Path) -> None:
    _, base = read(tmp_path, {"teacher_cache": {"dtype": "float32"}})
    assert base["model"]["init_args"]["teacher_cache"] == {"folder": "studies/s/teacher_cache", "dtype": "float32"}


@pytest.mark.parametrize(
    ("described", "complaint"),
    [
        ({"seed": [0]}, "seed is no setting of a study: use name, base"),
        ({"seeds": 3}, "seeds=3 is not possible: a list is needed"),
        ({"seeds": [1, 1]}, "give different whole numbers"),
        ({"seeds": ["x"]}, "give whole numbers"),
        ({"seeds": [0, -1]}, "seeds=-1 is not possible: a seed is a whole number from 0"),
        ({"seeds": [2**32]}, "seeds=4294967296 is not possible"),
        ({"sweep": {"parameters": {}, "sampler_seed": -1}}, "sweep.sampler_seed=-1 is not possible"),
        ({"variants": {"a/b": {}}}, "'a/b' is not possible: use letters"),
        ({"variants": {"a": 3}}, "variants.a=3 is not possible: a mapping"),
        ({"variants": {}}, "name at least one variant"),
        ({"baseline": "z"}, "baseline='z' is no variant: use one of a"),
        ({"launcher": {"parallel": 0}}, "launcher.parallel=0 is not possible"),
        ({"launcher": {"gpus": 1}}, "launcher.gpus is no setting"),
        ({"base": "other.yaml"}, "other.yaml' does not exist"),
        ({"sweep": {"trials": 3}}, "sweep.parameters is missing"),
        ({"scenarios": {"x": {}}}, "scenarios needs tuned"),
        ({"tuned": ["a"]}, "tuned needs scenarios"),
        ({"scenarios": {"x": {}}, "tuned": ["z"]}, "tuned='z' is no variant: use some of a"),
        ({"scenarios": {"x/y": {}}, "tuned": ["a"]}, "scenarios: 'x/y' is not possible: use letters"),
        ({"scenarios": {"x": 3}, "tuned": ["a"]}, "scenarios.x=3 is not possible: a mapping"),
        ({"scenarios": {"x": {}}, "tuned": ["a"], "sweep": {"parameters": {}}}, "scenarios and sweep are not possible"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(tmp_path: Path, described: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, described)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "space", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"choices": 3}, {"lo": 1}]
)
def test_a_parameter_of_a_sweep_that_makes_no_sense_is_refused(tmp_path: Path, space: dict[str, Any]) -> None:
    study, _ = read(tmp_path, {"sweep": {"parameters": {"a.b": space}}})
    assert study.sweep is not None
    with pytest.raises(UsageError, match=r"sweep\.parameters\.a\.b"):
        check_sweep(study.sweep)


def test_the_sweep_file_of_wandb_has_the_same_search(tmp_path: Path) -> None:
    parameters = {"a.b": {"low": 0.1, "high": 1.0, "log": True}, "c": {"choices": [1, 2]}, "d": {"low": 1, "high": 4}}
    study, _ = read(tmp_path, {"sweep": {"parameters": parameters}})
    described = yaml.safe_load(wandb_sweep(study, "val/acc", "max"))
    assert described["parameters"] == {
        "a.b": {"distribution": "log_uniform_values", "min": 0.1, "max": 1.0},
        "c": {"values": [1, 2]},
        "d": {"distribution": "int_uniform", "min": 1, "max": 4},
    }
    assert described["metric"] == {"name": "val/acc", "goal": "maximize"}
