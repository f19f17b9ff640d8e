"""Proof that an exported file computes what the student computes: layer by layer, end to end, and on whole images."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from lqkd.export.deploy import Deployed
from lqkd.export.differences import EndToEnd, Forced, LayerDifference
from lqkd.export.emitter import Exported
from lqkd.export.grids import ActivationGrid
from lqkd.export.reference import Reference
from lqkd.export.runtimes import Runner, is_qonnx

BATCHES = (1, 7, 32)
UNOPTIMISED_FRACTION = 1e-3
"""At most so many codes of a layer may differ by one step without optimisation: sums in another order."""
OPTIMISED_FRACTION = 1e-2
"""At most so many by one step with it: integer kernels round products of scales."""
END_TO_END_FRACTION = 1e-2
"""At most so many codes of the last grid may differ end to end from what integer kernels compute by the formulas."""
_REPRODUCED = ("x86_64", "AMD64")
"""Processors whose kernels the reference has: others round additions in fixed point."""
LOGITS_TOLERANCE = 1e-4
"""Of the largest logit, given the same input of the last layer."""
DISAGREEMENT = 1e-3
"""Share of images whose top-1 may differ, but always one image."""
TEST, VALIDATION, GIVEN = "test", "validation", "given"
"""Where images for the agreement are from: a split of the run's data, or whoever called."""


@dataclass
class Parity:
    """What was compared.

    Attributes:
        unoptimised, optimised: per grid, in the order of the network, when both get the file's own codes before it;
            ``optimised`` is empty for QONNX.
        end_to_end: per grid, from the images on, between the optimised file and the arithmetic of integer kernels in
            PyTorch; empty for formats that are not made for integer kernels.
        output_steps: the largest difference of the logits likewise, in steps of the last layer's accumulators.
        exact: whether that arithmetic is known to the last bit in all of the network.
        logits: the largest difference of the logits in units of the largest one, likewise per layer.
        batches: numbers of images for which the file ran.
        scales_identical: whether every scale in the file has the very bits of the student's.
        images: number of images for top-1 agreement.
        split: what they are of: ``test``, ``validation`` where the data have no test split, or ``given``.
        disagreements: on how many of them PyTorch and the optimised file differ in their first class.
        accuracy, exported_accuracy: of the deployed network in PyTorch and of the file, where labels are known.
        trained_accuracy: of the student as it was trained.
        trained_disagreements: on how many images it and the deployed network differ.
        problem: what failed, in one sentence; ``None`` when nothing did.
    """

    unoptimised: list[LayerDifference] = field(default_factory=list)
    optimised: list[LayerDifference] = field(default_factory=list)
    end_to_end: list[LayerDifference] = field(default_factory=list)
    output_steps: float | None = None
    exact: bool = False
    logits: float = 0.0
    batches: tuple[int, ...] = ()
    scales_identical: bool = False
    images: int = 0
    split: str = GIVEN
    disagreements: int = 0
    accuracy: float | None = None
    exported_accuracy: float | None = None
    trained_accuracy: float | None = None
    trained_disagreements: int = 0
    problem: str | None = None

    @property
    def agreement(self) -> float | None:
        """The share of images with the same first class in PyTorch and in the file."""
        return 1.0 - self.disagreements / self.images if self.images else None

    def numbers(self) -> dict[str, Any]:
        """The numbers that are kept in the file."""
        return {
            "layers": len(self.unoptimised),
            "unoptimised_max_steps": max((row.steps for row in self.unoptimised), default=0.0),
            "unoptimised_fraction": max((row.fraction for row in self.unoptimised), default=0.0),
            "optimised_max_steps": max((row.steps for row in self.optimised), default=0.0),
            "optimised_fraction": max((row.fraction for row in self.optimised), default=0.0),
            "end_to_end_output_steps": self.output_steps,
            "end_to_end_fraction": self.end_to_end[-1].fraction if self.end_to_end else None,
            "exact": self.exact,
            "logits": self.logits,
            "batches": list(self.batches),
            "scales_identical": self.scales_identical,
            "images": self.images,
            "split": self.split,
            "top1_agreement": self.agreement,
            "accuracy_pytorch": self.accuracy,
            "accuracy_exported": self.exported_accuracy,
            "accuracy_as_trained": self.trained_accuracy,
            "top1_agreement_with_trained": 1.0 - self.trained_disagreements / self.images if self.images else None,
            "passed": self.problem is None,
        }


