"""``lqkd distill``: from a folder of images or texts to a student that can be taken away, in one command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

from lqkd import UsageError
from lqkd.cli import main
from lqkd.errors import ParityError
from lqkd.models import SmallFCOS
from lqkd.pipelines.asked import Asked
from lqkd.pipelines.found import Texts
from lqkd.pipelines.look import look_at
from lqkd.pipelines.plan import Plan, plan
from tests.forked import Forks
from tests.photographs import write_photographs


class OtherDetector(SmallFCOS):
    """A detector that is the user's own."""


CLASSES = {"brick": (200, 90, 60), "leaf": (60, 150, 60), "sky": (90, 140, 220)}
NETWORK = {"class_path": "lqkd.models.CifarResNet", "init_args": {"depth": 8, "width": 4}}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 30 photographs of three colours and a small network, to run in; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder := tmp_path_factory.mktemp("place"))
        patched.setattr("lqkd.callbacks.regularizer.pictures.pictures", lambda *history: iter(()))
        (folder / "network.yaml").write_text(yaml.safe_dump(NETWORK))
        rng = np.random.default_rng(0)
        for name, colour in CLASSES.items():
            (folder / "photographs" / name).mkdir(parents=True)
            for number in range(10):
                pixels = np.array(colour) * rng.uniform(0.6, 1.2) + rng.normal(0, 20, (32, 40, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / "photographs" / name / f"{number}.jpg")
        yield folder


COMMAND = ["distill", "photographs", "--student", "network.yaml", "--epochs"]


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """What the command makes; what it prints is in a file beside it."""
    with open(place / "printed.txt", "w") as stream, contextlib.redirect_stdout(stream):
        assert main([*COMMAND, "6", "--out", "made"]) == 0
    return place / "made"


def chosen(**settings: Any) -> Plan:
    asked = dict.fromkeys(Asked.__dataclass_fields__) | {"folder": "photographs", "bits": "w4a4"}
    return plan(
        Asked(**asked | {"student": "network.yaml"} | settings), look_at(Path("photographs")), Path(), Path("o")
    )


# ---- from photographs to a file


def test_thirty_photographs_become_a_verified_file_and_a_page(made: Path, capsys: pytest.CaptureFixture) -> None:
    run = made / "student"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"]
    assert summary["test"] > 0.8
    assert summary["student_float"] > 0.8
    assert summary["weight_bits"] == "4 (8 in 2 layers)"
    images = [f"photographs/{name}/{number}.jpg" for name in CLASSES for number in range(10)]
    said = []
    for source in (run, run / "student.onnx"):
        assert main(["predict", str(source), *images]) == 0
        said.append(re.findall(r"jpg: (\w+)", capsys.readouterr().out))
    assert said[0] == said[1]
    assert sum(image.split("/")[1] == name for image, name in zip(images, said[1], strict=True)) > 24
    assert "student.onnx" in (run / "report.html").read_text()


def test_every_choice_is_told(made: Path) -> None:
    told = (made.parent / "printed.txt").read_text()
    for sentence in (
        "data        30 images of 3 classes: brick, leaf, sky\n            19 to train, 5 to validate, 6 to test",
        "images      32 pixels square, of photographs whose shorter side has 32",
        "batches     8 images, 2 to an epoch",
        "student     network.yaml\n            random weights\n            first trained in floating point: 6 epochs",
        "teacher     the student's own float network\n            not compared with chance: 5 images",
        "bits        w4a4, 8 in the first and last layer and in additions",
        f"file: {made}/student/student.onnx\npage: {made}/student/report.html",
    ):
        assert sentence in told


def test_what_a_training_came_to_is_told_once_with_its_file(made: Path) -> None:
    told = (made.parent / "printed.txt").read_text()
    assert told.count("quantised only (PTQ)") == 1
    assert "next, a file to take away" not in told


def test_what_a_training_came_to_is_told_where_its_export_fails(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise ParityError("the file fails the comparison")

    shutil.copytree(made, tmp_path / "made")
    (tmp_path / "made" / "student" / "student.onnx").unlink()
    monkeypatch.setattr("lqkd.export.command.export", fail)
    assert main([*COMMAND, "6", "--out", str(tmp_path / "made")]) == 1
    told = capsys.readouterr()
    assert told.out.count("quantised only (PTQ)") == 1
    assert "the file fails the comparison" in told.err


def test_what_was_chosen_is_a_configuration_that_fit_takes(made: Path) -> None:
    fit = ["fit", "--config", str(made / "student.yaml"), "--run.version", "again"]
    assert main([*fit, "--trainer.fast_dev_run", "true"]) == 0
    config = yaml.safe_load((made / "student.yaml").read_text())
    assert config["model"]["init_args"]["quantization"] == {"bits": "w4a4", "residual_bits": 8}
    assert "&id" not in (made / "student.yaml").read_text()


def test_the_same_command_once_more_trains_nothing(made: Path) -> None:
    files = [path for path in made.rglob("*") if path.suffix in (".ckpt", ".onnx", ".safetensors")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == 7
    assert main([*COMMAND, "6", "--out", "made"]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_other_settings_are_refused_where_something_was_begun(made: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([*COMMAND, "7", "--out", "made"]) == 2
    assert f"out='{made}' was begun with epochs=6, and now it is 7" in capsys.readouterr().err


def test_a_folder_that_an_earlier_version_began_is_gone_on_with(tmp_path: Path) -> None:
    asked = Asked(**dict.fromkeys(Asked.__dataclass_fields__) | {"folder": "photographs", "student": "network.yaml"})
    asked.write(tmp_path)
    kept = yaml.safe_load((tmp_path / "distill.yaml").read_text())
    kept = {"photographs" if name == "folder" else name: value for name, value in kept.items()}  # as it was called
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(kept))
    assert asked.begun_in(tmp_path)


def after(file: Path, number: int) -> Any:
    """Send a signal as soon as there is a file."""

    def send(pid: int) -> None:
        while not file.exists():
            time.sleep(0.01)
        os.kill(pid, number)

    return send


@pytest.mark.slow
def test_the_same_command_goes_on_after_ctrl_c_and_after_a_kill(place: Path, lqkd: Forks) -> None:
    command, out = [*COMMAND, "8", "--out", "stopped"], place / "stopped"
    where = f"os.chdir({str(place)!r})"
    stop = after(out / "float" / "checkpoints" / "last.ckpt", signal.SIGINT)
    assert lqkd.run(*command, before=where, meanwhile=stop) == 130
    assert "stopped by Ctrl-C at the student in floating point; the same command goes on" in lqkd.log.read_text()
    kill = after(out / "student" / "config.yaml", signal.SIGKILL)
    assert lqkd.run(*command, before=where, meanwhile=kill) == -signal.SIGKILL
    kept = (out / "float" / "network.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "float" / "network.safetensors").stat().st_mtime_ns == kept
    assert len(json.loads((out / "float" / "starts.json").read_text())) == 2
    assert json.loads((out / "student" / "summary.json").read_text())["finished"]
    assert (out / "student" / "student.onnx").is_file()


# ---- networks and weights


def test_weights_that_know_the_classes_are_not_trained_again(made: Path) -> None:
    weights = str(made / "float" / "network.safetensors")
    settings = chosen(student_weights=weights, teacher=str(made / "float")).configs
    assert [*settings] == ["student"]
    teacher = settings["student"]["model"]["init_args"]["teacher"]["init_args"]
    assert teacher["weights"] == settings["student"]["model"]["init_args"]["student_weights"] == weights
    assert teacher["network"]["init_args"] == {"depth": 8, "width": 4, "num_classes": 3, "in_channels": 3}


def test_another_network_is_trained_before_it_teaches(hub: None) -> None:
    settings = chosen(teacher="timm/test_vit").configs
    assert [*settings] == ["float", "teacher", "student"]
    teacher = settings["student"]["model"]["init_args"]["teacher"]["init_args"]
    assert teacher["weights"] == f"{Path('o')}/teacher/network.safetensors"
    assert teacher["network"]["init_args"] == {"name": "timm/test_vit", "num_classes": 3}
    sizes = [settings[name]["data"]["init_args"]["image_size"] for name in ("teacher", "student")]
    assert (*sizes, teacher["image_size"]) == (160, 32, 160)  # the only one that this teacher takes


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a connection, and what the Hub's client has kept there: one network of timm's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    network = timm.create_model("test_resnet")
    about = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": network.pretrained_cfg}
    for name in ("timm--test_resnet.r160_in1k", "me--mine"):
        folder = tmp_path / f"models--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (snapshot := folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        save_file(network.state_dict(), snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps(about))


@pytest.mark.parametrize("name", ["test_resnet", "timm/test_resnet", "hf-hub:me/mine"])
def test_published_weights_of_other_classes_are_trained_with_a_new_head(
    name: str, hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chosen(student=name, student_weights="pretrained")
    model, data = (made.configs["float"][part]["init_args"] for part in ("model", "data"))
    assert model["network"]["init_args"] == {"name": "timm/test_resnet", "num_classes": 3}
    assert (model["replace_head"], model["weights"]) == (True, str(Path("o") / "student_pretrained.safetensors"))
    assert len(data["mean"]) == 3  # of what these weights were trained with
    Path("student_pretrained.safetensors").unlink()


def test_without_published_weights_the_student_starts_anew_and_it_is_told(hub: None) -> None:
    made = chosen(student="timm/test_efficientnet", image_size=32)
    assert "weights" not in made.configs["float"]["model"]["init_args"]
    assert any(told.startswith("random weights: weights of timm/test_efficientnet cannot be") for _, told in made.told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "resnet19"}, "student='resnet19' is unknown: did you mean resnet18?"),
        ({"student": "xyz"}, "is unknown: give a network of torchvision or timm"),
        ({"student": "timm/test_efficientnet", "student_weights": "pretrained"}, "cannot be downloaded"),
        ({"student": "test_vit4"}, "student='timm/test_vit4' at w4a4 could not be exported"),
        ({"student": "hf-hub:me/other"}, "the description of hf-hub:me/other cannot be downloaded"),
        ({"student": "none.yaml"}, "student='none.yaml' does not exist"),
        ({"student_weights": "none.pt"}, "weights='none.pt' do not exist"),
        ({"student_weights": "builtin:digits_student"}, "student_weights do not fit network.yaml"),
        ({"student_weights": "pretrained"}, "student_weights='pretrained' is not possible for 'network.yaml'"),
        (
            {"student": "test_vit", "image_size": 32},
            "image_size=32 is not possible with timm/test_vit, which takes 160",
        ),
        ({"teacher": "photographs"}, "teacher='photographs' is no run"),
        ({"bits": "w9a9"}, "quantization.bits='w9a9'"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_a_sentence(settings: dict[str, Any], message: str, hub: None) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        chosen(**settings)


# ---- images with masks, and texts


SMALL_GPT = {"class_path": "lqkd.models.GPT", "init_args": {"width": 32, "depth": 1, "heads": 2, "gelu": "tanh"}}


@pytest.fixture(scope="module")
def pairs(place: Path) -> Path:
    """24 images of 106x106 pixels with masks of three classes, and a network for them."""
    write_photographs(place / "pairs")
    network = {"class_path": "benchmarks.fcn.CifarFCN", "init_args": {"width": 4}}
    (place / "pixels.yaml").write_text(yaml.safe_dump(network))
    return place / "pairs"


@pytest.fixture(scope="module")
def boxes(place: Path) -> Path:
    """16 images of 80x60 pixels with a square each, of two colours, and a network for them."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations"):
        (place / "boxes" / folder).mkdir(parents=True)
    for number in range(16):
        name, (x, y) = ("red", "blue")[number % 2], (int(rng.integers(4, 40)), int(rng.integers(4, 30)))
        pixels = np.full((60, 80, 3), 200, np.uint8)
        pixels[y : y + 24, x : x + 24] = (200, 40, 40) if name == "red" else (40, 40, 200)
        Image.fromarray(pixels).save(place / "boxes" / "JPEGImages" / f"{number:02d}.png")
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 24}</xmax><ymax>{y + 24}</ymax>"
        (place / "boxes" / "Annotations" / f"{number:02d}.xml").write_text(
            f"<annotation><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
        )
    small = {"class_path": "lqkd.models.SmallFCOS", "init_args": {"width": 4, "depth": 1}}
    (place / "detector.yaml").write_text(yaml.safe_dump(small))
    return place / "boxes"


@pytest.fixture(scope="module")
def texts(place: Path) -> Path:
    """Two texts of 40 kB together, and a network for them."""
    (place / "texts").mkdir()
    for name, word in (("one.txt", "a tree "), ("two.md", "the sea ")):
        lines = (word * (1 + number % 9) for number in range(560))
        (place / "texts" / name).write_text("\n".join(lines))
    (place / "gpt.yaml").write_text(yaml.safe_dump(SMALL_GPT))
    narrow = {**SMALL_GPT, "init_args": {**SMALL_GPT["init_args"], "width": 8}}
    (place / "narrow.yaml").write_text(yaml.safe_dump(narrow))
    return place / "texts"


def planned(folder: Path, **settings: Any) -> Plan:
    asked = Asked(**dict.fromkeys(Asked.__dataclass_fields__) | {"folder": str(folder)} | settings)
    return plan(asked, look_at(folder), Path(), Path("o"))


def test_images_with_masks_are_a_segmentation_of_the_numbers_in_the_masks(pairs: Path) -> None:
    made = planned(pairs, student="pixels.yaml")
    assert [*made.configs] == ["float", "student"]
    model, data = (made.configs["student"][part]["init_args"] for part in ("model", "data"))
    assert model["task"] == {"class_path": "lqkd.tasks.Segmentation", "init_args": {"classes": 3}}
    assert model["student"]["init_args"] == {"classes": 3, "width": 4}
    assert (data["classes"], data["image_size"]) == (["0", "1", "2"], [112, 112])
    told = [sentence for _, sentence in made.told]
    assert told[:2] == ["24 images with masks of 3 classes: 0, 1, 2", "15 to train, 4 to validate, 5 to test"]


def test_images_with_boxes_are_a_detection_of_the_classes_in_their_files(boxes: Path) -> None:
    made = planned(boxes)
    assert [*made.configs] == ["float", "student"]
    model, data = (made.configs["student"][part] for part in ("model", "data"))
    settings = model["init_args"]
    assert settings["task"]["init_args"] == {"classes": ["blue", "red"], "reach": 1.0}
    assert settings["student"] == {"class_path": "lqkd.models.SmallFCOS", "init_args": {"num_classes": 2}}
    assert settings["distillation"]["pyramid"]["loss"] == "lqkd.losses.PKD"
    assert settings["quantization"] == {"bits": "w4a4", "residual_bits": 8}
    assert (data["class_path"], data["init_args"]["image_size"]) == ("lqkd.data.VocDetection", [64, 64])
    told = [sentence for _, sentence in made.told]
    assert told[:2] == ["16 images with boxes of 2 classes: blue, red", "10 to train, 3 to validate, 3 to test"]
    assert "1.0 of the boxes, 6.0 of PKD from the teacher" in told


def test_a_detector_of_which_nothing_is_known_learns_from_its_answers(boxes: Path, tmp_path: Path) -> None:
    other = {"class_path": "tests.integration.test_distill_folder.OtherDetector"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    settings = planned(boxes, student=str(tmp_path / "other.yaml")).configs["student"]["model"]["init_args"]
    assert settings["distillation"] == {"classes": {"loss": "lqkd.losses.BinaryKL"}}


def test_boxes_without_an_area_are_left_out_and_that_is_told(boxes: Path, tmp_path: Path) -> None:
    shutil.copytree(boxes, tmp_path / "boxes")
    file = tmp_path / "boxes" / "Annotations" / "03.xml"
    empty = "<object><name>red</name><bndbox><xmin>4</xmin><ymin>4</ymin><xmax>4</xmax><ymax>9</ymax></bndbox></object>"
    file.write_text(file.read_text().replace("</annotation>", f"{empty}</annotation>"))
    with pytest.warns(UserWarning, match="left out 1 boxes without an area"):
        made = planned(tmp_path / "boxes")
    assert made.configs["student"]["data"]["init_args"]["leave_out_empty"]
    assert "boxes without an area are left out: 1" in [sentence for _, sentence in made.told]


def test_texts_are_a_language_model_that_goes_on_from_what_it_has_read(texts: Path) -> None:
    made = planned(texts)
    assert [*made.configs] == ["float", "student"]  # the weights that there are know another text
    model = made.configs["student"]["model"]["init_args"]
    assert model["task"]["class_path"] == "lqkd.tasks.CausalLM"
    assert model["quantization"] == {"bits": "q4_0"}
    assert made.configs["float"]["model"]["init_args"]["weights"] == "builtin:topics_gpt"
    assert "minimum_accuracy" not in model["teacher"]["init_args"]
    assert "text, as bytes" in made.told[0][1]


def test_texts_beside_a_file_about_categories_are_no_boxes(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "1.txt").write_bytes((texts / "one.txt").read_bytes())
    (tmp_path / "metadata.json").write_text('{"categories": ["novels"], "licenses": []}')
    assert isinstance(look_at(tmp_path), Texts)


def test_texts_in_parts_are_trained_and_tested_as_they_are_named(texts: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.txt").write_bytes((texts / "one.txt").read_bytes() + part.encode())
    data = planned(tmp_path, student="gpt.yaml").configs["student"]["data"]["init_args"]
    assert (data["root"], data["test"]) == (str(tmp_path / "train"), str(tmp_path / "test"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("boxes", {"student": "resnet18"}, "'resnet18' is no network for boxes that is known: give small_fcos"),
        ("pairs", {"student": "resnet18"}, "'resnet18' is no network for masks that is known: give one of"),
        ("texts", {"student": "resnet18"}, "student='resnet18' is no network for texts that is known: give gpt"),
        ("texts", {"student": "gpt.yaml", "image_size": 8}, "image_size=8 is not possible"),
        ("texts", {"student": "narrow.yaml"}, "groups of 32 must divide it"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused(
    kind: str, settings: dict[str, Any], message: str, pairs: Path, boxes: Path, texts: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        planned(Path(kind), **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "options", "metric"),
    [
        ("pairs", ["--student", "pixels.yaml", "--image-size", "32"], "val/miou"),
        ("boxes", ["--student", "detector.yaml", "--image-size", "32"], "val/map"),
        ("texts", ["--student", "gpt.yaml"], "val/loss"),
    ],
)
def test_a_folder_of_another_kind_becomes_a_run_with_all_that_there_is(
    folder: str, options: list[str], metric: str, pairs: Path, boxes: Path, texts: Path
) -> None:
    assert main(["distill", folder, *options, "--epochs", "1", "--out", f"made_of_{folder}"]) == 0
    run = Path(f"made_of_{folder}") / "student"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["finished"], summary["metric"]) == (True, metric)
    assert (run / ("student.gguf" if folder == "texts" else "student.onnx")).is_file()
    assert (run / "report.html").is_file()
    assert main(["fit", "--config", f"made_of_{folder}/student.yaml", "--trainer.fast_dev_run", "true"]) == 0


# ---- what is no folder of classes, and other mistakes


def other(folder: Path, kind: str) -> None:
    """A folder of something else."""
    files = {
        "nothing": [],
        "images": ["1.jpg", "2.jpg"],
        "text": ["reviews.csv"],
        "coco": ["images/1.jpg", "annotations/instances.json"],
        "voc": ["JPEGImages/1.jpg", "Annotations/1.xml"],
        "yolo": ["images/1.jpg", "labels/1.txt"],
        "masks": ["images/1.jpg", "masks/1.png"],
        "one class": ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg"],
    }[kind]
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith((".jpg", ".png")):
            Image.new("L" if name.startswith("masks") else "RGB", (8, 8)).save(folder / name)
        else:
            (folder / name).write_text('{"images": [], "annotations": []}')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "holds no files and no image"),
        ("images", "holds 2 images and no folder of a class"),
        ("text", "holds text (reviews.csv) in files that are not read: give a folder with"),
        ("coco", "has neither annotations.json, nor annotations/instances_NAME.json"),
        ("voc", "Annotations/1.xml cannot be read"),
        ("yolo", "is a data set of boxes (YOLO's labels), which is not read: give a folder with"),
        ("masks", "has masks with the numbers 0 only: a pixel has the number of its class"),
        ("one class", "has one class folder, 'cat'"),
    ],
)
def test_a_folder_of_something_else_is_told_and_nothing_is_left_behind(
    kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other(tmp_path / "given", kind)
    assert main(["distill", str(tmp_path / "given"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "'missing' does not exist: give a folder"),
        (["photographs", "--epochs", "0"], "epochs=0 is not possible"),
        (["photographs", "--teacher-weights", "x.pt"], "has no effect without a teacher"),
        (["photographs", "--out", "photographs"], "holds something else: give a new or empty folder"),
    ],
)
def test_a_mistake_is_a_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["distill", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_option_that_is_mistyped_is_told_with_the_right_one(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["distill", "photographs", "--studnet", "x"])
    assert "did you mean student?" in capsys.readouterr().err
