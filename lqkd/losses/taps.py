"""Reading the outputs of modules inside of a network, without changing it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
        self._held: list[tuple[nn.Module, _Pass, list[RemovableHandle]]] = []

    def hold(self, network: nn.Module | None = None) -> None:
        """Leave the hooks in ``network`` until :meth:`release`, for one that is compiled, whose graph has them in it.

        Outside of :meth:`recording` they do nothing, neither there nor in a copy.

        Args:
            network: as of :meth:`recording`.
        """
        network = network or self.network
        if self._held_in(network) is None:
            self._held.append((network, *self._hooked(network)))

    def _held_in(self, network: nn.Module) -> tuple[_Pass, list[RemovableHandle]] | None:
        return next(((seen, handles) for of, seen, handles in self._held if of is network), None)

    def release(self) -> None:
        """End :meth:`hold` for all networks."""
        for _, _, handles in self._held:
            for handle in handles:
                handle.remove()
        self._held = []

    def _hooked(self, network: nn.Module) -> tuple[_Pass, list[RemovableHandle]]:
        seen = _Pass([])
        modules = [network.get_submodule(path) for path in self.paths]
        return seen, [module.register_forward_hook(_Look(seen, place)) for place, module in enumerate(modules)]

    @contextmanager
    def recording(self, network: nn.Module | None = None) -> Iterator[list[Tensor]]:
        """Inside the block forward passes fill the list that is yielded: after the block it has one tensor a tap.

        Hooks live as long as the block: copies and pickles of the network never meet them, but for those of
        :meth:`hold`.

        Args:
            network: a copy that runs in the network's place and has modules of the same names; None for the network.

        Raises:
            UsageError: at the end of the block, when a module was not called exactly once or returned no tensor.
        """
        network = network or self.network
        held = self._held_in(network)
        seen, handles = held or self._hooked(network)
        found_at = seen.found = [[] for _ in self.paths]
        outputs: list[Tensor] = []
        try:
            yield outputs
        finally:
            seen.found = []
            if not held:
                for handle in handles:
                    handle.remove()
        for path, found in zip(self.paths, found_at, strict=True):
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


@dataclass
class _Pass:
    """What hooks have seen of a pass that is recorded, by tap; nothing outside of one."""

    found: list[list[Any]]


@dataclass
class _Look:
    """A forward hook; no closure, so that a network which has it can be pickled."""

    seen: _Pass
    place: int

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.seen.found:
            self.seen.found[self.place].append(_kept(output))


def _kept(output: Any) -> Any:
    """A copy: what follows may work in place, as the ReLU of torchvision's networks does."""
    return output.clone() if isinstance(output, Tensor) else output
