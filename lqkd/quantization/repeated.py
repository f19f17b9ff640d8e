"""Passes of a network over the same batches, again and again, of which only what has changed is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lqkd.quantization.layers import QuantizedLayer

Call = Callable[[nn.Module, Any], Any]
"""How a network is called with a batch."""


class _Seen(Exception):
    """Ends a pass: the layer has been called for the last time."""


class RepeatedPasses:
    """What layers see in a network's passes over the same batches, while one after another is changed for good.

    Layers are asked for in the order in which a pass calls them. A module with quantised layers in it, called once a
    pass, whose layers have all had their turn, gives from then on what it gave, and a pass ends with the last call of
    the layer that is asked for: of a network of N blocks one is computed where whole passes compute N. What is kept
    are the outputs of these modules, of a transformer one hidden state a block and batch.

    Args:
        model: in eval mode, without anything that is drawn anew.
        batches: inputs of it.
        call: how it is called with one of them.
        layers: those that change, by name.

    Attributes:
        order: the names of the layers that the first batch calls, in the order of the last call of each.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> passes = RepeatedPasses(model, [torch.ones(3, 2)], nn.Module.__call__, dict(model.named_children()))
        >>> passes.order
        ['0', '1']
        >>> [x.shape for x in passes.inputs("1")]
        [torch.Size([3, 2])]
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], call: Call, layers: Mapping[str, nn.Module]) -> None:
        self.model, self.batches, self.call, self.layers = model, batches, call, layers
        self._calls: list[Counter[nn.Module]] = []
        """Of every batch, how often a pass calls a module."""
        before: dict[nn.Module, set[str]] = {}
        self.order: list[str] = []
        for batch in batches:
            self._look(batch, before)
        places = {name: place for place, name in enumerate(self.order)}
        self._settled = {
            module: 1 + max((places.get(name, -1) for name in names), default=-1)
            for module, names in before.items()
            if all(calls[module] <= 1 for calls in self._calls)
        }
        """From which place in the order on what a module gives does not change any more."""
        self._kept: dict[tuple[nn.Module, int], Any] = {}

    def _look(self, batch: Any, before: dict[nn.Module, set[str]]) -> None:
        """A whole pass: how often modules are called, and which layers are before the end of each."""
        names = {layer: name for name, layer in self.layers.items()}
        calls, called = Counter[nn.Module](), dict[str, None]()

        def begin(module: nn.Module, _: Any) -> None:
            calls[module] += 1
            if module in names:
                called.pop(names[module], None)
                called[names[module]] = None

        def end(module: nn.Module, *_: Any) -> None:
            before.setdefault(module, set()).update(called)

        watched = [module for module in self.model.modules() if _quantized(module)]
        with _removing() as handles:
            for module in dict.fromkeys([*watched, *self.layers.values()]):
                handles.append(module.register_forward_pre_hook(begin))
            handles += [module.register_forward_hook(end) for module in watched if module is not self.model]
            self.call(self.model, batch)
        if not self._calls:
            self.order = list(called)
        self._calls.append(calls)

    def inputs(self, name: str) -> Iterator[Tensor]:
        """The first argument of every call of a layer, batch by batch; those before it in the order have changed."""
        layer, place, seen = self.layers[name], self.order.index(name), list[Tensor]()
        for number, batch in enumerate(self.batches):
            left = self._calls[number][layer]

            def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                nonlocal left
                seen.append(inputs[0])
                left -= 1
                if left == 0:
                    raise _Seen

            if left == 0:
                continue
            with self._settled_modules(place, number), _removing() as handles:
                handles.append(layer.register_forward_pre_hook(see))
                with suppress(_Seen):
                    self.call(self.model, batch)
            yield from seen
            seen.clear()

    @contextmanager
    def _settled_modules(self, place: int, batch: int) -> Iterator[None]:
        """Inside the block settled modules give what is kept, or what they give is kept."""
        with ExitStack() as stack, _removing() as handles:
            for module, since in self._settled.items():
                if since > place:
                    continue
                if (module, batch) in self._kept:
                    stack.enter_context(_instead(module, partial(_copy_of, self._kept, (module, batch))))
                else:
                    handles.append(module.register_forward_hook(partial(self._keep, batch)))
            yield

    def _keep(self, batch: int, module: nn.Module, _: Any, output: Any) -> None:
        for inner in module.modules():  # which is not called any more
            self._kept.pop((inner, batch), None)
        self._kept[module, batch] = _copied(output)


def _quantized(module: nn.Module) -> bool:
    return any(isinstance(inner, QuantizedLayer) for inner in module.modules())


def _copied(output: Any) -> Any:
    """With tensors of its own: a network may go on to compute in place."""
    return tree_map_only(Tensor, Tensor.clone, output)


def _copy_of(kept: dict[Any, Any], key: Any, *_: Any, **__: Any) -> Any:
    return _copied(kept[key])


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a module computes ``forward``."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


@contextmanager
def _removing() -> Iterator[list[RemovableHandle]]:
    """Hooks that are gone after the block."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