def check(
    exported: Exported,
    deployed: Deployed,
    images: Tensor,
    test: Iterable[tuple[Tensor, Tensor | None]] = (),
    student: torch.nn.Module | None = None,
) -> Parity:
    """Compare an exported model with the network that it was made of.

    Args:
        exported: the model, as built.
        deployed: the network.
        images: (B, C, H, W) inputs for the comparison layer by layer and of batch sizes; repeated to 32.
        test: inputs with their labels, or ``None``, for the agreement of whole networks.
        student: as it was trained, to say what the deployment costs.
    """
    parity = Parity(scales_identical=scales_identical(exported.model, deployed))
    if not parity.scales_identical:
        parity.problem = "a scale in the file differs from the student's"
    images = images.detach().cpu().float()
    parity.unoptimised, parity.logits = _compare(exported, deployed, images, optimised=False)
    _judge(parity, parity.unoptimised, "without optimisation", UNOPTIMISED_FRACTION)
    if not is_qonnx(exported.model):
        parity.optimised, logits = _compare(exported, deployed, images, optimised=True)
        parity.logits = max(parity.logits, logits)
        _judge(parity, parity.optimised, "as optimised by the runtime", OPTIMISED_FRACTION)
    if not parity.logits <= LOGITS_TOLERANCE and parity.problem is None:
        parity.problem = f"logits differ by {parity.logits:.2g} of the largest, after layers that agree"
    whole = Runner(exported.model, optimised=True)
    _check_batches(parity, whole, images)
    if exported.integer:
        _compare_end_to_end(parity, exported, deployed, images, whole)
    pytorch = Reference(deployed.network) if exported.integer else deployed.network
    agreement(parity, lambda x: torch.from_numpy(whole(x.numpy())["logits"]), pytorch, test, student)
    return parity


def _compare_end_to_end(parity: Parity, exported: Exported, deployed: Deployed, images: Tensor, whole: Runner) -> None:
    run = Runner(exported.model, optimised=True, tensors=list(exported.grids.values()))
    found = run(images.numpy())
    reference = EndToEnd(deployed.network, {name: found[tensor] for name, tensor in exported.grids.items()})
    steps = np.abs(reference(images).numpy() - whole(images.numpy())["logits"]) / float(reference.step.min())
    parity.output_steps = float(steps.max()) if np.isfinite(steps).all() else float("inf")
    parity.end_to_end, parity.exact = reference.rows, reference.exact and platform.machine() in _REPRODUCED
    if not parity.exact or not parity.end_to_end:
        return
    last, first = parity.end_to_end[-1], next((row for row in parity.end_to_end if row.fraction > 0), None)
    if parity.problem is None and first is not None and _too_many(last, END_TO_END_FRACTION):
        parity.problem = (
            f"integer kernels do not compute what they should: end to end {last.fraction:.2%} of the codes of "
            f"{last.name} differ, the first difference arises at {first.name}"
        )


@torch.no_grad()
def _compare(
    exported: Exported, deployed: Deployed, images: Tensor, *, optimised: bool
) -> tuple[list[LayerDifference], float]:
    run = Runner(exported.model, optimised=optimised, tensors=list(exported.grids.values()))
    found = run(images.numpy())
    forced = Forced(deployed.network, {name: found[tensor] for name, tensor in exported.grids.items()})
    ours = forced.run(images).numpy()
    theirs = found["logits"]
    largest = max(float(np.abs(ours).max()), float(np.finfo(np.float32).tiny))
    difference = float(np.abs(ours - theirs).max()) / largest
    return forced.rows, difference if np.isfinite(difference) else float("inf")


