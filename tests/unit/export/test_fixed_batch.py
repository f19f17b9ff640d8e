"""A file for one number of samples gives the numbers of the one for any, and takes no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from torch import nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import fixed_batch, metadata, to_onnx
from lqkd.export.fixed_batch import in_batches, of_batch
from lqkd.export.frames import takes_frames
from lqkd.export.runtimes import Runner
from tests.unit.export.networks import images, quantised
from tests.unit.export.test_islands import Windows


@pytest.fixture(scope="module")
def student() -> nn.Module:
    return quantised(bits="w4a4")


@pytest.fixture(scope="module")
def model(student: nn.Module) -> ModelProto:
    return to_onnx(student, images(4), calibration=[images(32)])


def sizes(model: ModelProto) -> list[list[int]]:
    entries = (*model.graph.input, *model.graph.output)
    return [[size.dim_value for size in entry.type.tensor_type.shape.dim] for entry in entries]


def test_a_file_is_written_for_three_samples_and_takes_no_other_number(student: nn.Module, tmp_path: Path) -> None:
    to_onnx(student, images(4), tmp_path / "three.onnx", calibration=[images(32)], batch=3)
    written = onnx.load(tmp_path / "three.onnx")
    assert sizes(written) == [[3, 3, 8, 8], [3, 5]]
    assert metadata.read(written)["parity"]["batches"] == [3]
    assert metadata.read(written)["batch"] == 3
    run = Runner(written, optimised=True)
    assert run(images(3).numpy())["logits"].shape == (3, 5)
    with pytest.raises(UsageError, match="does not run the file"):
        run(images(2).numpy())


def test_reshapes_of_windows_and_frames_have_it_too(model: ModelProto) -> None:
    windows = to_onnx(quantised(Windows(fused=True), bits="w8a8"), images(4), calibration=[images(32)], batch=1)
    assert sizes(windows) == [[1, 3, 8, 8], [1, 5]]
    framed = of_batch(takes_frames(model, {"mean": [0.4] * 3, "std": [0.2] * 3}), 2)
    assert sizes(framed) == [[2, 8, 8, 3], [2, 5]]


def test_a_file_for_one_number_is_refused_where_one_for_any_is_needed(model: ModelProto) -> None:
    fixed = of_batch(model, 4)
    with pytest.raises(UsageError, match="batch=2 is not possible: the model takes 4 samples at a time"):
        of_batch(fixed, 2)
    with pytest.raises(UsageError, match=r"frames where these come first: of_batch\(takes_frames"):
        takes_frames(fixed, {"mean": [0.4] * 3, "std": [0.2] * 3})


def test_any_number_of_samples_goes_through_a_file_for_three(model: ModelProto) -> None:
    run, x = Runner(of_batch(model, 3), optimised=True), images(7).numpy()
    expected = Runner(model, optimised=True)(x)["logits"]
    np.testing.assert_array_equal(in_batches(run, x, 3)["logits"], expected)


def test_a_file_that_gives_other_numbers_is_found(model: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moved(Runner):
        def on(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            fixed = self._model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
            return {name: values + bool(fixed) for name, values in super().on(arrays).items()}

    monkeypatch.setattr(fixed_batch, "Runner", Moved)
    with pytest.raises(ParityError, match="for 2 samples at a time the file gives other logits"):
        of_batch(model, 2)


@pytest.mark.parametrize("batch", [0, -1, 2.0, True])
def test_what_is_no_number_of_samples_is_refused(student: nn.Module, batch: int) -> None:
    with pytest.raises(UsageError, match="is not possible: it is a number of samples, 1 or more"):
        to_onnx(student, images(4), calibration=[images(32)], batch=batch)
