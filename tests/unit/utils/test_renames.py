"""Configurations, run folders and imports with names of former releases go on working, and the new name is told."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lqkd.cli import main
from lqkd.losses.trust import TrustMap
from lqkd.models import CifarResNet
from lqkd.modules import DistillModule
from lqkd.runs.resume import differences
from lqkd.teachers import FrozenTeacher
from lqkd.utils.renames import CLASSES, MODULES, current, current_terms, renewed
from tests.forked import Forks

SHIPPED = Path(__file__).parents[3] / "configs" / "regularizer.yaml"
OLD = {
    "lqkd.balances.FixedBalance": "lqkd.regularizers.FixedBalance",
    "lqkd.callbacks.oscillation.monitor.OscillationMonitor": "lqkd.callbacks.oscillation_monitor.OscillationMonitor",
    "lqkd.teachers.FrozenTeacher": "lqkd.teacher.FrozenTeacher",
}
"""What the configuration below calls its classes, as former releases did, by what they are called now."""
TOLD = sorted(f"{old} is now {new}" for new, old in OLD.items())


def with_old_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: with_old_names(of) for key, of in value.items()}
    if isinstance(value, list):
        return [with_old_names(of) for of in value]
    return OLD.get(value, value) if isinstance(value, str) else value


def told(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if w.category is FutureWarning and " is now lqkd." in str(w.message)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run of one step whose configuration has old names, and what it was told about them."""
    place = tmp_path_factory.mktemp("old")
    config = with_old_names(yaml.safe_load(SHIPPED.read_text(encoding="utf-8")))
    config["trainer"] = {
        "max_epochs": 1,
        "callbacks": [{"class_path": OLD["lqkd.callbacks.oscillation.monitor.OscillationMonitor"]}],
    }
    config["run"] = {"name": "old", "root": str(place)}
    config["data"].setdefault("init_args", {}).update(limit_train=64, batch_size=64)
    (place / "old.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        assert main(["fit", "--config", str(place / "old.yaml")]) == 0
    return place / "old" / "version_0", told(record)


def test_a_configuration_with_old_names_trains_and_is_told_each_new_one_once(trained: tuple[Path, list[str]]) -> None:
    assert sorted(trained[1]) == TOLD


def test_the_run_of_a_configuration_with_old_names_keeps_the_new_ones(trained: tuple[Path, list[str]]) -> None:
    kept = (trained[0] / "config.yaml").read_text(encoding="utf-8")
    assert renewed(kept) == (kept, {})
    assert "lqkd.balances.FixedBalance" in kept


def test_a_run_folder_with_old_names_resumes_and_differs_in_nothing_but_what_was_asked_for(
    trained: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = trained[0]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    (folder / "config.yaml").write_text(yaml.safe_dump(with_old_names(config)), encoding="utf-8")
    last = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["hyper_parameters"] = with_old_names(checkpoint["hyper_parameters"])
    assert OLD["lqkd.balances.FixedBalance"] in str(checkpoint["hyper_parameters"])
    torch.save(checkpoint, last)
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("default")
        assert main(["resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    assert sorted(told(record)) == TOLD
    assert "resuming" in caplog.text
    assert "differs from the checkpoint" not in caplog.text
    start = json.loads((folder / "starts.json").read_text(encoding="utf-8"))[-1]
    assert start["changed"] == ["trainer.max_epochs was 1 and is now 2"]
    assert start["steps"] == 1


def test_an_old_name_on_the_command_line_reaches_the_terminal_once_and_in_one_line(lqkd: Forks) -> None:
    given = ["--model.init_args.balance", "lqkd.regularizers.GradNorm"]
    assert lqkd.run("fit", "--config", str(SHIPPED), "--print_config", *given) == 0
    printed = lqkd.log.read_text(encoding="utf-8")
    assert "class_path: lqkd.balances.GradNorm" in printed
    (line,) = (line for line in printed.splitlines() if "lqkd.regularizers.GradNorm" in line)
    assert re.fullmatch(r"\S* FutureWarning: lqkd.regularizers.GradNorm is now lqkd.balances.GradNorm", line)


@pytest.mark.parametrize("old", CLASSES)
def test_a_class_is_found_under_its_old_name(old: str) -> None:
    module, _, name = old.rpartition(".")
    home, _, now = CLASSES[old].rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(home), now)


@pytest.mark.parametrize("old", MODULES)
def test_a_module_is_found_under_its_old_name(old: str) -> None:
    new = importlib.import_module(MODULES[old])
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=re.escape(f"{old} is now {MODULES[old]}")):
        found = importlib.import_module(old)
    assert set(dir(found)) == set(dir(new))


def test_a_module_within_an_old_one_is_found() -> None:
    with pytest.warns(FutureWarning):
        from lqkd.teacher_cache.keys import teacher_key  # type: ignore[import-not-found]
    from lqkd.teachers.cache import keys

    assert teacher_key is keys.teacher_key


def test_old_names_are_replaced_at_any_depth_and_nothing_else_is() -> None:
    before = {"a": [{"class_path": "lqkd.ensemble.TeacherEnsemble"}], "b": "lqkd.losses.Hints", "lqkd.teacher.X": 0.5}
    after = {"a": [{"class_path": "lqkd.teachers.TeacherEnsemble"}], "b": "lqkd.losses.Hints", "lqkd.teacher.X": 0.5}
    assert current(before) == after
    assert current("runs/lqkd.teacher.FrozenTeacher") == "runs/lqkd.teacher.FrozenTeacher"


def test_settings_that_differ_in_the_age_of_a_name_are_equal() -> None:
    old = {"balance": {"class_path": "lqkd.regularizers.FixedBalance", "init_args": {"task": 1.0}}}
    new = {"balance": {"class_path": "lqkd.balances.FixedBalance", "init_args": {"task": 2.0}}}
    lines = [line for _, line in differences(old, new)]
    assert lines == ["model.balance.init_args.task was 1.0 and is now 2.0"]


def test_the_references_of_a_checkpoint_of_a_former_release_go_on() -> None:
    module = DistillModule(FrozenTeacher(CifarResNet(8, width=4)), CifarResNet(8, width=4))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint["references"] = {"teacher_accuracy": 0.9, "student_initial_quantized_accuracy": 0.1}
    module.on_load_checkpoint(checkpoint)
    assert module.references == {"teacher": 0.9, "student_start": 0.1}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize(
    ("module", "verb"), [("lqkd.data.shards", "make-shards"), ("lqkd.studies.wandb_report", "wandb-report")]
)
def test_a_command_that_is_a_verb_now_says_so(module: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().err == f"lqkd: error: python -m {module} is now python -m lqkd {verb}\n"


def test_a_trust_map_that_is_older_than_gates_is_loaded_with_a_shut_one() -> None:
    teachers, prefix = torch.randn(2, 4, 3), "distillation.logits.combination.map."
    map_ = TrustMap(2, 3)
    map_.scale.copy_(torch.tensor([0.2, 0.9]))
    map_.given.fill_(False)
    old = {f"{prefix}{name}": kept for name, kept in map_.state_dict().items() if "gate" not in name}
    state = {name.removeprefix(prefix): kept for name, kept in current_terms(old).items()}
    loaded = TrustMap(2, 3)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(teachers), map_(teachers))
