"""``python -m lqkd sensitivity``, run as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lqkd.cli import main
from lqkd.data import Digits
from lqkd.data.base import ImageSet

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "configs" / "regularizer.yaml")
FLOAT = str(ROOT / "configs" / "teachers" / "digits_student.yaml")
LAYERS = ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2)), "linear"]


def fit(root: Path, *arguments: str, config: str = SHIPPED) -> Path:
    before = set((root / "runs").glob("*/*"))
    short = ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "256", "--trainer.log_every_n_steps", "1"]
    assert main(["fit", "--config", config, "--run.root", str(root / "runs"), *short, *arguments]) == 0
    (folder,) = set((root / "runs").glob("*/*")) - before
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, of which tests write to other folders."""
    return fit(tmp_path_factory.mktemp("shared"))


def rank(run: str | Path, output: Path, *arguments: str) -> dict[str, Any]:
    assert main(["sensitivity", str(run), "--output", str(output), *arguments]) == 0
    return json.loads((output / "sensitivity.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sensitivity.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_is_ranked_into_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = fit(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["sensitivity", str(folder), "--bits", "4,w2a8"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / "sensitivity.json").read_text())
    ranked = [group[0]["layers"][0] for group in found["layers"]]
    assert sorted(ranked) == sorted(LAYERS)
    shown = [line.split()[0] for line in printed.splitlines() if line.split()[:1] and line.split()[0] in LAYERS]
    assert shown == ranked
    assert [row["layer"] for row in rows(folder)][::2] == ranked
    assert {(row["weight_bits"], row["activation_bits"]) for row in rows(folder)} == {("4", "4"), ("2", "8")}
    assert not (folder / "recipe.yaml").exists()
    assert {path: path.read_bytes() for path in before} == before


def test_the_weights_are_the_float_ones_of_the_best_checkpoint(run: Path, tmp_path: Path) -> None:
    expected = rank(run, tmp_path / "a", "--bits", "4")["float"]["loss"]
    changed = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    for key in changed["state_dict"]:
        if ".weight_quantizer." in key and changed["state_dict"][key].is_floating_point():
            changed["state_dict"][key] *= 100
    other = tmp_path / "run"
    (other / "checkpoints").mkdir(parents=True)
    (other / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    torch.save(changed, other / "checkpoints" / "best.ckpt")
    assert rank(other, tmp_path / "b", "--bits", "4")["float"]["loss"] == expected
    changed["state_dict"]["student.linear.weight"] *= 0
    torch.save(changed, other / "checkpoints" / "best.ckpt")
    assert rank(other, tmp_path / "c", "--bits", "4")["float"]["loss"] > expected + 1


def test_fit_takes_the_recipe_and_the_run_has_its_bits_and_the_promised_size(run: Path, tmp_path: Path) -> None:
    chosen = rank(run, tmp_path / "ranking", "--budget", "size=12%")["assignment"]
    assert len(set(chosen["bits"].values())) > 1
    trained = fit(tmp_path, "--config", str(tmp_path / "ranking" / "recipe.yaml"))
    lines = (line.split() for line in (trained / "layers.txt").read_text().splitlines()[1:])
    assert {w[0]: f"W{w[2]}A{w[3]}" for w in lines if w[0] in LAYERS} == chosen["bits"]
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["packed_bytes"] == chosen["packed_bytes"] <= chosen["limit"] == int(0.12 * summary["float_bytes"])
    assert summary["bit_operations"] == chosen["bit_operations"]
    assert {row["layer"] for row in rows(tmp_path / "ranking") if row["chosen"] == "1"} == set(LAYERS)


def test_a_layer_that_the_recipe_leaves_in_float_is_not_ranked_and_stays_so(tmp_path: Path) -> None:
    recipe = {"bits": "w4a4", "rules": [{"match": "linear", "weight_bits": 32, "activation_bits": 32}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"quantization": recipe}}}))
    folder = fit(tmp_path, "--config", str(tmp_path / "rules.yaml"))
    found = rank(folder, tmp_path / "ranking", "--budget", "size=20%")
    assert "linear" not in [group[0]["layers"][0] for group in found["layers"]]
    trained = fit(tmp_path, "--config", str(tmp_path / "ranking" / "recipe.yaml"))
    (line,) = [x for x in (trained / "layers.txt").read_text().splitlines() if x.startswith("linear")]
    assert line.split()[2:4] == ["float", "float"]


def test_a_run_in_floating_point_is_ranked_too(tmp_path: Path) -> None:
    found = rank(fit(tmp_path, config=FLOAT), tmp_path / "ranking", "--bits", "4")
    assert sorted(group[0]["layers"][0] for group in found["layers"]) == sorted(LAYERS)


def test_a_config_is_ranked_before_any_training_with_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    found = rank(SHIPPED, tmp_path / "ranking", "--bits", "8")
    assert found["checkpoint"] is None
    assert found["float"]["value"] > 0.95


def test_test_data_have_no_part_in_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: Digits) -> None:
        raise AssertionError("the test split was asked for")

    monkeypatch.setattr(Digits, "test_dataloader", never)
    assert rank(run, tmp_path, "--bits", "4", "--budget", "bops=5%")["validation_samples"] == 144


