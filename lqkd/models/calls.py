"""How a network is called: with tensors, with keyword arguments, with several of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a network is called with for a batch, ``network(*args, **keywords)``; tensors have a batch axis in front."""

    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> Inputs:
        """A tensor, a tuple or list of arguments, or a mapping of keyword arguments as inputs.

        Raises:
            UsageError: when it is none of them, or no tensor (B, ...) with B >= 1 is among them.
        """
        if isinstance(given, Inputs):
            found = given
        elif isinstance(given, Mapping):
            found = cls((), dict(given))
        elif isinstance(given, (tuple, list)):
            found = cls(tuple(given))
        elif isinstance(given, Tensor):
            found = cls((given,))
        else:
            raise UsageError(
                f"the task's inputs() returns a {type(given).__name__}: a tensor, a tuple of arguments or a dict of "
                "keyword arguments is needed"
            )
        if not any(tensor.ndim > 0 and len(tensor) > 0 for tensor in found.tensors()):
            raise UsageError("the task's inputs() returns no tensor (B, ...) with at least one sample")
        return found

    @classmethod
    def joined(cls, parts: Sequence[Inputs]) -> Inputs:
        """The samples of several batches as one; what is no tensor is that of the first."""
        first = parts[0]

        def joined(values: Sequence[Any]) -> Any:
            return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].ndim > 0 else values[0]

        return cls(
            tuple(map(joined, zip(*(part.args for part in parts), strict=True))),
            {key: joined([part.keywords[key] for part in parts]) for key in first.keywords},
        )

    def by_name(self, names: Sequence[str]) -> dict[str, Any]:
        """Every value by the name of its parameter, of which the arguments are the first."""
        values = (*self.args, *(self.keywords[name] for name in names[len(self.args) :]))
        return dict(zip(names, values, strict=True))

    def call(self, network: Callable[..., Any]) -> Any:
        """What ``network`` returns for them."""
        return network(*self.args, **self.keywords)

    def tensors(self) -> list[Tensor]:
        """All tensors among them, in order."""
        return [value for value in (*self.args, *self.keywords.values()) if isinstance(value, Tensor)]

    def alone(self) -> Tensor | None:
        """The tensor where a network is called with one alone, without a keyword; None otherwise."""
        single = len(self.args) == 1 and not self.keywords and isinstance(self.args[0], Tensor)
        return self.args[0] if single else None

    def __len__(self) -> int:
        """Samples of the batch."""
        return len(next(tensor for tensor in self.tensors() if tensor.ndim > 0))

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With ``change`` of every tensor in its place."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return Inputs(tuple(map(changed, self.args)), {key: changed(value) for key, value in self.keywords.items()})

    def part(self, samples: slice) -> Inputs:
        """Those of some samples: tensors (B, ...) are cut, everything else stays."""
        size = len(self)
        return self.map(lambda tensor: tensor[samples] if tensor.ndim > 0 and len(tensor) == size else tensor)

    def fit(self, network: nn.Module) -> Inputs:
        """With float64, which loaders of NumPy arrays yield, turned into what ``network`` computes in."""
        if all(tensor.dtype != torch.float64 for tensor in self.tensors()):
            return self
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        return self.map(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float64 else tensor)

    def described(self) -> str:
        """For a message, without the batch axis: ``images of 3x32x32``, ``int64 inputs of 128``, or tensors by name."""
        image = self.alone()
        if image is not None:
            return _kind(image) + f"{'images' if image.ndim > 2 else 'inputs'} of {_shape(image)}"
        named = [*enumerate(self.args, 1), *self.keywords.items()]
        told = [f"{name} {_kind(of)}of {_shape(of)}" for name, of in named if isinstance(of, Tensor)]
        return f"inputs ({', '.join(told)})"


def dtype_name(tensor: Tensor) -> str:
    """``float32``, ``uint8``, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def _kind(tensor: Tensor) -> str:
    return "" if tensor.dtype == torch.float32 else f"{dtype_name(tensor)} "


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape[1:]))
