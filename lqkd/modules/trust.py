"""Learning, before the first step, how far the teachers of a distillation can be believed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.ensembles import TrustedTeachers
from lqkd.losses.trust import (
    Answers,
    FittedInterpolation,
    Reliability,
    TrustMap,
    left_out_sentence,
    memorised,
    memorised_sentence,
    seldom_wrong,
    seldom_wrong_sentence,
)
from lqkd.losses.trust.reliability import BINS
from lqkd.modules.held_out import HeldOutRows, Known, Learning, chosen_of, interpolated, part_of, rows_that_fit
from lqkd.modules.held_out_features import explained
from lqkd.modules.held_out_task import looking
from lqkd.modules.own import joined_sentence, leave
from lqkd.modules.references import as_stop, batches_of, loader_of, warn
from lqkd.modules.stages import in_stage
from lqkd.modules.term import DistillationTerm
from lqkd.modules.terms import teacher_label
from lqkd.utils.counter_rng import STREAM_TRUST, random_bits

BELIEVED, STUDENT = "what is believed of them", "student"
"""What pictures call those that speak of held-out rows, beside the teachers."""
ROWS_OF_SAMPLE = 64
"""So many rows of a sample that has several, such as the pixels of an image, are looked at, at most."""
_FEWEST_OF_SAMPLE = 8
_OF_SAMPLE = 2**21
"""And of many classes, as tokens are, so many logits of it."""
_MOST_ROWS = 20_000
_MOST_LOGITS = 2**25
"""So many held-out rows are fitted to, and so many logits of a teacher, at most."""
_MOST_ASKED = 2**27
"""After so many logits no further held-out samples with several rows are asked about."""
_MOST_LISTED = 1024
"""Of more classes than that, where nothing else needs them, only those are listed of which something is known."""


class Trusting(Learning, Protocol):
    """A module that distils, with terms that may have to be fitted."""

    trust: dict[str, dict[str, Any]]
    reliability: dict[str, dict[str, dict[str, list[float]]]]
    held_out: dict[str, HeldOutRows]
    known_of_held_out: dict[str, Known]
    own: str | None
    own_added: bool


def check_held_out(module: Trusting) -> None:
    """See that there are held-out rows where a term asks for them.

    Raises:
        UsageError: when there are none.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    trusted = dict(_trusted(module))
    asking = dict.fromkeys(trusted, "combination: trust")
    asking |= dict.fromkeys(explained(module.distillation), "regularizer ExplainedVariance")
    ahead = looking(module.distillation)
    asking |= {
        name: f"regularizer {type(term.regularizer).__name__}"
        for name, term in module.distillation.terms()
        if name in ahead
    }
    for name, what in asking.items():
        with module.distillation.told(name):
            if not hasattr(data, "trust_batches"):
                raise UsageError(
                    f"{what} needs a DataModule with trust_batches(device), which yields batches of training rows that "
                    "are in no training batch"
                )
            if not len(getattr(data, "trust_indices", (None,))):
                raise UsageError(
                    f"{what} needs training rows that are in no training batch, and there are none: set "
                    "data.init_args.trust_fraction, to 0.05 say"
                )
            if name in trusted and trusted[name].map is None:
                raise UsageError(
                    f"{what} needs to know the shape of images: use a DataModule that tells its image_shape"
                )


def leave_memorised(module: Trusting) -> None:
    """Leave the student's own float network out of terms that did not ask for it where it knows held-out rows by heart.

    It was trained on all training rows as a rule. What a map learned of rows that it cannot be wrong about would be to
    believe it and no better teacher.
    """
    terms = [name for name in module.own_joined if not cast(DistillationTerm, module.distillation[name]).keeps_own]
    if not terms:
        return
    own = module.own_joined[terms[0]]  # one for all terms
    told = None
    with isolate_rng():
        unseen = _on_validation(module, {own})
        if module.trainer.is_global_zero:
            told = _by_heart(_held_out(module, {own}), unseen).get(own)
    told = module.trainer.strategy.broadcast(told)
    if told is None:
        return
    for name in terms:
        rank_zero_info(f"{_prefix(module, name)}: {left_out_sentence(_label(module, own), *told)}")
        leave(module, name)