def test_batches_are_counted_and_spread_over_the_split(run: Path, tmp_path: Path) -> None:
    assert rank(run, tmp_path / "one", "--bits", "4", "--batches", "1")["validation_samples"] == 48
    assert rank(run, tmp_path / "all", "--bits", "4", "--batches", "99")["validation_samples"] == 144


def test_images_without_a_label_are_left_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Digits.load

    def partly_labelled(data: Digits) -> ImageSet:
        images = load(data)
        return images._replace(train_labels=torch.where(images.train_labels == 3, -1, images.train_labels))

    monkeypatch.setattr(Digits, "load", partly_labelled)
    found = rank(run, tmp_path, "--bits", "4")
    assert 120 < found["validation_samples"] < 144
    assert found["float"]["value"] < 1


def test_a_budget_out_of_reach_is_one_line_that_says_the_smallest_before_anything_is_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["sensitivity", str(run), "--output", str(tmp_path), "--budget", "size=1kB"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert "budget='size=1kB' cannot be reached with these bits: the smallest is size=7.218kB" in line
    assert not list(tmp_path.iterdir())
    assert rank(run, tmp_path, "--budget", "size=7.218kB")["assignment"]["packed_bytes"] == 7218


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    rank(run, tmp_path, "--bits", "4")
    before = (tmp_path / "sensitivity.json").read_bytes()
    capsys.readouterr()
    for arguments in ([], ["--budget", "size=50%"]):
        assert main(["sensitivity", str(run), "--output", str(tmp_path), "--bits", "2", *arguments]) == 2
        assert "exists: give --overwrite, or another --output" in capsys.readouterr().err
    assert (tmp_path / "sensitivity.json").read_bytes() == before
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "'nowhere' does not exist: give a run folder or a config file"),
        ([SHIPPED], "--output is missing"),
        (["RUN", "--bits", "4,x"], "bits='x' are not possible for a ranking"),
        (["RUN", "--bits", "32"], "bits='w32a32' are not possible for a ranking"),
        (["RUN", "--bits", "4,4"], "name the same bits twice"),
        (["RUN", "--budget", "12%"], "budget='12%' is not understood: write it like size=120kB"),
        (["RUN", "--batches", "0"], "--batches 0 is not possible"),
        (["RUN", "--batches", "x"], "argument --batches: invalid int value: 'x'"),
        (["RUN", "--metric", "kl"], "unrecognized arguments: --metric kl"),
        (["EMPTY"], "is neither a run folder (with config.yaml) nor a config file"),
        (["RUN", "--output", __file__], "is not a folder"),
    ],
)
def test_a_mistake_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    places = {"RUN": str(run), "EMPTY": str(tmp_path)}
    try:
        status = main(["sensitivity", *(places.get(argument, argument) for argument in arguments)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert (status, line[:13]) == (2, "lqkd: error: ")
    assert message in line
    assert not (run / "sensitivity.json").exists()


def test_a_run_without_a_checkpoint_says_what_to_give_instead(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["sensitivity", str(tmp_path), "--bits", "4", "--batches", "1"]) == 2
    told = capsys.readouterr().err
    assert f"go on with python -m lqkd resume {tmp_path}, or" in told
    advised = told.rpartition("starts from: ")[2].split()
    assert main([*advised, "--bits", "4", "--batches", "1", "--output", str(tmp_path / "ranking")]) == 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.ckpt").write_bytes(b"damaged")
    assert main(["sensitivity", str(tmp_path)]) == 2
    assert "is not a checkpoint that can be read" in capsys.readouterr().err


def test_the_runs_loggers_and_callbacks_take_no_part(run: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["logger"] = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "log")}}
    ]
    stages = [{"bits": "w8a8", "until_epoch": 1}]
    config["trainer"]["callbacks"] = [
        {"class_path": "lqkd.callbacks.BitWidthScheduler", "init_args": {"stages": stages}}
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    rank(tmp_path / "config.yaml", tmp_path / "ranking", "--bits", "4")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("patience", [0.0, 1000.0])
def test_a_terminal_gets_a_bar_with_the_time_left_once_it_takes_a_while(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    parent, child = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("lqkd.utils.progress.Progress._patience", patience)
    monkeypatch.setattr("lqkd.utils.progress._BETWEEN", -1.0)  # every step, however fast the machine is
    with monkeypatch.context() as context, os.fdopen(child, "w") as terminal:
        context.setattr(sys, "stderr", terminal)
        rank(run, tmp_path, "--bits", "4")
    shown = _read(parent)
    if patience:
        assert shown == ""
    else:
        assert "quantising each layer alone" in shown
        assert "0:00:0" in shown


def _read(descriptor: int) -> str:
    chunks = b""
    try:
        while chunk := os.read(descriptor, 4096):
            chunks += chunk
    except OSError:  # the other end is closed and all has been read
        pass
    os.close(descriptor)
    return chunks.decode()


def test_help_names_it(capsys: pytest.CaptureFixture) -> None:
    main(["--help"])
    assert "sensitivity rank the layers" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        main(["sensitivity", "--help"])
    assert "Test data are not used" in " ".join(capsys.readouterr().out.split())
