"""``python -m lqkd export``, run as a user runs it, and what a runtime makes of the files."""

from __future__ import annotations

import json
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import lqkd
from lqkd.cli import main
from lqkd.data import CIFAR10, Digits
from lqkd.errors import UsageError
from lqkd.export import check, deploy, portable
from lqkd.export import emitter as emitter_module
from lqkd.export.runtimes import kernels
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm
from tests.cifar10 import DATA, part_of_cifar10

SHIPPED = str(Path(__file__).parents[2] / "configs" / "regularizer.yaml")
FLOAT = str(Path(__file__).parents[2] / "configs" / "teachers" / "digits_student.yaml")


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


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def change_state(folder: Path, change: Any) -> None:
    path = folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_becomes_a_file_that_predicts_the_same_and_a_card(copied: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(copied)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "100.000% of 359 samples" in printed
    assert "359 samples of the test split" in printed
    assert "none but the quantization of the input" in printed
    assert "the same logits to the last bit" in printed
    assert re.search(r"same first class as trained.*?\d+\.\d\d% of 359 samples", printed)
    session = onnxruntime.InferenceSession(str(copied / "student.onnx"))
    props = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert props["lqkd.parity"]["passed"]
    assert (props["lqkd.parity"]["end_to_end_output_steps"], props["lqkd.parity"]["end_to_end_fraction"]) == (0, 0)
    assert (props["lqkd.parity"]["samples"], props["lqkd.parity"]["split"]) == (359, "test")
    assert props["lqkd.bits"]["conv1"] == "W8A8"
    assert props["lqkd.bits"]["layer1.0.conv1"] == "W2A2"
    assert props["lqkd.class_names"] == [str(i) for i in range(10)]
    assert "digits_teacher" in json.dumps(props["lqkd.teacher"])
    data = Digits()
    data.setup()
    how = props["lqkd.preprocessing"]
    batches = list(data.test_dataloader())
    pixels = torch.cat([batch.images for batch in batches]).numpy().astype(np.float32) / 255
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    x = (pixels - np.float32(how["mean"])[:, None, None]) / np.float32(how["std"])[:, None, None]
    logits = session.run(None, {"images": x.astype(np.float32)})[0]
    accuracy = float((logits.argmax(1) == labels).mean())
    assert accuracy == pytest.approx(props["lqkd.parity"]["exported"], abs=1e-9)
    summary = json.loads((copied / "summary.json").read_text())
    assert props["lqkd.parity"]["as_trained"] == pytest.approx(summary["test"], abs=1e-6)
    card = (copied / "student.onnx.md").read_text()
    assert "W2A2 (6 layers)" in card
    teacher = "`CifarResNet(depth=14, num_classes=10, width=8, in_channels=1)`, weights builtin:digits_teacher"
    assert f"\nteacher: {teacher}\n" in card


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "mine.onnx"
    output.write_text("mine")
    assert "exists: give --overwrite" in refused(capsys, str(run), "--output", str(output))
    assert output.read_text() == "mine"
    assert main(["export", str(run), "--output", str(output), "--overwrite"]) == 0
    assert output.stat().st_size > 1000


def test_a_file_of_an_earlier_student_is_told_by_export_predict_and_report(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(copied)]) == 0
    assert main(["report", str(copied)]) == 0
    image = str(tmp_path / "0.png")
    Image.new("L", (8, 8)).save(image)
    assert main(["predict", str(copied / "student.onnx"), image]) == 0
    assert "warning" not in capsys.readouterr().err
    change_state(copied, lambda state: state["student.linear.bias"].add_(1))  # as a resumed training would
    old = "student.onnx' is of an earlier student: checkpoints/best.ckpt of its run has changed since"
    assert old in refused(capsys, str(copied))
    assert main(["predict", str(copied / "student.onnx"), image]) == 0
    assert old in capsys.readouterr().err
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().err.count(old) == 1
    assert "is of an earlier student" in (copied / "report.html").read_text()
    assert main(["export", str(copied), "--output", str(copied / "other.onnx")]) == 0
    assert capsys.readouterr().err.count(old) == 1
    assert main(["export", str(copied), "--overwrite"]) == 0
    assert old not in capsys.readouterr().err


