"""A trace that knows sizes: only those of the batch stay open, so that a forward may decide by all others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lqkd.models.calls import Inputs
from lqkd.quantization.graph import Tracer, keep_constants
from lqkd.quantization.products import AttentionProducts

_LOOKED_INTO = ("_patch_merging_pad",)
"""Functions of torchvision that a trace stops at, although it can follow them where sizes are known."""


FEW, MANY = 2, 3
"""The numbers of samples."""


def sized_trace(model: nn.Module, given: Collection[str], example: Inputs) -> fx.Graph:
    """The graph of ``model`` for inputs of the sizes of the example, and any number of them.

    Every operation runs on two and on three samples while it is traced. A size that is the same for both is a number to
    the forward, such as the height that it compares with a window's; one that differs is a node of the graph.

    Args:
        model: a network in eval mode; tensors that its forward makes from nothing become buffers of it.
        given: the names of the arguments that the example gives; those besides have their default.
        example: at least one sample, on the network's device.

    Raises:
        Exception: whatever the network's own forward, copy or the tracer raises.
    """
    count = len(example)
    rows = [torch.tensor([i % count for i in range(samples)]) for samples in (FEW, MANY)]
    tracer = _SizedTracer(given, [_rows(example, chosen) for chosen in rows])
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the compiler takes no call within a trace
        graph = tracer.trace(model)
    for node in tracer.looked_into:  # it is no call of the function that the trace did not stop at
        node.meta.pop("is_wrapped", None)
    keep_constants(tracer, model)
    return graph


def _rows(example: Inputs, chosen: Tensor) -> Inputs:
    return example.map(lambda x: x[chosen.to(x.device)])


class _Sized(fx.Proxy):
    """A stand-in for a value, with the value for two and for three samples.

    Attributes:
        known: both values; ``None`` where they could not be computed.
        by_batch: whether it is a number that depends on the number of samples.
    """

    known: Any = None
    by_batch = False

    @property
    def shape(self) -> Any:
        return self.size()

    @property
    def ndim(self) -> Any:
        return self.dim()

    @property
    def dtype(self) -> Any:
        return self.known[0].dtype if self._is_tensor() else fx.proxy.Attribute(self, "dtype")

    @property
    def device(self) -> Any:
        return self.known[0].device if self._is_tensor() else fx.proxy.Attribute(self, "device")

    def dim(self) -> Any:
        return self.known[0].ndim if self._is_tensor() else self._called("dim")

    def size(self, dim: int | None = None) -> Any:
        if not self._is_tensor():
            return self._called("size", *(() if dim is None else (dim,)))
        if dim is not None:
            return self._length(dim)
        return tuple(self._length(axis) for axis in range(self.known[0].ndim))

    def _length(self, axis: int) -> Any:
        few, many = (value.shape[axis] for value in self.known)
        if few == many:
            return few
        times, rest = divmod(few, FEW)
        if rest or many != times * MANY:
            return self._called("size", axis)
        batch = cast(_SizedTracer, self.tracer).batch()
        return batch if times == 1 else batch * times

    def _is_tensor(self) -> bool:
        return self.known is not None and isinstance(self.known[0], Tensor)

    def _called(self, method: str, *args: Any) -> Any:
        return self.tracer.create_proxy("call_method", method, (self, *args), {})


class _SizedTracer(Tracer):
    def __init__(self, given: Collection[str], examples: list[Inputs]) -> None:
        super().__init__(given)
        names = tuple(given)
        self.examples = [example.by_name(names) for example in examples]
        self.running = False
        self.looked_into: list[fx.Node] = []
        self._first: _Sized | None = None
        self._batch: Any = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, AttentionProducts) and super().is_leaf_module(m, module_qualified_name)

    def _leaves_of(self, root: nn.Module) -> dict[int, nn.Module]:
        return {}  # all modules run

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Sized(node, self)

    def batch(self) -> Any:
        """The number of samples: the size of the first input, since an integer kernel's result may have none."""
        if self._batch is None:
            self._batch = self.create_proxy("call_method", "size", (self._first, 0), {})
        return self._batch

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **keywords: Any
    ) -> Any:
        if kind == "call_function" and getattr(target, "__name__", "") in _LOOKED_INTO:
            result = target(*args, **kwargs)
            self.looked_into.append(result.node)
            return result
        made = cast(_Sized, super().create_proxy(kind, target, args, kwargs, *rest, **keywords))
        self.running = True
        try:
            made.known = (self._value(0, kind, target, args, kwargs), self._value(1, kind, target, args, kwargs))
        except Exception:  # it raises again, with its place, when the graph runs on the example
            made.known = None
        finally:
            self.running = False
        counts = target == "size" or any(isinstance(x, _Sized) and x.by_batch for x in (*args, *kwargs.values()))
        made.by_batch = counts and not made._is_tensor()
        if self._first is None and kind == "placeholder" and made._is_tensor():
            self._first = made
        return made

    def _value(self, which: int, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == "placeholder":
            value = self.examples[which][target]
            return value.clone() if isinstance(value, Tensor) else value
        args, kwargs = (_mapped(given, lambda x: _known(x, which)) for given in (args, kwargs))
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        held: Any = self.root
        for name in target.split("."):
            held = getattr(held, name)
        return held(*args, **kwargs) if kind == "call_module" else held

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        known = getattr(obj, "known", None) if isinstance(obj, _Sized) else None
        if known is not None and not (isinstance(known[0], Tensor) or cast(_Sized, obj).by_batch):
            return bool(known[0])
        return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        known = obj.known if isinstance(obj, _Sized) else None
        if known is not None and len(known[0]) == len(known[1]):
            stand_in: Any = obj
            return iter([stand_in[index] for index in range(len(known[0]))])
        return super().iter(obj)


def _known(value: Any, which: int) -> Any:
    if isinstance(value, fx.proxy.Attribute):
        return getattr(_known(value.root, which), value.attr)
    if not isinstance(value, _Sized):
        return value
    if value.known is None:
        raise LookupError("not known")
    return value.known[which]


def _mapped(given: Any, change: Callable[[Any], Any]) -> Any:
    """``given`` with every stand-in exchanged, in tuples, lists, dicts and slices."""
    if isinstance(given, fx.Proxy):
        return change(given)
    if isinstance(given, tuple | list):
        return type(given)(_mapped(x, change) for x in given)
    if isinstance(given, dict):
        return {key: _mapped(x, change) for key, x in given.items()}
    if isinstance(given, slice):
        return slice(*(_mapped(x, change) for x in (given.start, given.stop, given.step)))
    return given
