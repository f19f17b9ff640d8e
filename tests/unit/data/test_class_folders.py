from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from lqkd.data.class_folders import list_class_folders
from lqkd.errors import UsageError
from tests.unit.data.images import write_classes


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        list_class_folders(folder)
    return str(caught.value)


def test_what_systems_leave_behind_is_no_image_and_no_class(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 1, "dog": 1})
    for name in (".DS_Store", "cat/.DS_Store", "cat/._0.png", "cat/Thumbs.db", "dog/desktop.ini"):
        (tmp_path / name).write_bytes(b"\0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classes = list_class_folders(tmp_path)
    assert classes == {"cat": [f"{tmp_path}/cat/0.png"], "dog": [f"{tmp_path}/dog/0.png"]}


def test_files_that_are_left_out_are_told(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 1, "dog": 1})
    for name in ("cat/photo.heic", "dog/notes.txt"):
        (tmp_path / name).write_bytes(b"\0")
    with pytest.warns(UserWarning, match=r"left out '.*/cat/photo.heic' and 1 more: no image of a known kind"):
        list_class_folders(tmp_path)


def test_an_image_beside_the_class_folders_is_told(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 1})
    (tmp_path / "lost.jpg").write_bytes(b"\0")
    with pytest.warns(UserWarning, match="left out '.*/lost.jpg'"):
        list_class_folders(tmp_path)


def test_images_in_folders_of_a_class_belong_to_it(tmp_path: Path) -> None:
    write_classes(tmp_path / "dog", {"poodle": 2, "beagle": 1})
    names = [path.removeprefix(f"{tmp_path}/") for path in list_class_folders(tmp_path)["dog"]]
    assert names == ["dog/beagle/0.png", "dog/poodle/0.png", "dog/poodle/1.png"]


def test_names_in_any_script_are_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"Zürich": 1, "東京": 1, "кошка и": 1})
    assert list(list_class_folders(tmp_path)) == ["Zürich", "кошка и", "東京"]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    assert "is not named in UTF-8" in refusal(tmp_path)


def test_numbers_that_sort_otherwise_as_text_are_told(tmp_path: Path) -> None:
    write_classes(tmp_path, {str(number): 1 for number in range(11)})
    with pytest.warns(UserWarning, match="sorted as text, not as numbers: label 2 is '10'"):
        list_class_folders(tmp_path)


def test_a_class_without_an_image_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 1})
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / ".hidden.png").write_bytes(b"\0")
    assert refusal(tmp_path).startswith(f"{tmp_path}/dog holds no image")


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\0")
    assert refusal(tmp_path).startswith(f"{tmp_path} has no class folder")
