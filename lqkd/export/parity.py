"""Proof that an exported file computes what the student computes: layer by layer, end to end, and by whole answers."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from lqkd.export.contents import altered_integers
from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.differences import Compared, Forced, LayerDifference, check_shape
from lqkd.export.emitter import Exported
from lqkd.export.gates import SIX, SIXFOLD
from lqkd.export.grids import ActivationGrid
from lqkd.export.reference import Reference
from lqkd.export.runtimes import Runner, is_qonnx
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, heads, returned_by
from lqkd.tasks import Classification, Task

if TYPE_CHECKING:  # which a prediction does without
    from torchmetrics import MetricCollection

BATCHES = (1, 7, 32)
UNOPTIMISED_FRACTION = 1e-3
"""At most so many codes of a layer may differ by one step without optimisation: sums in another order."""
OPTIMISED_FRACTION = 1e-2
"""At most so many by one step with it: integer kernels round products of scales."""
END_TO_END_FRACTION = 1e-2
"""At most so many codes of the last grid may differ end to end from what integer kernels compute by the formulas."""
REPRODUCED = ("x86_64", "AMD64")
"""Processors whose kernels the reference has: others round additions in fixed point."""
OUTPUT_TOLERANCE = 1e-4
"""Of the largest number of an output, the logits say, given the same input of the last layer."""
TEST, VALIDATION, GIVEN = "test", "validation", "given"
"""Where samples for the agreement are from: a split of the run's data, or whoever called."""


@dataclass
class Parity:
    """What was compared.

    Attributes:
        unoptimised, optimised: per grid, in the order of the network, when both get the file's own codes before it;
            ``optimised`` is empty for QONNX.
        end_to_end: per grid, from the inputs on, between the optimised file and the arithmetic of integer kernels in
            PyTorch; empty for formats that are not made for integer kernels.
        output_steps: the largest difference of an output likewise, in steps of the accumulators before it.
        exact: whether that arithmetic is known to the last bit in all of the network.
        outputs: name of each output to the largest difference in units of its largest number, likewise per layer.
        batches: numbers of samples for which the file ran.
        scales_identical: whether every scale in the file has the very bits of the student's.
        samples: number of samples for the agreement.
        split: what they are of: ``test``, ``validation`` where the data have no test split, or ``given``.
        answer: what is compared on them, such as the first class.
        differing: on how many of them, and parts of them, PyTorch and the optimised file differ in it.
        trained_differing: on how many the student as it was trained and the deployed network differ.
        metric, mode: of the task, and whether its least or largest value is the best.
        deployed, exported, trained: the metric of the deployed network in PyTorch, of the file and of the student as it
            was trained, where labels are known.
        problem: what failed, in one sentence; ``None`` when nothing did.
    """

    unoptimised: list[LayerDifference] = field(default_factory=list)
    optimised: list[LayerDifference] = field(default_factory=list)
    end_to_end: list[LayerDifference] = field(default_factory=list)
    output_steps: float | None = None
    exact: bool = False
    outputs: dict[str, float] = field(default_factory=dict)
    batches: tuple[int, ...] = ()
    scales_identical: bool = False
    samples: int = 0
    split: str = GIVEN
    answer: str = ""
    differing: float = 0.0
    trained_differing: float = 0.0
    metric: str | None = None
    mode: str | None = None
    deployed: float | None = None
    exported: float | None = None
    trained: float | None = None
    problem: str | None = None

    @property
    def agreement(self) -> float | None:
        """The share of samples with the same answer in PyTorch and in the file."""
        return 1.0 - self.differing / self.samples if self.samples else None

    @property
    def agreement_with_trained(self) -> float | None:
        """Likewise of the student as it was trained and the deployed network in PyTorch."""
        return 1.0 - self.trained_differing / self.samples if self.samples else None

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
            "outputs": self.outputs,
            "batches": list(self.batches),
            "scales_identical": self.scales_identical,
            "samples": self.samples,
            "split": self.split,
            "answer": self.answer,
            "agreement": self.agreement,
            "agreement_with_trained": self.agreement_with_trained,
            "metric": self.metric,
            "mode": self.mode,
            "as_trained": self.trained,
            "pytorch": self.deployed,
            "exported": self.exported,
            "passed": self.problem is None,
        }