def _judge(parity: Parity, rows: Sequence[LayerDifference], how: str, fraction: float) -> None:
    for row in rows:
        if parity.problem is None and (row.steps > 1 or _too_many(row, fraction)):
            parity.problem = (
                f"the first difference arises at {row.name} ({how}): {row.fraction:.2%} of its codes differ, "
                f"by up to {row.steps:g} steps, on the same input"
            )


def _too_many(row: LayerDifference, fraction: float) -> bool:
    return row.fraction * row.codes > max(2.5, fraction * row.codes)  # so that small layers may have two


def batch_of(images: Tensor, size: int) -> Tensor:
    """``size`` inputs, of any number of axes: ``images`` repeated as often as that takes."""
    return images.repeat(-(-size // len(images)), *[1] * (images.ndim - 1))[:size]


def _check_batches(parity: Parity, run: Runner, images: Tensor) -> None:
    done = []
    for size in BATCHES:
        batch = batch_of(images, size).numpy()
        try:
            shape = run(batch)["logits"].shape
        except Exception as error:  # runtimes raise many types
            shape = (f"an error: {str(error).splitlines()[0]}",)
        if shape[0] == size:
            done.append(size)
        elif parity.problem is None:
            parity.problem = f"a batch of {size} images gives {shape}"
    parity.batches = tuple(done)


@torch.no_grad()
def agreement(
    parity: Parity,
    run: Callable[[Tensor], Tensor],
    pytorch: Callable[[Tensor], Tensor],
    test: Iterable[tuple[Tensor, Tensor | None]],
    student: torch.nn.Module | None,
) -> None:
    """Count on how many images ``pytorch`` and ``run``, which return the logits of network and file, agree."""
    right = {"accuracy": 0, "exported_accuracy": 0, "trained_accuracy": 0}
    labelled = 0
    for batch, given in test:
        x = batch.detach().cpu().float()
        ours = pytorch(x).argmax(1)
        theirs = run(x).argmax(1)
        parity.images += len(x)
        parity.disagreements += int((ours != theirs).sum())
        predicted = {"accuracy": ours, "exported_accuracy": theirs}
        if student is not None:
            trained = student(x).argmax(1)
            parity.trained_disagreements += int((trained != ours).sum())
            predicted["trained_accuracy"] = trained
        if given is not None:
            labelled += int((given >= 0).sum())  # of a sample without a label nobody is right
            for key, classes in predicted.items():
                right[key] += int((classes == given.cpu()).sum())
    if labelled:
        parity.accuracy = right["accuracy"] / labelled
        parity.exported_accuracy = right["exported_accuracy"] / labelled
        parity.trained_accuracy = None if student is None else right["trained_accuracy"] / labelled
    if parity.disagreements > max(1, DISAGREEMENT * parity.images) and parity.problem is None:
        rows = parity.optimised or parity.unoptimised
        first = next((row for row in rows if row.fraction > 0), None)
        where = "" if first is None else f"; the first difference arises at {first.name}"
        parity.problem = f"the first class differs on {parity.disagreements} of {parity.images} images{where}"


def scales_identical(model: onnx.ModelProto, deployed: Deployed) -> bool:
    """Whether the scale of every activation grid is in the file with the same bits."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in deployed.network.graph.nodes:
        if node.op != "call_module":
            continue
        grid = deployed.network.get_submodule(str(node.target))
        if not isinstance(grid, ActivationGrid):
            continue
        tensor = held.get(f"{node.target}.scale")
        if tensor is not None and numpy_helper.to_array(tensor).tobytes() != grid.scale.numpy().tobytes():
            return False
    return True
