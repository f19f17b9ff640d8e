"""A file that computes something else is found out, and the place is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from lqkd.errors import UsageError
from lqkd.export import ParityError, check, deploy, metadata, reference, to_onnx
from lqkd.export import emitter as emitter_module
from lqkd.export import parity as parity_module
from lqkd.export.emitter import Exported
from lqkd.export.formats import BUILDERS
from lqkd.export.parity import Parity, agree
from lqkd.export.runtimes import Runner
from tests.unit.export.networks import images, quantised


@pytest.fixture
def built() -> tuple[Exported, object]:
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)])
    return BUILDERS["portable"](deployed), deployed


def change(exported: Exported, name: str, factor: float) -> None:
    tensor = next(t for t in exported.model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), name))


def test_an_untouched_file_passes(built: tuple) -> None:
    assert check(*built, images(8)).problem is None


def test_changed_weights_fail_at_their_own_layer_and_no_other(built: tuple) -> None:
    exported, deployed = built
    change(exported, "conv2.weight_codes", -1)
    parity = check(exported, deployed, images(8))
    assert parity.problem is not None
    assert "the first difference arises at" in parity.problem
    differing = [row.name for row in parity.unoptimised if row.steps > 1]
    assert len(differing) == 1
    assert differing[0] in parity.problem


def test_a_changed_scale_fails(built: tuple) -> None:
    exported, deployed = built
    change(exported, "grids.conv1.input_quantizer.scale", np.float32(1 + 1e-6))
    parity = check(exported, deployed, images(8))
    assert parity.problem == "a scale in the file differs from the student's"


@pytest.mark.parametrize(("fraction", "passes"), [(0.009, True), (0.011, False)])
def test_at_most_one_in_a_hundred_codes_may_be_a_step_off_as_optimised(
    built: tuple, monkeypatch: pytest.MonkeyPatch, fraction: float, passes: bool
) -> None:
    compare = parity_module._compare

    def moved(*arguments: object, optimised: bool) -> tuple:
        rows, logits = compare(*arguments, optimised=optimised)  # type: ignore[arg-type]
        return [replace(row, steps=1.0, fraction=fraction) for row in rows] if optimised else rows, logits

    monkeypatch.setattr(parity_module, "_compare", moved)
    problem = check(*built, images(8)).problem
    assert (problem is None) == passes
    assert passes or "as optimised by the runtime" in str(problem)


def test_a_kernel_that_rounds_in_another_way_fails_end_to_end_and_is_named(
    built: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check(*built, images(8))
    assert (right.exact, right.output_steps) == (True, 0.0)
    assert {row.fraction for row in right.end_to_end} == {0.0}
    monkeypatch.setattr(
        reference, "rounded", lambda sums, factor, grid: (sums * factor + 0.5).floor() + grid.zero_point + 1
    )
    wrong = check(*built, images(8))
    assert wrong.output_steps is not None
    assert wrong.output_steps > 1
    assert "end to end" in str(wrong.problem)
    assert "the first difference arises at grids" in str(wrong.problem)


def test_elsewhere_than_on_known_processors_the_end_to_end_comparison_is_told_and_not_judged(
    built: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "rounded", lambda sums, factor, grid: (sums * factor).round() + grid.zero_point + 1)
    monkeypatch.setattr(parity_module.platform, "machine", lambda: "aarch64")
    parity = check(*built, images(8))
    assert parity.problem is None
    assert not parity.exact
    assert parity.output_steps is not None
    assert parity.output_steps > 1


def test_a_format_without_integer_kernels_is_not_compared_with_them() -> None:
    deployed = deploy(quantised(bits="w4a4"), images(2), [images(32)])
    parity = check(BUILDERS["packed4"](deployed), deployed, images(8))
    assert (parity.problem, parity.output_steps, parity.end_to_end) == (None, None, [])


def test_a_changed_classifier_fails_by_its_logits(built: tuple) -> None:
    exported, deployed = built
    change(exported, "linear.weight_codes", -1)
    assert "logits differ" in str(check(exported, deployed, images(8)).problem)


def test_disagreement_on_whole_images_fails_and_says_where_it_begins(built: tuple) -> None:
    exported, deployed = built
    change(exported, "linear.bias_codes", -100)
    parity = check(exported, deployed, images(8), [images(64)])
    assert parity.differing > 1
    assert parity.problem is not None


def test_from_python_test_batches_are_judged_and_the_file_says_so() -> None:
    network = quantised(bits="w4a4")
    given = {"calibration": [images(32)]}
    labels = torch.zeros(64, dtype=torch.long)
    labelled = metadata.read(to_onnx(network, images(8), test=[(images(64), labels)] * 2, **given))["parity"]
    assert (labelled["samples"], labelled["agreement"], labelled["split"]) == (128, 1.0, "given")
    with torch.no_grad():
        accuracy = float((network(images(64)).argmax(1) == labels).float().mean())
    assert labelled["as_trained"] == pytest.approx(accuracy)
    alone = metadata.read(to_onnx(network, images(8), test=[images(64)], **given))["parity"]
    assert (alone["samples"], alone["exported"]) == (64, None)
    with pytest.raises(UsageError, match="test has no samples"):
        to_onnx(network, images(8), test=iter(()), **given)


def test_from_python_another_first_class_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "__call__", _negated(Runner.__call__))
    monkeypatch.setattr(parity_module, "_compare", lambda *_, **__: ([], {}))
    monkeypatch.setattr(parity_module, "_compare_end_to_end", lambda *_: None)
    with pytest.raises(ParityError, match="the first class differs on 64 of 64 samples"):
        to_onnx(quantised(bits="w4a4"), images(8), calibration=[images(32)], test=[images(64)])


def _negated(call: Any) -> Any:
    return lambda self, x: {name: -value for name, value in call(self, x).items()}


def test_from_python_a_failed_comparison_raises_and_writes_nothing(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = emitter_module.Emitter._write_relu

    def wrong(self: object, node: object, found: object) -> None:
        original(self, node, found)  # type: ignore[arg-type]
        source, _, high = self.deferred[node]  # type: ignore[attr-defined]
        self.deferred[node] = (source, 0.5, high)  # type: ignore[attr-defined]

    monkeypatch.setattr(emitter_module.Emitter, "_write_relu", wrong)
    with pytest.raises(ParityError, match="the first difference arises at"):
        to_onnx(quantised(bits="w4a4"), images(8), f"{tmp_path}/x.onnx", calibration=[images(32)])


def test_images_without_a_label_are_compared_and_not_counted_as_wrong() -> None:
    parity = Parity(scales_identical=True)
    answer = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    test = [(torch.zeros(4, 1), torch.tensor([0, -1, 1, -100]))]
    agree(parity, lambda x: answer, lambda x: answer, test, None)
    assert (parity.samples, parity.deployed, parity.exported) == (4, 0.5, 0.5)
