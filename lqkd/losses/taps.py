"""Reading the outputs of modules inside of a network, without changing it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from lqkd.errors import UsageError


class Seen(NamedTuple):
    """What is known of one pass of a network."""

    output: Any
    """What the task makes of its outputs: logits (B, C), say."""
    features: Mapping[str, Tensor]
    """(B, ...) outputs of its tapped modules, by their names."""


class Taps:
    """The outputs of the named modules of ``network``.

    Args:
        network: any network.
        paths: names of modules, as :meth:`torch.nn.Module.named_modules` gives them.
        owner: what to call the network in messages.

    Raises:
        UsageError: when a module does not exist; names that are near are listed.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str], owner: str) -> None:
        names = [name for name, _ in network.named_modules(remove_duplicate=False)]
        for path in paths:
            if path not in names or path == "":
                near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or names[1:4]
                raise UsageError(f"tap {path!r} does not exist in the {owner}: near names are {', '.join(near)}")
        self.network, self.paths, self.owner = network, tuple(paths), owner

    @contextmanager
    def recording(self, network: nn.Module | None = None) -> Iterator[list[Tensor]]:
        """Inside the block forward passes fill the list that is yielded: after the block it has one tensor a tap.

        Hooks live as long as the block: copies and pickles of the network never meet them.

        Args:
            network: a copy that runs in the network's place and has modules of the same names; None for the network.

        Raises:
            UsageError: at the end of the block, when a module was not called exactly once or returned no tensor.
        """
        seen: list[list[Any]] = [[] for _ in self.paths]
        outputs: list[Tensor] = []
        handles = [
            (network or self.network)
            .get_submodule(path)
            .register_forward_hook(lambda module, inputs, output, index=index: seen[index].append(_kept(output)))
            for index, path in enumerate(self.paths)
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()
        for path, found in zip(self.paths, seen, strict=True):
            if len(found) != 1:
                raise UsageError(
                    f"tap {path!r} of the {self.owner} was called {len(found)} times in one pass: choose a module that "
                    "is called once"
                )
            if not isinstance(found[0], Tensor):
                raise UsageError(
                    f"tap {path!r} of the {self.owner} returns a {type(found[0]).__name__}: choose a module that "
                    "returns a tensor"
                )
            outputs.append(found[0])


def _kept(output: Any) -> Any:
    """A copy: what follows may work in place, as the ReLU of torchvision's networks does."""
    return output.clone() if isinstance(output, Tensor) else output