def fit_trust(module: Trusting, known: bool) -> None:
    """Fit every trusted term, on the first process for all of them, and tell what was found.

    ``module.trust`` then has a report a term, as JSON values.

    Args:
        module: the module, attached to a Trainer, before its first step.
        known: whether a checkpoint has brought what was found.

    Raises:
        UsageError: when too few rows have a label.
    """
    trusted = dict(_trusted(module))
    for name, own in module.own_joined.items():
        rank_zero_info(f"{_prefix(module, name)}: {joined_sentence(own)}")
    if trusted and not known:
        rank_zero_info("asking teachers about held-out rows")
        for name, found in _learned(module, trusted).items():
            cast(TrustMap, trusted[name].map).load_state_dict(found.state)
            module.trust[name], module.reliability[name] = found.report, found.reliability
            if found.known is not None:
                module.known_of_held_out[name] = found.known
    keep_held_out(module)
    for name, report in module.trust.items():
        rank_zero_info(f"{_prefix(module, name)}: {report['sentence']}")
        for sentence in report["warnings"]:
            if sentence not in module.warnings:  # two terms may have a teacher in common
                warn(module, sentence)


def keep_held_out(module: Trusting) -> None:
    """Keep the held-out rows that teach a term's regularizer, so that the student can be asked about them.

    Raises:
        UsageError: when a checkpoint does not know them, or the data give others.
    """
    module.held_out = {}
    for name, regularizer in interpolated(module.distillation).items():
        if name not in module.known_of_held_out:
            raise UsageError(
                f"the checkpoint does not say what {_prefix(module, name)} knows of held-out rows, as one that an "
                "earlier version saved after its training: resume from one that was saved during it"
            )
        with isolate_rng():
            data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
            batches = iter(data.trust_batches(module.device))
            first = next(batches)
            known = module.known_of_held_out.pop(name).part(slice(rows_that_fit(first))).to(module.device)
            with module.distillation.told(name):
                batch = chosen_of(chain([first], batches), known.positions.cpu(), lambda b: len(module.inputs(b)))
            rows = HeldOutRows(module, regularizer, known, batch)
            with module.distillation.told(name):
                rows.check()
        module.held_out[name] = rows


def tables(module: Trusting, name: str) -> dict[str, tuple[list[Any], dict[str, list[float]]]]:
    """What there is to draw of a trusted term as it is now: by table its bins, and columns of which one is ``value``.

    ``reliability`` has a bin for each speaker and tenth of confidence, ``believed`` one for each class and, of a
    regularizer that learns from held-out rows, ``trust`` one for the mean weight and each loss. The student is asked
    for it, by all processes together.
    """
    found: dict[str, tuple[list[Any], dict[str, list[float]]]] = {}
    speakers, by_class = dict(module.reliability.get(name, {})), module.trust[name]["by_class"]
    rows = module.held_out.get(name)
    if rows is not None:
        known = rows.answered()
        of_student = known.student.log_softmax(-1)
        speakers |= {STUDENT: vars(Reliability.of(of_student, known.labels))}
        now = rows.believed()
        by_class = dict(zip(by_class, now.by_class, strict=True))
        values = now.numbers()
        found["trust"] = [*values], {"value": [*values.values()], "count": [float(now.rows)] * len(values)}
    known_classes = {label: value for label, value in by_class.items() if value is not None}
    if known_classes:
        found["believed"] = [*known_classes], {"value": [*known_classes.values()], "count": [1.0] * len(known_classes)}
    if speakers:
        bins = [f"{who} {tenth / 10:g}" for who in speakers for tenth in range(BINS)]
        columns = {"value": "right", "count": "count", "confidence": "confidence"}
        found["reliability"] = bins, {k: [v for of in speakers.values() for v in of[c]] for k, c in columns.items()}
    return found


def matrices(module: Trusting, name: str) -> dict[str, Tensor]:
    """By teacher of a trusted term, the matrix (C, C) of its map; empty where it is the mean of predictions."""
    term = cast(DistillationTerm, module.distillation[name])
    found = cast(TrustMap, cast(TrustedTeachers, term.combination).map).matrices()
    labels = [_label(module, teacher) for teacher in term.teachers]
    return {} if found is None else dict(zip(labels, found.cpu(), strict=True))


def report_held_out(module: Trusting) -> None:
    """At the end of a training: what regularizers have learned from held-out rows, of the student as it is now."""
    for name, rows in module.held_out.items():
        report = module.trust[name]
        report["interpolation"] = rows.believed(everything=True).named([*report["by_class"]])
        if isinstance(rows.interpolation, FittedInterpolation):
            report["interpolation"]["weight_of"] = rows.interpolation.chosen
        rows.regularizer.told = report["interpolation"]["sentence"]
        rank_zero_info(f"{_prefix(module, name)}: {rows.regularizer.told}")


def _prefix(module: Trusting, name: str) -> str:
    """What messages about a term begin with."""
    return f"distillation.{name}" if module.distillation.named else "trust"


