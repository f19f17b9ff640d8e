"""Learning, before the first step, how far the teachers of a distillation can be believed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.ensembles import TrustedTeachers
from lqkd.losses.trust import TrustMap
from lqkd.modules.distillation import Distillation, teacher_label
from lqkd.modules.distilling import Distilling
from lqkd.utils.counter_rng import STREAM_TRUST, random_bits

_MOST_ROWS = 20_000
"""Pixels or tokens of a few samples are many rows: so many of them are fitted to."""


class Trusting(Distilling, Protocol):
    """A module that distils, with terms that may have to be fitted."""

    distillation: Distillation
    trust: dict[str, dict[str, Any]]


def check_held_out(module: Trusting) -> None:
    """See that there are held-out rows where a term asks for them.

    Raises:
        UsageError: when there are none.
    """
    data: Any = getattr(module.trainer, "datamodule", None)
    for name, combination in _trusted(module):
        with module.distillation.told(name):
            if not hasattr(data, "trust_batches"):
                raise UsageError(
                    "combination: trust needs a DataModule with trust_batches(device), which yields batches of "
                    "training rows that are in no training batch"
                )
            if not len(getattr(data, "trust_indices", (None,))):
                raise UsageError(
                    "combination: trust needs training rows that are in no training batch, and there are none: set "
                    "data.init_args.trust_fraction, to 0.05 say"
                )
            if combination.map is None:
                raise UsageError(
                    "combination: trust needs to know the shape of images: use a DataModule that tells its image_shape"
                )


def fit_trust(module: Trusting) -> None:
    """Fit every trusted term, on the first process for all of them, and tell what was found.

    ``module.trust`` then has a report a term, as JSON values.

    Raises:
        UsageError: when too few rows have a label.
    """
    trusted = dict(_trusted(module))
    if not trusted:
        return
    module.trust.clear()
    found: dict[str, Any] | str = {}
    if module.trainer.is_global_zero:
        rank_zero_info("asking teachers about held-out rows")
        logits, labels = _asked(module)
        try:
            found = {name: _fitted(module, name, one, logits, labels) for name, one in trusted.items()}
        except UsageError as error:
            found = str(error)  # for all processes
    found = module.trainer.strategy.broadcast(found)
    if isinstance(found, str):
        raise UsageError(found)
    for name, (state, report) in found.items():
        cast(TrustMap, trusted[name].map).load_state_dict(state)
        module.trust[name] = report
        prefix = f"distillation.{name}" if module.distillation.named else "trust"
        rank_zero_info(f"{prefix}: {report['sentence']}")


def _trusted(module: Trusting) -> Iterator[tuple[str, TrustedTeachers]]:
    for name, term in module.distillation.terms():
        if isinstance(term.combination, TrustedTeachers):
            yield name, term.combination


def _fitted(
    module: Trusting, name: str, combination: TrustedTeachers, logits: dict[str, Tensor], labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a term's map, on the CPU, and what is told of it."""
    teachers = cast("tuple[str, ...]", module.distillation[name].teachers)
    fitted = cast(TrustMap, combination.map)
    with module.distillation.told(name):
        report = fitted.fit(torch.stack([logits[teacher] for teacher in teachers]), labels)
    names = [teacher_label(teacher, module.named_teachers) for teacher in teachers]
    data: Any = getattr(module.trainer, "datamodule", None)
    classes = list(getattr(data, "class_names", ())) or [str(c) for c in range(len(report.by_class))]
    return {key: value.cpu() for key, value in fitted.state_dict().items()}, report.named(names, classes)


@torch.no_grad()
def _asked(module: Trusting) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (N, C) of every teacher, by name, and labels (N,) of the held-out rows."""
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    logits: dict[str, list[Tensor]] = {name: [] for name in module.named_teachers}
    labels = []
    with module.trainer.precision_plugin.forward_context():
        for batch in data.trust_batches(module.device):
            inputs = module.inputs(batch)
            rows = None
            for name, seen in module.ask_teachers(module.teacher_inputs(batch, inputs)).items():
                rows = module.task.rows(seen.output, batch)
                logits[name].append(rows.logits.float())
            assert rows is not None
            assert rows.labels is not None, "check_term has seen to it"
            labels.append(rows.labels)
    together = torch.cat(labels)
    order = random_bits(0, 0, torch.arange(len(together)), STREAM_TRUST).argsort(stable=True)[:_MOST_ROWS]
    chosen = order.sort().values.to(together.device)
    return {name: torch.cat(parts)[chosen] for name, parts in logits.items()}, together[chosen]