def check(
    exported: Exported,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: torch.nn.Module | None = None,
    task: Task | None = None,
    runner: type[Runner] = Runner,
) -> Parity:
    """Compare an exported model with the network that it was made of.

    Args:
        exported: the model, as built.
        deployed: the network.
        example: inputs for the comparison layer by layer and of batch sizes, as :func:`~lqkd.export.deploy` takes
            them; repeated to 32.
        test: batches of the task, on the CPU, for the agreement of whole networks.
        student: as it was trained, to say what the deployment costs.
        task: which says how far whole networks agree; None for the classification of images.
        runner: what the file is run in, and how far that may be off.

    Raises:
        ParityError: when the file gives numbers in other shapes.
    """
    parity = Parity(scales_identical=scales_identical(exported.model, deployed))
    if not parity.scales_identical:
        parity.problem = "a scale in the file differs from the student's"
    elif (broken := exported.broken_rule(exported.model)) is not None:
        parity.problem = broken
    inputs = as_float32(example, "an example")
    parity.unoptimised, parity.outputs = _compare(exported, deployed, inputs, runner, optimised=False)
    judge_layers(parity, parity.unoptimised, "without optimisation", UNOPTIMISED_FRACTION)
    if not is_qonnx(exported.model):
        parity.optimised, found = _compare(exported, deployed, inputs, runner, optimised=True)
        parity.outputs = {name: max(apart, found[name]) for name, apart in parity.outputs.items()}
        judge_layers(parity, parity.optimised, "as optimised by the runtime", OPTIMISED_FRACTION)
    judge_outputs(parity, ", after layers that agree")
    whole = runner(exported.model, optimised=True)
    _check_batches(parity, whole, inputs)
    if exported.integer:
        _compare_end_to_end(parity, exported, deployed, inputs, whole)
    pytorch = Reference(deployed.network) if exported.integer else deployed.network
    agree_whole(parity, whole, pytorch, deployed, test, student, task)
    altered = altered_integers(exported.model, deployed) if exported.plain else None
    if altered is not None and parity.problem is None:
        parity.problem = f"{altered} in the file differs from the student's"
    return parity


def _compare_end_to_end(parity: Parity, exported: Exported, deployed: Deployed, inputs: Inputs, whole: Runner) -> None:
    run = type(whole)(exported.model, optimised=True, tensors=list(exported.grids.values()))
    found, theirs = run(inputs), whole(inputs)
    reference = Compared(deployed.network, exported.codes(found))
    ours = heads(reference(*deployed.in_order(inputs)), OUTPUT)
    parity.output_steps = output_steps(ours, theirs, deployed, reference)
    reproduced = whole.reproduced and platform.machine() in REPRODUCED
    parity.end_to_end, parity.exact = reference.rows, reference.exact and reproduced
    if not parity.exact or not parity.end_to_end:
        return
    last, first = parity.end_to_end[-1], next((row for row in parity.end_to_end if row.fraction > 0), None)
    if parity.problem is None and first is not None and _too_many(last, END_TO_END_FRACTION):
        parity.problem = (
            f"integer kernels do not compute what they should: end to end {last.fraction:.2%} of the codes of "
            f"{last.name} differ, the first difference arises at {first.name}"
        )


def output_steps(
    ours: Mapping[str, Tensor], theirs: Mapping[str, np.ndarray], deployed: Deployed, reference: Reference
) -> float:
    """The largest difference of an output, in steps of the accumulators before it, of which ``reference`` was run."""
    result = next(node for node in deployed.network.graph.nodes if node.op == "output")
    steps = [
        np.abs(ours[name].numpy() - theirs[name]) / float(reference.steps[node.name].min())
        for name, node in heads(result.args[0], OUTPUT).items()
    ]
    finite = all(np.isfinite(apart).all() for apart in steps)
    return max(float(apart.max()) for apart in steps) if finite else float("inf")