class _Rows(NamedTuple):
    """What teachers say of N held-out rows."""

    logits: dict[str, Tensor]
    """(N, C) of every teacher, by its name."""
    labels: Tensor
    """(N,) int64, negative where a row has none."""
    samples: Tensor | None
    """(N,) int64, the sample of each row; None where every row is one."""
    positions: Tensor
    """(N,) int64, their places among all rows."""

    def answers(self, teacher: str) -> Answers:
        """How many rows a teacher is right about; of samples with several rows the sum of their shares."""
        known = self.labels >= 0
        right = (self.logits[teacher].argmax(1) == self.labels)[known]
        if self.samples is None:
            return Answers(int(right.sum()), int(known.sum()))
        _, inverse, rows = self.samples[known].unique(return_inverse=True, return_counts=True)
        return Answers(float((right / rows[inverse]).sum()), len(rows))


class _Found(NamedTuple):
    """Of one term."""

    state: dict[str, Tensor]
    """Of its map, on the CPU."""
    report: dict[str, Any]
    reliability: dict[str, dict[str, list[float]]]
    """By whom: of every teacher, and of the map on rows that it was not fitted to."""
    known: Known | None
    """Of the rows, on the CPU, where its regularizer learns from them."""


def _learned(module: Trusting, trusted: Mapping[str, TrustedTeachers]) -> dict[str, _Found]:
    """What was found by term, the same on all processes."""
    with isolate_rng():  # loaders draw, which must not move the random numbers of the training
        unseen = _on_validation(module, module.named_teachers)
        asked = _held_out(module, module.named_teachers) if module.trainer.is_global_zero else None
    if not unseen:
        rank_zero_info(
            "whether teachers know held-out rows by heart is not known: there are no validation rows with a label"
        )
    found: dict[str, Any] | str = {}
    if asked is not None:
        by_heart = {
            name: seldom_wrong_sentence(_label(module, name), asked.answers(name))
            for name in asked.logits
            if asked.samples is None and seldom_wrong(asked.answers(name))  # of pixels most are background
        }
        by_heart |= {
            name: memorised_sentence(_label(module, name), *both) for name, both in _by_heart(asked, unseen).items()
        }
        try:
            found = {name: _fitted(module, name, one, asked, by_heart) for name, one in trusted.items()}
        except UsageError as error:
            found = str(error)  # for all processes
    found = module.trainer.strategy.broadcast(found)
    if isinstance(found, str):
        raise UsageError(found)
    return found


def _by_heart(asked: _Rows, unseen: Mapping[str, Answers]) -> dict[str, tuple[Answers, Answers]]:
    """Of every teacher that knows the held-out rows by heart: its answers on them, and on validation."""
    found = {name: (asked.answers(name), unseen[name]) for name in asked.logits if name in unseen}
    return {name: both for name, both in found.items() if memorised(*both)}


def _trusted(module: Trusting) -> Iterator[tuple[str, TrustedTeachers]]:
    for name, term in module.distillation.terms():
        if isinstance(term.combination, TrustedTeachers):
            yield name, term.combination


def _fitted(
    module: Trusting,
    name: str,
    combination: TrustedTeachers,
    asked: _Rows,
    by_heart: Mapping[str, str],
) -> _Found:
    """Of one term."""
    term = cast(DistillationTerm, module.distillation[name])
    fitted = cast(TrustMap, combination.map)
    with module.distillation.told(name):
        together = torch.stack([asked.logits[teacher] for teacher in term.teachers])
        warnings = [by_heart[teacher] for teacher in term.teachers if teacher in by_heart]
        own = term.teachers.index(module.own) if module.own in term.teachers else None
        report = fitted.fit(
            together,
            asked.labels,
            memorised=bool(warnings),
            groups=asked.samples,
            own=own,
            temperature=term.temperature,
        )
    names = [_label(module, teacher) for teacher in term.teachers]
    data: Any = getattr(module.trainer, "datamodule", None)
    classes = list(getattr(data, "class_names", ())) or [str(c) for c in range(len(report.by_class))]
    state = {key: value.cpu() for key, value in fitted.state_dict().items()}
    rows, known = asked.labels >= 0, None
    together, labels = together[:, rows], asked.labels[rows]
    said = fitted.left_out(together, labels, groups=None if asked.samples is None else asked.samples[rows])
    if term.interpolation is not None:
        clean = ~fitted.doubted(together, labels)
        positions = asked.positions[rows][clean]
        known = Known.of(said[clean], together[:, clean], labels[clean], positions).to(torch.device("cpu"))
    speakers = dict(zip(names, together, strict=True)) | {BELIEVED: said}
    reliability = {who: vars(Reliability.of(logits, labels)) for who, logits in speakers.items()}
    told = report.named(names, classes) | {"warnings": warnings}
    if known is None and len(classes) > _MOST_LISTED:
        told["by_class"] = {label: value for label, value in told["by_class"].items() if value is not None}
    return _Found(state, told, reliability, known)


def _label(module: Trusting, teacher: str) -> str:
    return teacher_label(teacher, module.named_teachers)