def test_data_without_a_test_split_are_judged_on_validation_which_is_said(
    copied: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("test_dataloader", "predict_dataloader"):
        monkeypatch.delattr(f"lqkd.data.base.ImageDataModule.{name}")
    assert main(["export", str(copied)]) == 0
    said = "144 samples of the validation split, which chose the checkpoint, as the data have no test split"
    assert said in " ".join(re.sub(r"[│]", " ", capsys.readouterr().out).split())
    assert said in (copied / "student.onnx.md").read_text()


def test_a_file_that_differs_is_kept_under_another_name_and_the_command_fails(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = emitter_module.Emitter._write_relu

    def wrong(self: Any, node: Any, found: Any) -> None:
        original(self, node, found)
        source, _, high = self.deferred[node]
        self.deferred[node] = (source, 0.5, high)

    monkeypatch.setattr(emitter_module.Emitter, "_write_relu", wrong)
    assert main(["export", str(run), "--output", str(tmp_path / "x.onnx")]) == 1
    assert "the first difference arises at grids." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.rejected.onnx"]


def test_mistakes_are_told_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "does not exist: give the folder of a finished training" in refused(capsys, str(tmp_path / "nothing"))
    assert "--format int8 is unknown: use one of portable" in refused(capsys, str(run), "--format", "int8")
    assert "use .onnx" in refused(capsys, str(run), "--output", str(tmp_path / "student.bin"))
    folder = refused(capsys, str(run), "--format", "compressed-tensors", "--output", str(tmp_path / "student.onnx"))
    assert "writes a folder: use student.compressed-tensors" in folder
    (tmp_path / "file").touch()
    unwritable = str(tmp_path / "file" / "student.onnx")
    assert "cannot be written" in refused(capsys, str(run), "--output", unwritable)


def test_a_run_that_was_moved_away_from_the_weights_it_started_from_is_exported(copied: Path) -> None:
    config = copied / "config.yaml"
    text = config.read_text().replace("builtin:digits_teacher", "gone/teacher.safetensors")
    config.write_text(text.replace("builtin:digits_student", "gone/student.safetensors"))
    assert config.read_text().count("gone/") == 2
    assert main(["export", str(copied)]) == 0


def test_a_missing_checkpoint_is_told(copied: Path, capsys: pytest.CaptureFixture) -> None:
    (copied / "checkpoints" / "best.ckpt").unlink()
    assert "has no checkpoints/best.ckpt" in refused(capsys, str(copied))


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "a scale of layer1.0.conv1 is zero"), (float("nan"), "a scale of layer1.0.conv1 is not finite")],
)
def test_a_scale_that_is_zero_or_nan_is_told_with_its_layer(
    copied: Path, capsys: pytest.CaptureFixture, value: float, message: str
) -> None:
    change_state(copied, lambda state: state["student.layer1.0.conv1.input_quantizer.scale"].fill_(value))
    assert message in refused(capsys, str(copied))


def test_a_bit_schedule_that_is_not_finished_is_told(copied: Path, capsys: pytest.CaptureFixture) -> None:
    change_state(copied, lambda state: state["student.layer1.0.conv1.weight_quantizer.format"].fill_(4))
    assert "is not finished" in refused(capsys, str(copied))


