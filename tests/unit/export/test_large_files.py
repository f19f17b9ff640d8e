"""Above the size of a file the numbers of a model lie in a second one: read, proven and replaced as one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from torch import nn

from lqkd.export import large_files, to_onnx
from lqkd.export.runtimes import Runner, kernels
from tests.unit.export.networks import images, quantised


@pytest.fixture
def student() -> nn.Module:
    return quantised(nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5)), bits="w8a8")


def written(student: nn.Module, path: Path) -> onnx.ModelProto:
    return to_onnx(student, images(4), path, calibration=[images(32)])


def test_a_model_above_the_limit_is_proven_and_has_its_numbers_beside_it(
    student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(student, tmp_path / "one.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["one.onnx"]
    monkeypatch.setattr(large_files, "LIMIT", 10_000)
    path = tmp_path / "two" / "student.onnx"
    returned = written(student, path)
    model, data = large_files.all_files(path)
    assert {*path.parent.iterdir()} == {model, data}
    assert model.stat().st_size < 10_000 < data.stat().st_size
    expected = Runner(whole, optimised=True)(images(3).numpy())["logits"]
    np.testing.assert_array_equal(Runner(onnx.load(path), optimised=True)(images(3).numpy())["logits"], expected)
    assert kernels(returned) == kernels(whole)


def test_a_replaced_model_takes_its_second_file_with_it_and_none_of_another(
    student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_files, "LIMIT", 10_000)
    path, other = tmp_path / "student.onnx", tmp_path / "student.two.onnx"
    written(student, path)
    written(student, other)
    first = large_files.all_files(path)[1]
    written(student, path)
    assert not first.exists()
    assert len(large_files.all_files(path)) == len(large_files.all_files(other)) == 2
    monkeypatch.undo()
    written(student, path)
    assert large_files.all_files(path) == [path]
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize("keep", [Path.rename, shutil.copy])
def test_a_model_that_was_kept_under_a_new_name_keeps_its_numbers(
    keep: Callable[[Path, Path], object], student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_files, "LIMIT", 10_000)
    path, old = tmp_path / "student.onnx", tmp_path / "old.onnx"
    written(student, path)
    keep(path, old)
    written(student, path)
    assert len(large_files.all_files(path)) == 2
    assert len([*tmp_path.iterdir()]) == 4
    assert len(onnx.load(old).graph.initializer) > 5
    written(student, path)
    assert len([*tmp_path.iterdir()]) == 4


def test_a_copy_is_the_same_and_its_own(student: nn.Module) -> None:
    model = to_onnx(student, images(4), calibration=[images(32)])
    copied = large_files.copy_of(model)
    assert copied == model
    assert copied.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
    del copied.graph.initializer[:]
    assert len(model.graph.initializer) > 5


def interrupted(model: onnx.ModelProto, path: Path) -> None:
    with large_files.atomic_model(path) as temporary:
        large_files.save(model, temporary)
        raise KeyboardInterrupt


def test_a_mistake_while_writing_leaves_the_old_files_and_nothing_else(
    student: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_files, "LIMIT", 10_000)
    path = tmp_path / "student.onnx"
    model = written(student, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        interrupted(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
