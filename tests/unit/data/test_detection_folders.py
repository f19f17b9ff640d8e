"""Images with boxes: COCO's and VOC's folders, and scenes that are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lqkd.data import Batch, CocoDetection, DigitScenes, VocDetection
from lqkd.data.boxes import CroppedBoxes
from lqkd.data.detection import DetectionFolder
from lqkd.data.worker_loader import Key
from lqkd.errors import UsageError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0)}
BOXES = [("red", [4, 6, 30, 40]), ("green", [40, 10, 76, 34])]
SIZE = (80, 60)


def picture(path: Path, objects: list[tuple[str, list[int]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE)
    for name, (left, top, right, bottom) in objects:
        ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill=COLOURS[name])
    image.save(path)


def voc(root: Path, boxes: dict[str, list[tuple[str, list[Any]]]]) -> Path:
    (root / "Annotations").mkdir(parents=True)
    for name, objects in boxes.items():
        picture(root / "JPEGImages" / f"{name}.png", objects and BOXES)
        sides = ("xmin", "ymin", "xmax", "ymax")
        told = "".join(
            f"<object><name>{of}</name><bndbox>"
            + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
            + "</bndbox></object>"
            for of, box in objects
        )
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{told}</annotation>")
    return root


def coco(root: Path, change: Callable[[dict[str, Any]], Any] = lambda said: None) -> Path:
    for name in ("a.png", "b.png", "c.png"):
        picture(root / "images" / name, [] if name == "b.png" else BOXES)
    said: dict[str, Any] = {
        "images": [{"id": 7 + place, "file_name": name} for place, name in enumerate(("a.png", "b.png", "c.png"))],
        "categories": [{"id": 9, "name": "green"}, {"id": 2, "name": "red"}],
        "annotations": [
            {"image_id": image, "category_id": {"red": 2, "green": 9}[name], "bbox": [x, y, x2 - x, y2 - y]}
            for image in (7, 9)
            for name, (x, y, x2, y2) in BOXES
        ],
    }
    change(said)
    (root / "annotations.json").write_text(json.dumps(said))
    return root


def loaded(data: DetectionFolder) -> DetectionFolder:
    data.prepare_data()
    data.setup()
    return data


def test_boxes_go_with_their_images_whatever_is_done_to_both(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", {f"{number:02}": BOXES for number in range(20)})
    data = loaded(VocDetection(root=str(root), image_size=(96, 128), crop_scale=(0.3, 1.0), batch_size=4))
    assert data.class_names == ("green", "red")
    seen, flipped = 0, 0
    for batch in data.train_dataloader():
        for image, target in zip(batch.images, batch.labels, strict=True):
            for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
                left, top, right, bottom = box.round().int().tolist()
                inner = image[:, top + 2 : bottom - 2, left + 2 : right - 2]
                channel = {"red": 0, "green": 1}[data.class_names[label]]
                assert int(inner[channel].min()) > 200 if inner.numel() else True
                outside = image[channel].clone()
                outside[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = 0
                assert int(outside.max()) < 60
                seen += 1
            if len(target["labels"]) == 2:
                red, green = (target["boxes"][target["labels"] == label][0] for label in (1, 0))
                flipped += int(red[0] > green[0])
    assert seen > 12
    assert 0 < flipped < seen // 2


class _OneImage:
    """A grey image with a box at its left and one at its right."""

    shape = (1, 3, 50, 50)

    def read(self, index: int) -> np.ndarray:
        return np.full((100, 100, 3), 128, np.uint8)

    def objects_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[0.0, 0, 40, 100], [60, 0, 100, 100]]), torch.tensor([0, 1])


def test_what_is_less_than_a_quarter_in_a_window_is_no_object_there(monkeypatch: pytest.MonkeyPatch) -> None:
    data = CroppedBoxes(_OneImage(), seed=0, crop_scale=(0.2, 1.0), flip=False)
    left = {}
    for inside in (0.1, 0.5):  # of the first box
        window = (0, round(40 - 40 * inside), 100, 50)  # top, left, height, width
        monkeypatch.setattr("lqkd.data.boxes.random_window", lambda *_, window=window, **__: window)
        scene = data[Key(0, torch.tensor([0]))]["labels"][0]
        left[inside] = [[round(side) for side in box] for box in scene["boxes"].tolist()]
    assert left == {0.1: [[24, 0, 50, 50]], 0.5: [[0, 0, 20, 50]]}


def test_categories_of_coco_are_labels_in_the_order_of_their_numbers_and_images_may_be_empty(tmp_path: Path) -> None:
    data = loaded(CocoDetection(root=str(coco(tmp_path)), image_size=(60, 80), validation_fraction=0.5))
    batches = [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    targets = [target for batch in batches for target in batch.labels]
    assert data.class_names == ("red", "green")
    assert sorted(len(target["labels"]) for target in targets) == [0, 2, 2]


def test_lists_of_voc_say_what_is_trained_selected_and_tested_on(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", dict.fromkeys("abcde", BOXES))
    _lists(root, train="a b", val="c", test="d")
    data = loaded(VocDetection(root=str(root), image_size=(32, 32)))
    data.write_split(tmp_path / "split.csv")
    rows = (tmp_path / "split.csv").read_text().split()[1:]
    assert rows == [
        f"{part},JPEGImages/{name}.png" for part, name in zip(["train"] * 2 + ["val", "test"], "abcd", strict=True)
    ]


@pytest.mark.parametrize(
    ("objects", "settings", "complaint"),
    [
        (
            [("red", [4, 6, 81, 40])],
            {},
            r"00.xml: the box \[4, 6, 81, 40\] of 'red' reaches out of .*00.png, which has 80x60",
        ),
        ([("red", [30, 6, 4, 40])], {}, r"00.xml: the box \[30, 6, 4, 40\] of 'red' has swapped corners"),
        ([("red", [4, 6, 4, 40])], {}, r"00.xml: the box \[4, 6, 4, 40\] of 'red' has no area: correct them, or give"),
        ([("red", ["x", 6, 4, 40])], {}, "annotation .*00.xml has an object 'red' whose xmin, 'x', is no number"),
        (
            [("blue", [4, 6, 30, 40])],
            {"classes": ["red", "green"]},
            "00.xml has an object 'blue': the classes are 'red', 'green'",
        ),
    ],
)
def test_a_box_that_cannot_be_is_told_with_its_file(
    tmp_path: Path, objects: list[Any], settings: dict[str, Any], complaint: str
) -> None:
    root = voc(tmp_path / "set", {"00": [], "01": BOXES, "02": BOXES})
    picture(root / "JPEGImages" / "00.png", BOXES)
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), objects[0][1], strict=True))
    (root / "Annotations" / "00.xml").write_text(
        f"<annotation><object><name>{objects[0][0]}</name><bndbox>{sides}</bndbox></object></annotation>"
    )
    with pytest.raises(UsageError, match=complaint):
        loaded(VocDetection(root=str(root), image_size=(32, 32), **settings))


def test_boxes_are_for_the_image_as_it_is_stored_whatever_rotation_a_camera_notes(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", {"00": BOXES, "01": BOXES, "02": BOXES})
    for file in (root / "JPEGImages").iterdir():
        with Image.open(file) as image:
            noted = image.getexif()
            noted[0x0112] = 6  # a quarter to the right
            image.save(file, exif=noted)
    data = loaded(VocDetection(root=str(root), image_size=(60, 80), validation_fraction=0.5))
    batch = next(iter(data.test_dataloader()))
    assert batch.images[0, :, 20, 20].tolist() == [255, 0, 0]


def test_a_box_that_rounding_has_put_outside_is_cut_to_its_image(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", {name: [("green", [40, 10, 80.4, 34])] for name in ("00", "01", "02")})
    data = loaded(VocDetection(root=str(root), image_size=(60, 80), validation_fraction=0.5))
    assert next(iter(data.test_dataloader())).labels[0]["boxes"].tolist() == [[40, 10, 80, 34]]


def test_an_empty_box_can_be_left_out_and_is_told(tmp_path: Path) -> None:
    root = voc(tmp_path / "set", {"00": [*BOXES, ("red", [4, 6, 4, 40])], "01": BOXES, "02": BOXES})
    with pytest.warns(UserWarning, match="left out 1 boxes without an area: .*00.xml"):
        data = loaded(VocDetection(root=str(root), image_size=(32, 32), leave_out_empty=True, validation_fraction=0.5))
    everything = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert sum(len(target["labels"]) for loader in everything for batch in loader for target in batch.labels) == 6


def _change(root: Path, text: str, by: str) -> None:
    file = root / "Annotations" / "00.xml"
    file.write_text(file.read_text().replace(text, by))


def _lists(root: Path, **parts: str) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for part, names in parts.items():
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text(names)


def _cut_short(root: Path) -> None:
    file = root / "JPEGImages" / "00.png"
    file.write_bytes(file.read_bytes()[:60])


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (_cut_short, "1 of 3 images with boxes cannot be used: .*00.png cannot be read as an image"),
        (lambda root: (root / "Annotations" / "00.xml").unlink(), "00.png has no annotation: .*00.xml does not exist"),
        (lambda root: (root / "JPEGImages" / "00.png").unlink(), "annotation .*00.xml has no image in .*JPEGImages"),
        (lambda root: picture(root / "JPEGImages" / "00.jpg", BOXES), "00.jpg and .*00.png have the same annotation"),
        (lambda root: _change(root, "<name>red</name>", ""), "annotation .*00.xml has an object without a name"),
        (lambda root: _change(root, "<xmax>30</xmax>", ""), "00.xml has an object 'red' without xmax in its bndbox"),
        (
            lambda root: _change(
                root, "</annotation>", "<size><width>70</width><height>60</height></size></annotation>"
            ),
            r"00.xml: the box \[40, 10, 76, 34\] of 'green' reaches out of .*00.png, which has 70x60 pixels",
        ),
        (lambda root: _lists(root, train="00 01", test="01"), "01.png is in the parts 'train' and 'test'"),
        (lambda root: _lists(root, train="00 00", test="01"), "00.png is listed 2 times: list it once"),
        (
            lambda root: [file.write_text("<annotation/>") for file in (root / "Annotations").iterdir()],
            "no image of root=.* has an object: there is nothing to find",
        ),
    ],
)
def test_a_set_that_cannot_be_trained_on_is_refused(
    tmp_path: Path, harm: Callable[[Path], Any], complaint: str
) -> None:
    root = voc(tmp_path / "set", {"00": BOXES, "01": BOXES, "02": BOXES})
    harm(root)
    with pytest.raises(UsageError, match=complaint):
        loaded(VocDetection(root=str(root), image_size=(32, 32)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda said: said["annotations"][0].update(category_id=5),
            "of category 5 on a.png, and lists the categories 2, 9",
        ),
        (lambda said: said["annotations"][0].update(image_id=5), "an annotation of image 5, which it does not list"),
        (lambda said: said.pop("categories"), "is no file of COCO's annotations"),
        (lambda said: said["images"].append({"id": 1, "file_name": "d.png"}), "d.png does not exist"),
        (lambda said: said["images"].append({"id": 1, "file_name": "a.png"}), "lists the image 'a.png' 2 times"),
        (lambda said: said["images"].append({"id": 7, "file_name": "d.png"}), "lists the image of number 7 2 times"),
        (lambda said: said["categories"].append({"id": 5, "name": "green"}), "lists the category 'green' 2 times"),
        (lambda said: said["categories"].append({"id": 9, "name": "blue"}), "lists the category of number 9 2 times"),
        (
            lambda said: said["images"][0].update(width=70, height=60),
            r"json: the box \[40, 10, 76, 34\] of 'green' reaches out of a.png, which has 70x60 pixels",
        ),
        (lambda said: said["images"].append({"id": 1, "file_name": "/etc/hosts"}), "/etc/hosts, which does not lie in"),
        (
            lambda said: said["annotations"][1].update(bbox=[1, 2, 3]),
            r"without image_id, category_id or bbox of 4 numbers: entry 1 of the list, \{.*\[1, 2, 3\]",
        ),
        (lambda said: said.update(annotations=None), "is no file of COCO's annotations"),
    ],
)
def test_a_file_of_coco_that_contradicts_itself_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        loaded(CocoDetection(root=str(coco(tmp_path, change)), image_size=(32, 32)))


def test_an_image_that_cocos_file_does_not_list_is_left_out_and_told(tmp_path: Path) -> None:
    root = coco(tmp_path)
    picture(root / "images" / "more" / "d.png", [])
    with pytest.warns(UserWarning, match=r"left out more/d.png in .*images: .*annotations.json lists no such image"):
        CocoDetection(root=str(root)).annotated()


def test_scenes_are_the_same_in_every_run_and_what_is_tested_is_never_trained_on() -> None:
    first, second = (DigitScenes(scenes=12, image_size=(64, 64), seed=seed) for seed in (0, 1))
    for data in (first, second):
        data.setup()
    assert first.fingerprint() == second.fingerprint()
    for batch in (next(iter(first.train_dataloader())), next(iter(first.test_dataloader()))):
        prepared: Batch = first.preprocess(batch, train=False, epoch=0)
        assert prepared.images.dtype == torch.float32
        assert all(len(target["labels"]) == len(target["boxes"]) for target in batch.labels)
    assert {
        int(label) for batch in first.test_dataloader() for target in batch.labels for label in target["labels"]
    } == set(range(10))