def test_a_run_in_floating_point_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = fit(tmp_path, config=FLOAT)
    assert "is in floating point" in refused(capsys, str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "format_name", ["packed4", "packed2", "qonnx", "openvino", "litert", "executorch", "coreml", "torch"]
)
def test_every_other_format_passes_from_the_command_line(run: Path, tmp_path: Path, format_name: str) -> None:
    if format_name in ("qonnx", "openvino", "litert", "executorch", "coreml"):
        pytest.importorskip({"litert": "ai_edge_litert", "coreml": "coremltools"}.get(format_name, format_name))
    names = {"torch": "x.pt2", "litert": "x.tflite", "executorch": "x.pte", "coreml": "x.mlpackage"}
    output = tmp_path / names.get(format_name, "x.onnx")
    assert main(["export", str(run), "--format", format_name, "--output", str(output)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        output.name,
        f"{output.name}.md",
        f"{output.name}.report.json",
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ncnn", "power_of_two"])
def test_a_run_that_is_trained_for_a_target_becomes_its_file(tmp_path: Path, target: str) -> None:
    if target == "ncnn":
        pytest.importorskip("ncnn")
    setting = "--model.init_args.quantization"
    run = fit(tmp_path, f"{setting}.target", target, f"{setting}.residual_bits", "8")
    for _ in range(2):
        assert main(["export", str(run), "--format", target, "--overwrite"]) == 0
    output = run / {"ncnn": "student.ncnn", "power_of_two": "student.power_of_two.onnx"}[target]
    assert output.exists()
    assert output.with_name(f"{output.name}.md").exists()


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> CIFAR10:
    return part_of_cifar10(tmp_path_factory.mktemp("cifar10"), batch_size=64)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="LQKD_DATA is not set")
@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_a_resnet_20_on_cifar_10_agrees_with_its_file(cifar10: CIFAR10, bits: str) -> None:
    train = [cifar10.preprocess(batch, train=False, epoch=0) for batch in islice(cifar10.train_dataloader(), 20)]
    torch.manual_seed(0)
    network = CifarResNet(20)
    load_weights(network, str(DATA / "weights" / "cifar10_resnet20.safetensors"))
    network, _ = quantize_model(network, Recipe(bits=bits))
    initialize_quantizers(network, train[0].images)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network.train()
    for batch in train:
        optimizer.zero_grad()
        F.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    network.eval()
    reestimate_batchnorm(network, [batch.images for batch in train])
    deployed = deploy(network, train[0].images[:2], [batch.images for batch in train[:8]])
    exported = portable.build(deployed)
    batches = (cifar10.preprocess(b, train=False, epoch=0) for b in cifar10.test_dataloader())
    test = [(batch.images, batch.labels) for batch in islice(batches, 16)]
    parity = check(exported, deployed, test[0][0][:32], test, network)
    assert parity.problem is None
    assert parity.samples == sum(len(labels) for _, labels in test) > 1000
    assert parity.differing == 0
    assert parity.output_steps == 0
    found = kernels(exported.model)
    assert found.floats == ()
    assert found.integer["QLinearConv"] == 19


def test_a_config_is_no_run(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({}))
    assert "is not a run folder" in refused(capsys, str(tmp_path / "c.yaml"))


# ---- a folder for the Hugging Face Hub


@pytest.fixture(scope="module")
def hub(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "digits-w2a2"
    assert main(["export", str(run), "--hub", str(folder)]) == 0
    return folder


def test_the_network_of_a_hub_folder_answers_like_that_of_the_run_to_the_last_bit(hub: Path, run: Path) -> None:
    images = torch.randn(8, 1, 8, 8)
    ours = lqkd.load_student(run)(images)
    moved = Path(shutil.copytree(hub, hub.with_name("moved")))
    assert torch.equal(lqkd.from_pretrained(moved)(images), ours)


def test_the_card_of_a_hub_folder_has_the_metrics_that_the_hub_reads(hub: Path, run: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data = huggingface_hub.ModelCard.load(hub / "README.md").data
    summary = json.loads((run / "summary.json").read_text())
    pytorch, file = data.eval_results
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("lqkd", "image-classification", "digits-w2a2")
    assert (pytorch.metric_type, pytorch.metric_value) == ("accuracy", summary["test"])
    assert (file.dataset_name, file.dataset_split) == ("Digits", "test")
    assert file.metric_name == "accuracy (model.onnx)"
    assert f"student in floating point | {summary['student_float']:.2%}" in (hub / "README.md").read_text()


def test_the_file_of_a_hub_folder_is_asked_about_images(hub: Path, tmp_path: Path) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    assert main(["predict", str(hub / "model.onnx"), str(tmp_path / "grey.png")]) == 0


def test_a_hub_folder_whose_settings_were_changed_is_refused(hub: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hub, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"bits": "w4a4"}}))
    with pytest.raises(UsageError, match=r"config.json' and model.safetensors differ in 'quantization'"):
        lqkd.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"config.json' does not exist: give a folder that python -m lqkd export"):
        lqkd.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "other.onnx"], "--output 'other.onnx' is not possible with --hub"),
        (["--format", "torch"], "--format torch is not possible with --hub: use one of portable"),
        ([], "README.md' exists: give --overwrite, or another --hub"),
    ],
)
def test_what_a_hub_folder_cannot_be_is_told(
    arguments: list[str], message: str, hub: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--hub", str(hub), *arguments]) == 2
    assert message in capsys.readouterr().err