def _on_validation(module: Trusting, names: Collection[str]) -> dict[str, Answers]:
    """Answers of some teachers on the validation split, of all processes; nothing where there is none."""
    trainer = module.trainer
    loader = loader_of(trainer.datamodule, "val_dataloader", "validation")  # type: ignore[attr-defined]
    batches = as_stop(batches_of(loader, trainer.limit_val_batches))
    asked = [name for name in module.named_teachers if name in names]
    counts = torch.zeros(len(asked), 2, device=module.device)
    with in_stage(trainer, RunningStage.TESTING):
        moved = (trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in islice(loader or (), batches))
        for rows in _asked(module, moved, asked):
            counts += torch.tensor([rows.answers(name) for name in rows.logits], device=module.device)
    counts = cast(Tensor, trainer.strategy.reduce(counts, reduce_op="sum"))
    found = zip(asked, counts.tolist(), strict=True)
    return {name: Answers(right, int(rows)) for name, (right, rows) in found if rows}


@torch.no_grad()
def _asked(module: Trusting, batches: Iterable[Any], names: Collection[str]) -> Iterator[_Rows]:
    """What some teachers say of the rows of every batch, or of some rows of every sample that has several.

    Their places are of the batch.
    """
    start = 0
    for batch in batches:
        inputs = module.inputs(batch)
        with module.trainer.precision_plugin.forward_context():
            seen = module.passes.ask_teachers(module.passes.teacher_inputs(batch, inputs), names)
        outputs = {name: of_teacher.output for name, of_teacher in seen.items()}
        if module.task.one_row_a_sample:
            yield _rows(module, outputs, batch)
            continue
        size = len(inputs)
        parts = [_some_of_sample(module, outputs, batch, i, size, start + i) for i in range(size)]
        start += size
        yield _joined(parts)


def _held_out(module: Trusting, names: Collection[str]) -> _Rows:
    """What some teachers say of all held-out rows, or as many of them as are fitted to."""
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    asked = _joined([*_few(_asked(module, data.trust_batches(module.device), names))])
    classes = next(iter(asked.logits.values())).shape[1]
    most = min(_MOST_ROWS, _MOST_LOGITS // classes)
    order = random_bits(0, 0, torch.arange(len(asked.labels)), STREAM_TRUST).argsort(stable=True)[:most]
    return _chosen(asked, order.sort().values.to(asked.labels.device))


def _few(batches: Iterable[_Rows]) -> Iterator[_Rows]:
    """All rows, or, of samples with several, those of the first batches: their logits have to be held together."""
    asked = 0
    for rows in batches:
        yield rows
        asked += next(iter(rows.logits.values())).numel()
        if rows.samples is not None and asked >= _MOST_ASKED:
            return


def _rows(module: Trusting, outputs: Mapping[str, Any], batch: Any) -> _Rows:
    """All rows of a batch, by the outputs of every teacher."""
    rows = {name: module.task.rows(output, batch) for name, output in outputs.items()}
    labels = next(iter(rows.values())).labels
    assert labels is not None, "check_term has seen to it"
    logits = {name: of_teacher.logits.float() for name, of_teacher in rows.items()}
    return _Rows(logits, labels, None, torch.arange(len(labels), device=labels.device))


def _some_of_sample(
    module: Trusting, outputs: Mapping[str, Any], batch: Any, index: int, size: int, number: int
) -> _Rows:
    """Some of the rows of one sample of a batch, chosen by its number among all."""
    place = torch.tensor([index])
    found = _rows(module, part_of(outputs, place, size), part_of(batch, place, size))
    classes = next(iter(found.logits.values())).shape[1]
    most = min(ROWS_OF_SAMPLE, max(_FEWEST_OF_SAMPLE, _OF_SAMPLE // classes))
    order = random_bits(1, number, torch.arange(len(found.labels)), STREAM_TRUST).argsort(stable=True)
    some = _chosen(found, order[:most].sort().values.to(found.labels.device))
    return some._replace(samples=torch.full_like(some.labels, number))


def _chosen(rows: _Rows, places: Tensor) -> _Rows:
    logits = {name: of_teacher[places] for name, of_teacher in rows.logits.items()}
    samples = None if rows.samples is None else rows.samples[places]
    return _Rows(logits, rows.labels[places], samples, rows.positions[places])


def _joined(parts: Sequence[_Rows]) -> _Rows:
    """The rows of several batches, or samples, as one; their places go on."""
    logits = {name: torch.cat([part.logits[name] for part in parts]) for name in parts[0].logits}
    labels = torch.cat([part.labels for part in parts])
    samples = [part.samples for part in parts if part.samples is not None]
    together = torch.cat(samples) if samples else None
    return _Rows(logits, labels, together, torch.arange(len(labels), device=labels.device))
