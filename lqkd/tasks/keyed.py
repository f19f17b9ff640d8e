"""The classification of batches that are dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lqkd.errors import UsageError
from lqkd.tasks.classification import Classification
from lqkd.tasks.labels import Samples, samples_of


class KeyedClassification(Classification):
    """The classification of batches that are dicts, such as those of Hugging Face's data sets and collators.

    Args:
        labels: key of the labels, (B,) or (B, 1) of any integer type, negative where a sample has none. A batch
            without it has no labels.
        inputs: keys of what networks are called with, in their order.
        by_name: whether they are keyword arguments of the networks; otherwise arguments by place.
        settings: those of :class:`Classification`.

    Raises:
        UsageError: when an argument is not possible.

    Examples:
        >>> import torch
        >>> task = KeyedClassification(labels="label", inputs=["pixel_values"])
        >>> batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 1]), "id": ["a", "b"]}
        >>> list(task.inputs(batch)), task.samples(batch).labels
        (['pixel_values'], tensor([0, 1]))
    """

    def __init__(
        self, labels: str = "labels", inputs: Sequence[str] = ("pixel_values",), by_name: bool = True, **settings: Any
    ) -> None:
        super().__init__(**settings)
        if not inputs:
            raise UsageError("inputs=[] is not possible: name the keys of what networks are called with")
        if labels in inputs:
            raise UsageError(f"labels={labels!r} is not possible: it is one of the inputs {list(inputs)}")
        self.labels, self.keys, self.by_name = labels, tuple(inputs), by_name

    def inputs(self, batch: Any) -> Any:
        """A dict of keyword arguments, or a tuple of arguments."""
        found = {key: self._value(batch, key) for key in self.keys}
        return found if self.by_name else tuple(found.values())

    def samples(self, batch: Any) -> Samples:
        """The first input, and the labels.

        Raises:
            UsageError: when the batch is no dict with these keys.
        """
        first: Tensor = self._value(batch, self.keys[0])
        return samples_of((first, batch[self.labels]) if self.labels in batch else first)

    def part(self, batch: Any, samples: slice) -> Any:
        return {key: value[samples] for key, value in batch.items() if isinstance(value, Tensor)}

    def _value(self, batch: Any, key: str) -> Any:
        if not isinstance(batch, Mapping):
            raise UsageError(f"a batch of the data is a {type(batch).__name__}: a dict with {key!r} is needed")
        if key not in batch:
            raise UsageError(f"a batch of the data has no {key!r}, but {', '.join(map(repr, batch))}")
        return batch[key]
