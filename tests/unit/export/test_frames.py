"""A file that takes frames gives the numbers of the one that takes prepared images."""

from __future__ import annotations

import pytest
from onnx import ModelProto, numpy_helper
from torch import nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import frames, to_onnx
from tests.unit.export.networks import images, quantised

TOLD = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return to_onnx(quantised(bits="w4a4"), images(4), calibration=[images(32)])


def test_a_wrong_mean_in_the_file_is_found(model: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frames.takes_frames(model, TOLD).graph.input[0].name == "frames"

    def moved(array: object, name: str) -> object:
        return numpy_helper.from_array(array + 0.01 if name == "frames.mean" else array, name)

    monkeypatch.setattr(frames, "numpy_helper", type("moved", (), {"from_array": staticmethod(moved)}))
    with pytest.raises(ParityError, match="of frames the file gives other logits"):
        frames.takes_frames(model, TOLD)


@pytest.mark.parametrize("told", [None, {}, {"mean": [0.5], "std": [0.5]}])
def test_a_file_that_does_not_say_how_images_are_prepared_is_refused(model: ModelProto, told: dict | None) -> None:
    with pytest.raises(UsageError, match="a file takes frames where"):
        frames.takes_frames(model, told)


def test_a_network_of_vectors_takes_no_frames() -> None:
    student = quantised(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), bits="w8a8")
    vectors = to_onnx(nn.Sequential(*student), images(4).flatten(1).unflatten(1, (3, 64)), calibration=[images(32)])
    with pytest.raises(UsageError, match="a file takes frames where"):
        frames.takes_frames(vectors, TOLD)
