"""Which layers suffer most from few bits, and the best bits under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, heads
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.quantization import (
    Budget,
    Candidate,
    MixedPrecision,
    Recipe,
    SensitivityReport,
    assign_bits,
    measure_sensitivity,
)
from lqkd.quantization.analysis.judging import Judge
from lqkd.runs.reader import read_run, take_batches
from lqkd.tasks.values import name_of, shown
from lqkd.utils.files import write_json, write_text
from lqkd.utils.progress import Progress
from lqkd.utils.tables import write_csv

JSON = "sensitivity.json"
TABLE = "sensitivity.csv"
RECIPE = "recipe.yaml"
CALIBRATION_BATCHES = 8
"""Training batches for the statistics of batch norm; the first of them fits the quantizers, as in a training."""


def sensitivity(
    run: str | Path,
    *,
    bits: str = "8,4,2",
    budget: str | None = None,
    batches: int = 16,
    output: str | Path | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
) -> SensitivityReport:
    """Quantise each layer of a network alone, without training, and rank the layers by what the validation split says.

    The ranking is printed and written as ``sensitivity.json`` and ``sensitivity.csv``, with a budget also as
    ``recipe.yaml``. Test data are not used.

    Args:
        run: run folder, whose best checkpoint gives the float weights; or a config, before any training.
        bits: to try, separated by commas: 4 is short for w4a4.
        budget: for the bits of all layers: size=120kB, size=12%, bops=2.5G or bops=3% (of float); None for none.
        batches: validation batches, spread over the split.
        output: folder for what is written; None for the run folder.
        overwrite: whether to replace an earlier ranking.
        allow_code: whether classes of a folder that somebody else made may be run.

    Raises:
        UsageError: after a user's mistake.
    """
    parsed = None if budget is None else Budget.parse(budget)
    tried = [f"w{text}a{text}" if text.isdecimal() else text for text in bits.split(",")]
    if batches < 1:
        raise UsageError(f"--batches {batches} is not possible: it must be at least 1")
    names = [JSON, TABLE, *([RECIPE] if parsed is not None else [])]
    folder = _output(Path(run), None if output is None else Path(output), overwrite, names)
    reader, checkpoint = read_run(run, allow_code)
    recipe = reader.model.quantization if isinstance(reader.model, DistillModule) else Recipe()
    calibration, validation = take_batches(reader, CALIBRATION_BATCHES, batches)
    with Progress("quantising each layer alone") as bar:
        report = measure_sensitivity(
            reader.model.product(),
            recipe,
            validation,
            [(inputs.args, inputs.keywords) for inputs in calibration],
            tried,
            bar.update,
            parsed,
            OfTask(reader.model),
        )
    source = "the weights that a training starts from" if checkpoint is None else str(checkpoint)
    print(f"float weights: {source}")
    print(
        f"float network: loss {report.loss:.4f}, {name_of(report.metric)} {shown(report.metric, report.value, 2)} on "
        f"{report.samples} validation samples"
    )
    print(report)
    written: dict[str, Any] = _described(report) | {
        "run": str(run),
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "calibration_samples": sum(map(len, calibration)),
        "assignment": None,
    }
    if budget is not None and parsed is not None:
        assigned = assign_bits(report, parsed)
        written["assignment"] = _assignment(budget, assigned)
        write_text(folder / RECIPE, _recipe_text(budget, assigned, report))
        _print_assignment(budget, assigned, report)
    write_json(folder / JSON, written)
    _write_table(folder / TABLE, report, written["assignment"])
    told = f"{JSON} and {TABLE}" if written["assignment"] is None else f"{JSON}, {TABLE} and {RECIPE}"
    print(f"written to {folder}: {told}")
    return report


class OfTask(Judge):
    """The loss and the metric of a module's task, and how far rows are from those of the float network.

    The loss is what the task measures under this name, where it does, and what it trains by otherwise. Rows that are
    logits of classes are compared by KL(float || network) in nats, others by the mean squared difference; those without
    a label do not count.
    """

    def __init__(self, module: TaskModule) -> None:
        self.task, self.metric = module.task, module.task.metric
        self.distance = "KL" if self.task.predicts_classes else "squared difference"

    def answer(self, network: nn.Module, batch: Any) -> Any:
        inputs = Inputs.of(self.task.inputs(batch)).fit(network)
        return self.task.outputs(inputs.call(network), Asked("network", len(inputs)))

    def samples(self, batch: Any, answer: Any) -> int:
        labels = self.task.rows(answer, batch).labels if self.task.one_row_a_sample else None
        return len(Inputs.of(self.task.inputs(batch))) if labels is None else int((labels >= 0).sum())

    def judge(self, answers: Iterable[tuple[Any, Any, Any]]) -> tuple[float, float, float]:
        metrics, measured, apart, rows, counted = self.task.metrics(), 0.0, 0.0, 0, 0.0
        for batch, found, expected in answers:
            self.task.update(metrics.to(_device(found)), found, batch)
            ours, theirs = self.task.rows(found, batch), self.task.rows(expected, batch)
            weight = float(self.task.counted(ours, batch))
            measured, counted = measured + float(self.task.loss(found, batch)) * weight, counted + weight
            distances = self._distances(ours.logits, theirs.logits)
            known = distances if ours.labels is None else distances[ours.labels >= 0]
            apart, rows = apart + float(known.double().sum()), rows + len(known)
        values = metrics.compute()
        loss = float(values["loss"]) if "loss" in values else measured / max(counted, 1.0)
        return loss, apart / max(rows, 1), float(values[self.metric])

    def _distances(self, found: Tensor, expected: Tensor) -> Tensor:
        """(N,) float."""
        if not self.task.predicts_classes:
            return (found - expected).flatten(1).square().mean(dim=1)
        ours, theirs = found.log_softmax(dim=-1), expected.log_softmax(dim=-1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


def _device(answer: Any) -> torch.device:
    return next(tensor.device for tensor in heads(answer, "").values())


def _output(run: Path, given: Path | None, overwrite: bool, names: Sequence[str]) -> Path:
    if given is None and not run.is_dir():
        raise UsageError(f"--output is missing: {str(run)!r} is not a run folder that could keep the ranking")
    output = run if given is None else given
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {str(output)!r} is not a folder")
    there = [name for name in names if (output / name).exists()]
    if there and not overwrite:
        raise UsageError(f"{str(output / there[0])!r} exists: give --overwrite, or another --output")
    return output


def _described(report: SensitivityReport) -> dict[str, Any]:
    return {
        "lqkd": metadata.version("lqkd"),
        "bits": list(report.bits),
        "validation_samples": report.samples,
        "distance": report.distance,
        "float": {
            "loss": report.loss,
            "metric": report.metric,
            "value": report.value,
            "packed_bytes": report.packed_bytes,
            "bit_operations": report.bit_operations,
        },
        "layers": [[asdict(candidate) for candidate in group] for group in report.ranked()],
        "quantization": asdict(report.recipe),
    }


def _assignment(budget: str, assigned: MixedPrecision) -> dict[str, Any]:
    return {
        "budget": budget,
        "limit": assigned.limit,
        "packed_bytes": assigned.packed_bytes,
        "bit_operations": assigned.bit_operations,
        "summed_loss_increase": assigned.loss_increase,
        "bits": {name: f"W{weight}A{activation}" for name, weight, activation in _by_layer(assigned.chosen)},
    }


def _by_layer(candidates: Sequence[Candidate]) -> list[tuple[str, int, int]]:
    return [row for c in candidates for row in zip(c.layers, c.weight_bits, c.activation_bits, strict=True)]


def _sizes(assigned: MixedPrecision, report: SensitivityReport) -> str:
    return (
        f"{assigned.packed_bytes / 1000:.1f} kB ({assigned.packed_bytes / report.packed_bytes:.2%} of float), "
        f"{assigned.bit_operations:.4g} bit operations ({assigned.bit_operations / report.bit_operations:.2%} of float)"
    )


def _recipe_text(budget: str, assigned: MixedPrecision, report: SensitivityReport) -> str:
    recipe = asdict(assigned.recipe)
    recipe["rules"] = [{k: v for k, v in rule.items() if v is not None} for rule in recipe["rules"]]
    described = yaml.safe_dump({"model": {"init_args": {"quantization": recipe}}}, sort_keys=False)
    return (
        f"# Bits of every layer for the budget {budget}: {_sizes(assigned, report)}\n"
        f"# python -m lqkd fit --config CONFIG --config {RECIPE}\n{described}"
    )


def _print_assignment(budget: str, assigned: MixedPrecision, report: SensitivityReport) -> None:
    print(
        f"\nbits for {budget}: {_sizes(assigned, report)}; increases of the loss sum to {assigned.loss_increase:+.4f}"
    )
    rows = _by_layer(assigned.chosen)
    width = max(len(name) for name, _, _ in rows)
    for name, weight, activation in rows:
        print(f"{name.ljust(width)}  W{weight}A{activation}")


def _write_table(target: Path, report: SensitivityReport, assignment: dict[str, Any] | None) -> None:
    measured = ("loss_increase", "distance", "change", "packed_bytes", "bit_operations")
    rows = [
        {"rank": rank, "layer": name, "weight_bits": weight, "activation_bits": activation}
        | {key: getattr(c, key) for key in measured}
        | {"chosen": None if assignment is None else int(assignment["bits"][name] == f"W{weight}A{activation}")}
        for rank, group in enumerate(report.ranked(), start=1)
        for c in group
        for name, weight, activation in _by_layer([c])
    ]
    write_csv(target, rows)
