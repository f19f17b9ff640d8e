"""The examples of docs/extending.md and docs/choosing.md work as printed, from a folder that is no part of lqkd."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lqkd.cli import main
from lqkd.runs.folder import CONFIG
from tests.documentation import blocks

ROOT = Path(__file__).parents[2]
PRINTED = [b for b in blocks("python", "yaml") if b.page in ("docs/extending.md", "docs/choosing.md")]
FILES = {b.file: b.text for b in PRINTED if b.file is not None}
"""Name and text of every file that the pages print; its first line is its name."""
QUICKSTART = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
STEPS = [
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks=[]",
]
SCRIPT = "from lqkd.__main__ import main; sys.exit(main())"
"""What pip writes into the command ``lqkd``, which has another folder than the current one in front."""
CONFIGURATIONS = sorted(name.removesuffix(".yaml") for name in FILES if name.endswith(".yaml"))
EXAMPLES = sorted(name.removesuffix(".py") for name in FILES if name.endswith(".py"))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all files of the pages, in which the command line is started."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def test_every_block_of_the_pages_is_a_file_with_a_name() -> None:
    assert len(FILES) == len(PRINTED)
    assert {"my_data", "my_images", "my_loss", "my_network", "my_quantizer", "my_regularizer"} == set(EXAMPLES)


@pytest.mark.parametrize(("example", "most"), [("my_quantizer", 20), ("my_regularizer", 20), ("my_loss", 10)])
def test_an_extension_takes_few_lines(example: str, most: int) -> None:
    _, _, of_class = FILES[f"{example}.py"].partition("\nclass ")
    assert 0 < len([line for line in of_class.splitlines() if line.strip()]) <= most


@pytest.mark.parametrize("example", CONFIGURATIONS)
def test_an_example_trains(example: str, outside: Path) -> None:
    assert main([*QUICKSTART, "--config", f"{example}.yaml", *STEPS]) == 0
    (run,) = (outside / "runs" / "quickstart").iterdir()
    given = yaml.safe_load(FILES[f"{example}.yaml"])
    kept = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    assert _holds(kept, given)
    assert (run / "student.safetensors").is_file()


def test_data_without_predictions_of_their_own_predict_their_test_split(outside: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.callbacks=[]"]
    assert main([*QUICKSTART, "--config", "my_data.yaml", "--run.version", "a", *short]) == 0
    run = Path("runs", "quickstart", "a")
    assert main(["predict", "--config", str(run / CONFIG)]) == 0
    assert len((run / "predictions.csv").read_text().splitlines()) == 1 + 397


@pytest.mark.slow
@pytest.mark.parametrize("program", [["-m", "lqkd"], ["-c", "import sys; sys.path.pop(0); " + SCRIPT]])
def test_the_file_beside_the_config_is_found_by_both_commands(outside: Path, program: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [*QUICKSTART, "--config", "my_loss.yaml", "--trainer.fast_dev_run=true"]
    command = [sys.executable, *program, *arguments]
    done = subprocess.run(command, check=False, cwd=outside, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_a_file_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_network.yaml").write_text(FILES["my_network.yaml"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*QUICKSTART, "--config", "my_network.yaml"])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lqkd: error")]
    assert "No module named 'my_network': start lqkd in the folder of that file" in error
    assert len(error) < 200


def test_the_quantizer_of_the_page_keeps_the_contract(outside: Path) -> None:
    torch.manual_seed(0)
    quantizer = importlib.import_module("my_quantizer").Quantile(4, channels=3)
    x = torch.randn(3, 2000, requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y, quantizer.dequantize(quantizer.codes(x)))
    assert len(y[0].unique()) <= 16
    y.square().sum().backward()
    assert quantizer.scale.grad.abs().min() > 0
    assert x.grad.count_nonzero() > 0


def _holds(kept: object, given: object) -> bool:
    """Whether everything of ``given`` stands in ``kept``."""
    if isinstance(given, dict):
        return isinstance(kept, dict) and all(key in kept and _holds(kept[key], given[key]) for key in given)
    return kept == given
