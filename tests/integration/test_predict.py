"""``python -m lqkd predict RUN IMAGES``, ``lqkd.load_student`` and the report of ``export``, as a user gets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import lqkd
from lqkd.cli import main
from lqkd.data import Digits
from lqkd.errors import UsageError
from lqkd.export import to_onnx
from lqkd.runs.student import describe_student

ROOT = Path(__file__).parents[2]
SHORT = ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "256", "--trainer.log_every_n_steps", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its exported student."""
    root = tmp_path_factory.mktemp("runs")
    config = str(ROOT / "configs" / "regularizer.yaml")
    arguments = ["--run.root", str(root), "--run.version", "a", "--model.quantization.bits", "w4a4", *SHORT]
    assert main(["fit", "--config", config, *arguments]) == 0
    assert main(["export", str(root / "regularizer" / "a"), "--latency"]) == 0
    return root / "regularizer" / "a"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The first test images as files."""
    data = Digits()
    data.setup()
    folder = tmp_path_factory.mktemp("images")
    batch = next(iter(data.test_dataloader()))
    for index in range(6):
        Image.fromarray(batch.images[index, 0].numpy()).save(folder / f"{index}.png")
    return [str(folder / f"{index}.png") for index in range(6)]


def told(capsys: pytest.CaptureFixture, *arguments: str, status: int = 0) -> Any:
    capsys.readouterr()
    assert main(["predict", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_run_is_asked_as_its_own_validation_asks_it(
    run: Path, images: list[str], capsys: pytest.CaptureFixture
) -> None:
    found = told(capsys, str(run), *images, "--top-k", "10")
    data = Digits()
    data.setup()
    batch = data.preprocess(next(iter(data.test_dataloader())), train=False, epoch=0)
    with torch.no_grad():
        expected = lqkd.load_student(run)(batch.images[:6]).softmax(dim=1)
    for entry, row in zip(found, expected, strict=True):
        confidences = {x["index"]: x["confidence"] for x in entry["predictions"]}
        assert confidences == pytest.approx(dict(enumerate(row.tolist())), abs=1e-5)
        assert [x["confidence"] for x in entry["predictions"]] == sorted(confidences.values(), reverse=True)
    assert [entry["image"] for entry in found] == images


def test_an_exported_file_is_asked_with_what_it_says_about_itself(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = onnx.load(run / "student.onnx")
    entry = next(x for x in model.metadata_props if x.key == "lqkd.class_names")
    entry.value = json.dumps([f"number {i}" for i in range(10)])
    onnx.save(model, tmp_path / "renamed.onnx")
    by_file = told(capsys, str(run / "student.onnx"), *images)
    renamed = told(capsys, str(tmp_path / "renamed.onnx"), *images)
    by_run = told(capsys, str(run), *images)
    winners = [[entry["predictions"][0]["index"] for entry in found] for found in (by_file, by_run, renamed)]
    assert winners[0] == winners[1] == winners[2]
    assert [entry["predictions"][0]["class"] for entry in renamed] == [f"number {i}" for i in winners[0]]


def test_an_image_that_cannot_be_read_does_not_keep_the_others_from_being_predicted(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    assert main(["predict", str(run), images[0], str(tmp_path / "bad.png"), images[1]]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == images[:2]
    assert "bad.png cannot be read as an image" in err
    found = told(capsys, str(run), str(tmp_path / "bad.png"), images[0], status=2)
    assert [set(entry) for entry in found] == [{"image", "error"}, {"image", "predictions"}]


def test_the_verb_of_lightning_is_still_there(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", "--config", str(run / "config.yaml")]) == 0
    assert "359 predictions written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "x.png"], "'nowhere' does not exist"),
        (["nowhere.onnx", "x.png"], "'nowhere.onnx' does not exist"),
        (["RUN", "x.png", "--top-k", "0"], "--top-k 0 is not possible"),
        (["--top-k", "0", "RUN", "x.png"], "--top-k 0 is not possible"),
        (["EMPTY", "x.png"], "has no student.safetensors"),
        (["FOREIGN", "x.png"], "was not written by lqkd export"),
        (["DAMAGED", "x.png"], "is not an ONNX file that can be read"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = onnx.load(run / "student.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    (tmp_path / "damaged.onnx").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "EMPTY": tmp_path / "empty", "FOREIGN": tmp_path / "foreign.onnx"}
    places["DAMAGED"] = tmp_path / "damaged.onnx"
    assert main(["predict", *(str(places.get(x, x)) for x in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("lqkd: error") == 1


def test_the_student_loads_alone_with_the_weights_of_the_best_checkpoint(run: Path) -> None:
    student = lqkd.load_student(run)
    assert not student.training
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    own = student.state_dict()
    assert own.keys() == {key.removeprefix("student.") for key in saved if key.startswith("student.")}
    assert all(torch.equal(value, saved[f"student.{key}"]) for key, value in own.items())
    by_file = lqkd.load_student(run / "student.safetensors").state_dict()
    assert all(torch.equal(value, by_file[key]) for key, value in own.items())
    assert describe_student(run)["image_shape"] == [1, 8, 8]


def test_loading_a_student_imports_no_lightning_and_lqkd_alone_no_torch(run: Path) -> None:
    code = (
        "import sys, lqkd\n"
        "assert 'torch' not in sys.modules\n"
        f"lqkd.load_student({str(run)!r})\n"
        "assert not [m for m in sys.modules if m.startswith(('lightning', 'lqkd.modules', 'lqkd.runs.light'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_student_file_that_cannot_be_loaded_is_told_why(run: Path, tmp_path: Path) -> None:
    tensors, described = load_file(run / "student.safetensors"), describe_student(run)
    metadata = {key: json.dumps(value) for key, value in described.items()}
    save_file(tensors, tmp_path / "python.safetensors", metadata | {"student": "null"})
    save_file({k: v for k, v in tensors.items() if "conv1" not in k}, tmp_path / "less.safetensors", metadata)
    unknown = json.dumps({"class_path": "no.such.Network"})
    save_file(tensors, tmp_path / "unknown.safetensors", metadata | {"student": unknown})
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 30)
    for name, said in (
        ("python", "does not say which network"),
        ("less", "holds weights of another network"),
        ("unknown", "cannot be built"),
        ("damaged", "is not a student that can be read"),
        ("none", "does not exist"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            lqkd.load_student(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value)


def rewritten(run: Path, target: Path, **changes: Any) -> Path:
    """The student of ``run`` as ``target``, .safetensors or .onnx, which says other things about itself."""
    if target.suffix == ".onnx":
        model = onnx.load(run / "student.onnx")
        for entry in model.metadata_props:
            if (name := entry.key.removeprefix("lqkd.")) in changes:
                entry.value = json.dumps(changes[name])
        onnx.save(model, target)
    else:
        described = {key: json.dumps(value) for key, value in (describe_student(run) | changes).items()}
        save_file(load_file(run / "student.safetensors"), target, described)
    return target


NETWORK = {"class_path": "lqkd.models.CifarResNet"}
SHAPE = {"num_classes": 10, "in_channels": 1}
IMAGES = {"channels": 1, "size": [8, 8], "mean": [0.5], "std": [0.5], "resize_size": None}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("s.safetensors", {"class_names": 5}, "class_names=5 where it must be a list of texts"),
        ("s.safetensors", {"class_names": ["one"]}, "contradicts itself: 1 class names"),
        ("s.safetensors", {"mean": "x"}, "mean='x' where it must be a list of finite numbers"),
        ("s.safetensors", {"mean": [float("nan")]}, "mean=[nan] where it must be a list of finite numbers"),
        ("s.safetensors", {"std": [0.0]}, "std=[0.0] where it must be a list of numbers above 0"),
        ("s.safetensors", {"image_shape": [3, -1, 4]}, "image_shape=[3, -1, 4] where it must be"),
        ("s.safetensors", {"image_shape": [1, 10**9, 8]}, "size=[1000000000, 8] where it must be"),
        ("s.safetensors", {"resize_size": 10**9}, "resize_size=1000000000 where it must be"),
        ("s.safetensors", {"student": 7}, "student=7 where it must be"),
        (
            "s.safetensors",
            {"student": NETWORK | {"init_args": SHAPE | {"depth": 60_000_008}}},
            "far larger than the 92",
        ),
        (
            "s.safetensors",
            {"student": NETWORK | {"init_args": SHAPE | {"depth": 8, "width": 20_000}}},
            "far larger than",
        ),
        ("s.onnx", {"class_names": 5}, "class_names=5 where it must be a list of texts"),
        ("s.onnx", {"preprocessing": 7}, "preprocessing must be a mapping, not 7"),
        ("s.onnx", {"preprocessing": IMAGES | {"mean": "x"}}, "preprocessing.mean='x' where it must be"),
        (
            "s.onnx",
            {"preprocessing": IMAGES | {"size": [10**6, 8]}},
            "preprocessing.size=[1000000, 8] where it must be",
        ),
        ("s.onnx", {"preprocessing": IMAGES | {"size": [9, 9]}}, "does not take the images of 1x9x9"),
        ("s.onnx", {"checkpoint": 7}, "checkpoint=7 where it must be a text"),
    ],
)
def test_what_a_file_says_of_itself_and_cannot_be_is_one_line(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, name: str, changes: Any, said: str
) -> None:
    file = rewritten(run, tmp_path / name, **changes)
    capsys.readouterr()
    assert main(["predict", str(file), images[0]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lqkd: error: ")
    assert str(file) in line
    assert said in line


def test_the_name_of_a_class_does_nothing_to_the_terminal_and_stays_whole_in_json(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = [f"\x1b]0;owned\x07 {i}" for i in range(10)]
    file = str(rewritten(run, tmp_path / "s.safetensors", class_names=names))
    assert told(capsys, file, images[0])[0]["predictions"][0]["class"] in names
    assert main(["predict", file, images[0]]) == 0
    assert main(["predict", file, "\x1b[2Jnone.png"]) == 2
    out, err = capsys.readouterr()
    assert r": \x1b]0;owned\x07 " in out
    assert err == "lqkd: error: \\x1b[2Jnone.png does not exist: give image files\n"


def test_a_student_that_diverged_is_an_error_and_no_prediction(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tensors = load_file(run / "student.safetensors")
    tensors["linear.bias"][3] = torch.nan
    described = {key: json.dumps(value) for key, value in describe_student(run).items()}
    save_file(tensors, tmp_path / "nan.safetensors", described)
    model = onnx.load(run / "student.onnx")
    scale = next(entry for entry in model.graph.initializer if entry.name.endswith("scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32("nan"), scale.name))
    onnx.save(model, tmp_path / "nan.onnx")
    capsys.readouterr()
    for name, said in (("nan.safetensors", "'linear.bias' is not finite"), ("nan.onnx", "scale' is not finite")):
        assert main(["predict", str(tmp_path / name), images[0], "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert said in err


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_checkpoint_that_diverged_is_not_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, verb: str
) -> None:
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    saved["state_dict"]["student.layer1.0.conv1.weight"][0, 0] = torch.nan
    torch.save(saved, tmp_path / "nan.ckpt")
    capsys.readouterr()
    assert main([verb, "--config", str(run / "config.yaml"), "--ckpt_path", str(tmp_path / "nan.ckpt")]) == 2
    assert "is of a training that diverged: 'student.layer1.0.conv1.weight' is not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("student.onnx", "ONNX Runtime runs it"), ("checkpoints/best.ckpt", "the folder of its run")]
)
def test_what_loads_another_file_of_a_run_is_told(run: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lqkd.load_student(run / name)


def test_export_reports_what_the_file_costs(run: Path) -> None:
    report = json.loads((run / "student.onnx.report.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert report["file_bytes"] == (run / "student.onnx").stat().st_size
    assert report["packed_bytes"] == summary["packed_bytes"]
    assert report["bit_operations"] == summary["bit_operations"]
    assert sum(layer["bit_operations"] for layer in report["layers"]) == report["bit_operations"]
    assert sum(layer["share"] for layer in report["layers"]) == pytest.approx(1)
    latency = report["latency"]
    assert set(latency["milliseconds"]) == set(latency["ratios"]) >= {"float32 ONNX", "student.onnx (portable)"}
    assert latency["ratios"]["float32 ONNX"] == 1.0
    assert latency["threads"] == 1


def test_a_report_is_not_overwritten_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.onnx.report.json").write_text("mine")
    assert main(["export", str(run), "--output", str(tmp_path / "other.onnx")]) == 2
    assert "other.onnx.report.json' exists" in capsys.readouterr().err
    assert (tmp_path / "other.onnx.report.json").read_text() == "mine"


def example(python: str, run: Path, images: list[str]) -> list[str]:
    command = [python, str(ROOT / "docs" / "run_onnx.py"), str(run / "student.onnx"), *images]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()


def test_the_example_without_lqkd_says_what_predict_says(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    large = str(tmp_path / "large.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 4), np.uint8)).save(large)
    capsys.readouterr()
    assert main(["predict", str(run / "student.onnx"), *images, large]) == 0
    assert example(sys.executable, run, [*images, large]) == capsys.readouterr().out.splitlines()


def test_a_file_that_takes_frames_says_the_same_of_images(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "student.onnx"
    assert main(["export", str(run), "--frames", "--output", str(file)]) == 0
    assert onnx.load(file).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    capsys.readouterr()
    assert main(["predict", str(run / "student.onnx"), *images]) == 0
    expected = capsys.readouterr().out.splitlines()
    assert main(["predict", str(file), *images]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert example(sys.executable, tmp_path, images) == expected


def test_a_file_for_two_images_at_a_time_says_the_same_of_any_number(
    run: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "student.onnx"
    assert main(["export", str(run), "--batch", "2", "--output", str(file)]) == 0
    assert "(2, " in (tmp_path / "student.onnx.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", str(run / "student.onnx"), *images]) == 0
    expected = capsys.readouterr().out.splitlines()
    assert main(["predict", str(file), *images]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert example(sys.executable, tmp_path, images) == expected


@pytest.mark.parametrize(
    ("format_name", "message"),
    [
        ("litert", "its files take one sample at a time anyway"),
        ("executorch", "its files take one sample at a time anyway"),
        ("torch", "use one of portable, "),
        ("gguf", "use one of"),
    ],
)
def test_a_batch_of_a_format_that_has_none_or_always_one_is_refused(
    run: Path, format_name: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["export", str(run), "--batch", "1", "--format", format_name]) == 2
    assert f"--batch is not possible with --format {format_name}: {message}" in capsys.readouterr().err


def test_frames_of_a_format_without_images_are_refused(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(run), "--frames", "--format", "torch"]) == 2
    assert "--frames is not possible with --format torch" in capsys.readouterr().err


def test_the_example_says_what_a_file_of_to_onnx_lacks_and_does_without_class_names(
    run: Path, images: list[str], tmp_path: Path
) -> None:
    data = torch.randn(8, 1, 8, 8)
    script = [sys.executable, str(ROOT / "docs" / "run_onnx.py"), str(tmp_path / "s.onnx"), images[0]]
    to_onnx(lqkd.load_student(run), data, tmp_path / "s.onnx", calibration=[data])
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "s.onnx does not say how images are prepared: to_onnx(..., about=" in done.stderr
    assert "Traceback" not in done.stderr
    about = {"preprocessing": IMAGES}
    to_onnx(lqkd.load_student(run), data, tmp_path / "s.onnx", calibration=[data], about=about)
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert re.fullmatch(r".*0\.png: \d \d+\.\d%\n", done.stdout)


@pytest.mark.slow
def test_the_example_runs_where_only_numpy_pillow_and_onnxruntime_are(
    run: Path, images: list[str], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(shutil.which("python", path=str(tmp_path / "venv" / "bin")))
    packages = ["numpy", "pillow", "onnxruntime"]
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"pip cannot install {', '.join(packages)} here: {done.stderr.strip().splitlines()[-1:]}")
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode != 0
    assert example(python, run, images) == example(sys.executable, run, images)
