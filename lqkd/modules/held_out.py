"""What labels of held-out rows teach during a training: how far teachers are believed against the student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lqkd.errors import UsageError
from lqkd.losses.trust.believed import Believed, believed
from lqkd.losses.trust.fitted import FittedInterpolation
from lqkd.losses.trust.interpolation import Interpolation, Seen, seen
from lqkd.losses.trust.map import FEWEST_ROWS
from lqkd.modules.distillation import Distillation
from lqkd.modules.distilling import Distilling
from lqkd.quantization.modes import evaluating
from lqkd.regularizers import HeldOutInterpolation
from lqkd.tasks import Rows
from lqkd.utils.counter_rng import STREAM_TRUST, random_bits

WINDOW = 512
"""So many answers of the student, the last ones, phi learns from at most."""
ASKS = 4
"""Of so many times that the student was asked, the last ones: what it said before is that of another student."""
JUDGED = 5
"""Of so many rows one is never learned from."""
MOST_ROWS = 4096
MOST_BYTES = 2**28
"""So many held-out rows are kept on the device, and so many bytes of their inputs, at most."""

_PLAIN = (str, int, float)
_NO_SAMPLES = (
    "held-out rows are kept, for which the batches of trust_batches must be tensors with the samples "
    "in front, or tuples, lists, dicts and named tuples of such"
)
_OTHER_ROWS = (
    "trust_batches gave other rows, or another order, than when teachers were asked about them: it must give the same "
    "each time that it is called"
)


@dataclass
class Known:
    """What is known of the held-out rows of one term, N of them in a random order; plain values, for checkpoints."""

    positions: Tensor
    """(N,) int64 of each row among all rows of ``trust_batches``."""
    labels: Tensor
    """(N,) int64, none negative."""
    target: Tensor
    """(N, C) log-probabilities of what is believed of the teachers, by a map that was not fitted to the row."""
    teachers: Tensor
    """(K, N, C) logits of each of them."""
    student: Tensor
    """(N, C) logits, as it last answered; 0 where it has not."""
    asked: int = 0
    """How many rows it has answered, over and over in their order."""
    batches: int = 0
    """How many training batches there were."""

    @classmethod
    def of(cls, target: Tensor, teachers: Tensor, labels: Tensor, positions: Tensor) -> Known:
        """Of rows with a label, in whatever order."""
        order = random_bits(1, 0, torch.arange(len(labels)), STREAM_TRUST).argsort(stable=True)[:MOST_ROWS]
        order = order.to(labels.device)
        target, teachers = target[order], teachers[:, order]
        return cls(positions[order], labels[order], target, teachers, torch.zeros_like(target))

    def part(self, some: slice) -> Known:
        """Of some of the rows."""
        rows = (self.positions[some], self.labels[some], self.target[some], self.teachers[:, some])
        return Known(*rows, self.student[some], self.asked, self.batches)

    def to(self, device: torch.device) -> Known:
        """On a device."""
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Known(**moved)


class Learning(Distilling, Protocol):
    """A module whose regularizers learn from held-out rows."""

    distillation: Distillation

    def all_gather(self, data: Tensor) -> Any: ...


class HeldOutRows:
    """The held-out rows of one term: asks the student about some of them now and then, and says what phi minimises.

    All processes hold the same of them, and ask the student about a part each.

    Args:
        module: attached to a Trainer, before its first step.
        regularizer: that of the term.
        known: of the rows, on the module's device.
        batch: what the task takes, of these rows and in their order, on the device.
    """

    def __init__(self, module: Learning, regularizer: HeldOutInterpolation, known: Known, batch: Any) -> None:
        self.known = known
        self.regularizer = regularizer
        self._module, self._batch = module, batch
        self._window: tuple[Seen, Tensor] | None = None  # of what learns by gradients
        self._answered: tuple[bool, int] | None = None  # whether all rows, and after how many batches
        if known.asked and isinstance(self.interpolation, Interpolation):
            self._look()

    @property
    def interpolation(self) -> Interpolation | FittedInterpolation:
        """What learns."""
        assert self.regularizer.interpolation is not None
        return self.regularizer.interpolation

    @torch.no_grad()
    def check(self) -> None:
        """See, before the first step, that the rows that were kept are those that teachers were asked about.

        Raises:
            UsageError: when samples of batches cannot be told apart, or labels differ.
        """
        module, known = self._module, self.known
        size = len(known.labels)
        try:
            samples = len(module.inputs(self._batch))
        except UsageError as error:  # of what has been put together, not of the user's batches
            raise UsageError(f"{_NO_SAMPLES} ({error})") from error
        if samples != size:
            raise UsageError(f"{_NO_SAMPLES} (of {size} held-out rows {samples} were found)")
        wrong = 0
        with evaluating(module.student):
            for some in torch.arange(size).split(self.regularizer.rows):
                places = some.to(known.labels.device)
                labels = self._rows(places).labels
                assert labels is not None, "check_term has seen to it"
                wrong += int((labels != known.labels[places]).sum()) if len(labels) == len(places) else len(places)
        counted = torch.tensor(float(wrong), device=known.labels.device)
        if module.trainer.strategy.reduce(counted, reduce_op="sum") > 0:  # on whatever process
            raise UsageError(_OTHER_ROWS)

    def before_batch(self) -> None:
        """Ask the student, where it is time."""
        if self.known.batches % self.regularizer.every == 0:
            size = len(self.known.labels)
            count = self.regularizer.rows if self.known.asked else WINDOW
            self._ask(torch.arange(self.known.asked, self.known.asked + min(count, size)) % size)
            self.known.asked += min(count, size)
            self._look()
        self.known.batches += 1

    def objective(self) -> Tensor | None:
        """What phi minimises, 0-dim, the same on all processes; no other parameter gets a gradient.

        None where it is fitted whenever the student is asked, and has nothing left to minimise.
        """
        if isinstance(self.interpolation, FittedInterpolation):
            return None
        assert self._window is not None, "before_batch() has asked"
        return self.interpolation.objective_of(*self._window)

    def answered(self, everything: bool = False) -> Known:
        """The rows that are not learned from, or all, with what the student as it is now says of them.

        All processes call it together, since they ask together, once for a state of the student.
        """
        some = slice(None, None, None if everything else JUDGED)
        if self._answered != (everything, self.known.batches):
            self._ask(torch.arange(len(self.known.labels))[some])
            self._answered = everything, self.known.batches
        return self.known.part(some)

    @torch.no_grad()
    def believed(self, everything: bool = False) -> Believed:
        """What is believed now, of rows as :meth:`answered` takes them, and what that is worth on those not learned."""
        known = self.answered(everything)
        looked = seen(known.target, known.student, known.teachers)
        target, weights = self.interpolation(known.target, known.student, known.teachers)
        judged = torch.arange(len(known.labels), device=known.labels.device) % (JUDGED if everything else 1) == 0
        return believed(looked.teacher, looked.student, target, weights, known.labels, judged)

    def _look(self) -> None:
        """Take the last answers, of the last times, as what is learned from, or fit to them."""
        known, rows = self.known, self._last()
        said = known.target[rows], known.student[rows]
        if isinstance(self.interpolation, FittedInterpolation):
            self.interpolation.fit(*said, known.labels[rows], known.teachers[:, rows])
        else:
            self._window = seen(*said, known.teachers[:, rows]), known.labels[rows]

    def _last(self) -> Tensor:
        """The rows of the last answers, without those that are never learned from."""
        known, size = self.known, len(self.known.labels)
        count, recent = min(WINDOW, size), ASKS * min(self.regularizer.rows, size)
        if known.asked >= count + recent:  # the first answers, of the student before its training, are as old as that
            count = min(count, recent)
        rows = torch.arange(known.asked - count, known.asked) % size
        return rows[rows % JUDGED != 0].to(known.labels.device)

    @torch.no_grad()
    def _ask(self, rows: Tensor) -> None:
        """Write down what the student says of rows, as it would be deployed: every process asks it about a part."""
        module, processes = self._module, self._module.trainer.world_size
        with evaluating(module.student):
            for some in rows.split(self.regularizer.rows):
                each = -(-len(some) // processes)
                mine = some[torch.arange(each * processes) % len(some)].view(processes, each)
                logits = self._answers(mine[module.trainer.global_rank].to(self.known.labels.device))
                if processes > 1:
                    logits = module.all_gather(logits).flatten(0, 1)[: len(some)]
                self.known.student[some.to(logits.device)] = logits

    def _answers(self, rows: Tensor) -> Tensor:
        return self._rows(rows).logits.float()

    def _rows(self, rows: Tensor) -> Rows:
        module, size = self._module, len(self.known.labels)
        batch = part_of(self._batch, rows, size)
        with module.trainer.precision_plugin.forward_context():  # also where no training step has begun it
            output = module.passes.of_student(module.inputs(batch)).output
        return module.task.rows(output, batch)


def chosen_of(batches: Iterable[Any], positions: Tensor, samples: Callable[[Any], int]) -> Any:
    """The rows of some positions among those of all batches, in that order, as one batch.

    Args:
        batches: with tensors that have the samples in front.
        positions: (N,) int64, on the CPU.
        samples: how many a batch has.

    Raises:
        UsageError: when samples of batches cannot be told apart, or there are fewer than the positions say.
    """
    parts: list[list[Any]] = []
    found: list[Tensor] = []
    spec, start = None, 0
    for batch in batches:
        size = samples(batch)
        inside = positions[(positions >= start) & (positions < start + size)]
        leaves, spec = tree_flatten(batch)
        if not any(_in_front(leaf, size) for leaf in leaves) or (parts and len(leaves) != len(parts[0])):
            raise UsageError(_NO_SAMPLES)
        parts.append([_rows_of(leaf, inside - start, size) for leaf in leaves])
        found.append(inside)
        start += size
    assert spec is not None, "check_held_out has seen to it"
    if sum(map(len, found)) != len(positions):
        raise UsageError(_OTHER_ROWS)
    back = torch.cat(found).argsort()[positions.argsort().argsort()]
    joined = [_rows_of(_joined(values), back, len(positions)) for values in zip(*parts, strict=True)]
    return tree_unflatten(joined, spec)


def kept_batch(module: Learning, what: str) -> Any:
    """As many held-out rows as may be kept, in a random order, as one batch on the device.

    Args:
        module: attached to a Trainer.
        what: they are for, in a message.

    Raises:
        UsageError: when there are too few, or samples of the batches cannot be told apart.
    """
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]

    def samples(batch: Any) -> int:
        return len(module.inputs(batch))

    count = sum(samples(batch) for batch in data.trust_batches(module.device))
    if count < FEWEST_ROWS:
        raise UsageError(
            f"{count} held-out rows are too few {what}: at least {FEWEST_ROWS} are needed; raise "
            "data.init_args.trust_fraction"
        )
    order = random_bits(1, 0, torch.arange(count), STREAM_TRUST).argsort(stable=True)
    batches = iter(data.trust_batches(module.device))
    first = next(batches)
    return chosen_of(chain([first], batches), order[: min(MOST_ROWS, rows_that_fit(first))], samples)


def part_of(tensors: Any, samples: Tensor, size: int) -> Any:
    """Some samples of whatever holds tensors with ``size`` samples in front, a batch or outputs say."""
    return tree_map(lambda leaf: _rows_of(leaf, samples, size), tensors)


def _rows_of(leaf: Any, rows: Tensor, size: int) -> Any:
    return leaf[rows.to(leaf.device)] if _in_front(leaf, size) else leaf


def _in_front(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.ndim > 0 else first
    if not all(value is first or (isinstance(value, _PLAIN) and value == first) for value in values):
        raise UsageError(_NO_SAMPLES)  # it says something of samples, or it cannot be known that it does not
    return first


def rows_that_fit(batch: Any) -> int:
    """Of how many samples like those of a batch, of one or more, the tensors may be kept."""
    leaves = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim > 0]
    size = max(1, sum(leaf[:1].numel() * leaf.element_size() for leaf in leaves))
    return max(1, MOST_BYTES // size)


def interpolated(distillation: Distillation) -> dict[str, HeldOutInterpolation]:
    """By name of its term, what held-out rows teach."""
    found = {name: term.interpolation for name, term in distillation.terms()}
    return {name: regularizer for name, regularizer in found.items() if regularizer is not None}


def numbers(rows: Mapping[str, HeldOutRows], named: bool) -> dict[str, float]:
    """What is logged of every term at the end of an epoch."""
    return {
        f"trust/{f'{name}/' if named else ''}{key}": value
        for name, of_term in rows.items()
        for key, value in of_term.believed().numbers().items()
    }
