"""A run folder is code: classes that it names are imported only where the user has named them, or allows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import lqkd
from lqkd.cli import main
from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.runs.provenance import foreign_code
from lqkd.runs.student import describe_student

ROOT = Path(__file__).parents[2]
OWN = "tests.integration.test_foreign_code.Own"


class Own(CifarResNet):
    """A network of the user's."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a network of the user's own."""
    root = tmp_path_factory.mktemp("runs")
    config = str(ROOT / "configs" / "regularizer.yaml")
    short = ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "128"]
    student = ["--model.student.class_path", OWN, "--model.student_weights", "null"]
    arguments = ["--run.root", str(root), "--run.version", "a", "--model.quantization.bits", "w4a4", *short, *student]
    assert main(["fit", "--config", config, *arguments]) == 0
    return root / "regularizer" / "a"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of somebody who has never named the class."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def verbs(folder: Path) -> dict[str, list[str]]:
    config = str(folder / "config.yaml")
    return {
        "resume": ["resume", str(folder)],
        "export": ["export", str(folder), "--overwrite"],
        "predict": ["predict", str(folder), "nothing.png"],
        "sensitivity": ["sensitivity", str(folder)],
        "sensitivity of its config": ["sensitivity", config, "--output", str(folder / "ranking")],
        "test": ["test", "--config", config],
        "predict of its own data": ["predict", "--config", config],
    }


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("verb", verbs(Path()))
def test_no_verb_imports_what_somebody_elses_folder_names(
    verb: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(verbs(run)[verb]) == 2
    err = capsys.readouterr().err
    assert f"no training of yours has named, and that would be run: {OWN}; if you trust it, give --allow-code" in err


@pytest.mark.usefixtures("elsewhere")
def test_it_is_imported_where_that_is_allowed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(run), "--allow-code"]) == 0
    assert main(["predict", "--allow-code", str(run), "nothing.png"]) == 2
    assert "nothing.png" in capsys.readouterr().err  # and nothing else is wrong
    assert main(["test", "--config", str(run / "config.yaml"), "--allow-code"]) == 0
    assert isinstance(lqkd.load_student(run, allow_code=True), Own)
    with pytest.raises(UsageError, match="allow_code=True"):
        lqkd.load_student(run)


def test_who_has_named_a_class_in_a_training_is_not_asked(run: Path) -> None:
    assert main(["resume", str(run)]) == 0
    assert main(["test", "--config", str(run / "config.yaml")]) == 0
    assert isinstance(lqkd.load_student(run), Own)


def test_a_function_that_a_callback_is_to_call_is_not_called(run: Path, tmp_path: Path) -> None:
    folder, made = tmp_path / "run", tmp_path / "made"
    shutil.copytree(run, folder)
    config: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "os.system"}}
    ]
    config["trainer"]["default_root_dir"] = f"touch {made}"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for arguments in (["resume", str(folder)], ["test", "--config", str(folder / "config.yaml")]):
        assert main(arguments) == 2
    assert not made.exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_file_of_a_student_that_names_only_what_everybody_has_is_loaded(run: Path, tmp_path: Path) -> None:
    described = describe_student(run)
    described["student"]["class_path"] = "lqkd.models.CifarResNet"
    file = tmp_path / "student.safetensors"
    save_file(load_file(run / "student.safetensors"), file, {k: json.dumps(v) for k, v in described.items()})
    assert isinstance(lqkd.load_student(file), CifarResNet)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, set()),
        ({"class_path": "lightning.pytorch.callbacks.Timer", "name": "torchvision/resnet18"}, set()),
        ({"class_path": "torch.os.system"}, {"torch.os.system"}),
        ([{"class_path": "lqkd.utils.files.json.loads"}], {"lqkd.utils.files.json.loads"}),
        ({"weight_quantizer": {"name": "json.JSONDecoder"}}, {"json.JSONDecoder"}),
        ({"a": {"b": ["builtins.exec", "__main__.f"]}}, {"builtins.exec", "__main__.f"}),
        ({"taps": ["layer1.conv"], "root": "../data.v2", "weights": "best.pt", "match": "*.conv1"}, set()),
        ({"class_path": "no.such.Network"}, set()),
    ],
)  # fmt: skip
def test_the_code_that_settings_name_is_found_wherever_they_name_it(settings: Any, names: set[str]) -> None:
    assert foreign_code(settings) == names