@torch.no_grad()
def _compare(
    exported: Exported, deployed: Deployed, inputs: Inputs, runner: type[Runner], *, optimised: bool
) -> tuple[list[LayerDifference], dict[str, float]]:
    run = runner(exported.model, optimised=optimised, tensors=list(exported.grids.values()))
    found = run(inputs)
    forced = Forced(deployed.network, exported.codes(found))
    ours = heads(forced.run(*deployed.in_order(inputs)), OUTPUT)
    return forced.rows, differences(ours, {name: torch.from_numpy(found[name]) for name in ours})


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest difference of each output, in units of its largest number in ``ours``."""
    apart = {}
    for name, values in ours.items():
        check_shape(name, values, theirs[name])
        largest = max(float(values.abs().max()), torch.finfo(torch.float32).tiny)
        difference = float((values - theirs[name]).abs().max()) / largest
        apart[name] = difference if math.isfinite(difference) else math.inf
    return apart


def judge_outputs(parity: Parity, where: str = "", tolerance: float = OUTPUT_TOLERANCE) -> None:
    """Say which output differs by more than the tolerance, if one does."""
    for name, apart in parity.outputs.items():
        if apart > tolerance and parity.problem is None:
            parity.problem = f"{name} differ by {apart:.2g} of the largest{where}"


def judge_layers(parity: Parity, rows: Sequence[LayerDifference], how: str, fraction: float) -> None:
    """Say which grid is the first whose codes differ by more than a step, or more of them than ``fraction``."""
    for row in rows:
        if parity.problem is None and (row.steps > 1 or _too_many(row, fraction)):
            parity.problem = (
                f"the first difference arises at {row.name} ({how}): {row.fraction:.2%} of its codes differ, "
                f"by up to {row.steps:g} steps, on the same input"
            )


def _too_many(row: LayerDifference, fraction: float) -> bool:
    return row.fraction * row.codes > max(2.5, fraction * row.codes)  # so that small layers may have two


def batch_of(inputs: Inputs, size: int) -> Inputs:
    """``size`` samples, of any number of axes: ``inputs`` repeated as often as that takes."""
    times = -(-size // len(inputs))
    return inputs.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1))[:size])


def _check_batches(parity: Parity, run: Runner, inputs: Inputs) -> None:
    done = []
    for size in BATCHES:
        try:
            found = run(batch_of(inputs, size))
            shapes: list[Any] = [found[name].shape for name in run.outputs]
        except Exception as error:  # runtimes raise many types
            shapes = [(f"an error: {str(error).splitlines()[0]}",)]
        wrong = [shape for shape in shapes if shape[0] != size]
        if not wrong:
            done.append(size)
        elif parity.problem is None:
            parity.problem = f"a batch of {size} samples gives {wrong[0]}"
    parity.batches = tuple(done)


@torch.no_grad()
def compared_numbers(altered: str | None) -> Parity:
    """The beginning of a proof of a file for one sample at a time, and its end where a number was altered.

    Args:
        altered: whose it is; None where all numbers in the file are the student's.
    """
    problem = None if altered is None else f"{altered} in the file differs from the student's"
    return Parity(scales_identical=altered is None, batches=(1,), problem=problem)


def agree_whole(
    parity: Parity,
    whole: Runner,
    pytorch: Callable[..., Any],
    deployed: Deployed,
    test: Iterable[Any],
    student: torch.nn.Module | None,
    task: Task | None = None,
) -> None:
    """:func:`agree` of a whole file.

    Args:
        parity: to which it is added.
        whole: runs the file.
        pytorch: the deployed network, or its arithmetic.
        deployed: it.
        test, student, task: as of :func:`agree`.
    """

    def in_pytorch(given: Inputs) -> Any:
        return pytorch(*deployed.in_order(given))

    def in_file(given: Inputs) -> Any:
        found = whole(given)
        return returned_by({name: torch.from_numpy(found[name]) for name in whole.outputs}, OUTPUT)

    agree(parity, in_file, in_pytorch, test, student, task, type(whole))


def agree(
    parity: Parity,
    in_file: Callable[[Inputs], Any],
    in_pytorch: Callable[[Inputs], Any],
    test: Iterable[Any],
    student: torch.nn.Module | None,
    task: Task | None = None,
    runner: type[Runner] = Runner,
) -> None:
    """Count on how many samples what the file and the network return agree, as the task says, and measure both.

    Args:
        parity: to which it is added.
        in_file, in_pytorch: what the file and the deployed network return.
        test: batches of the task.
        student: as it was trained.
        task: None for the classification of images.
        runner: what the file is run in, which says how far the two may be apart.
    """
    task = Classification() if task is None else task
    parity.answer, parity.metric, parity.mode = task.answer, task.metric, task.mode
    networks = {"deployed": in_pytorch, "exported": in_file}
    if student is not None:
        networks["trained"] = lambda given: given.call(student)
    metrics = {name: task.metrics().set_dtype(torch.float64) for name in networks}  # what users compute from the file
    for metric in (metric for of_network in metrics.values() for metric in of_network.values()):
        metric.distributed_available_fn = _nobody_else  # one process of several exports
    for batch in test:
        given = as_float32(task.inputs(batch), "a batch")
        asked = Asked("network", len(given))
        outputs = {name: task.outputs(run(given), asked) for name, run in networks.items()}
        parity.samples += len(given)
        parity.differing += _differing(task, outputs["deployed"], outputs["exported"])
        if student is not None:
            parity.trained_differing += _differing(task, outputs["trained"], outputs["deployed"])
        for name, measured in metrics.items():
            task.update(measured, outputs[name], batch)
    if parity.samples:
        for name, measured in metrics.items():
            setattr(parity, name, _value(measured, task))
    if parity.problem is not None:
        return
    if parity.differing > max(1, runner.disagreement * parity.samples):
        rows = parity.optimised or parity.unoptimised
        first = next((row for row in rows if row.fraction > 0), None)
        where = "" if first is None else f"; the first difference arises at {first.name}"
        parity.problem = f"the {task.answer} differs on {parity.differing:g} of {parity.samples} samples{where}"
    elif _is_apart(parity, runner.metric_tolerance):
        parity.problem = f"{parity.metric} of the file is {parity.exported:.4f} and in PyTorch {parity.deployed:.4f}"


def _is_apart(parity: Parity, tolerance: float | None) -> bool:
    if tolerance is None or parity.exported is None or parity.deployed is None:
        return False
    return abs(parity.exported - parity.deployed) > max(tolerance, 1 / parity.samples) * (1 + 1e-9)


def _differing(task: Task, ours: Any, theirs: Any) -> float:
    return float((1.0 - task.agreement(ours, theirs).double()).sum())


def _nobody_else() -> bool:
    return False


def _value(metrics: MetricCollection, task: Task) -> float | None:
    """The task's metric; None where no sample has a label."""
    value = float(metrics[task.metric].compute())
    return None if math.isnan(value) else value


def scales_identical(model: onnx.ModelProto, deployed: Deployed) -> bool:
    """Whether the scale of every activation grid is in the file with the same bits."""
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in deployed.network.graph.nodes:
        if node.op != "call_module":
            continue
        grid = deployed.network.get_submodule(str(node.target))
        if not isinstance(grid, ActivationGrid):
            continue
        for name, scale in ((f"{node.target}.scale", grid.scale), (f"{node.target}.{SIXFOLD}", grid.scale * SIX)):
            if name in held and numpy_helper.to_array(held[name]).tobytes() != scale.numpy().tobytes():
                return False
    return True
