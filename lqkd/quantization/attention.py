"""Attentions of a network, whoever wrote them, and grids for what they multiply."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lqkd.errors import UsageError
from lqkd.quantization.layers import QuantMultiheadAttention
from lqkd.quantization.products import AttentionProducts
from lqkd.quantization.recipe import FLOAT_BITS, Recipe, attention_quantizer, resolve_attentions

_CALLED = ("scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS")
"""What the forward of an attention names: PyTorch's function, or the table in which transformers looks it up."""
_FUSED = "sdpa"
"""What transformers calls PyTorch's function."""


@dataclass(frozen=True)
class QuantizedProducts:
    """The products of one attention.

    Attributes:
        where: name of the attention; empty for the network itself.
        bits: of queries, keys, values and the softmax.

    Examples:
        >>> print(QuantizedProducts("blocks.0.attn", 8))
        products of attention at blocks.0.attn with 8 bits
    """

    where: str
    bits: int

    def __str__(self) -> str:
        return f"products of attention at {self.where or 'the top level'} with {self.bits} bits"


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention of ``model`` whose products can be quantised, by its name.

    These are quantised ``nn.MultiheadAttention``, torchvision's attention in shifted windows, and whatever module
    calls ``scaled_dot_product_attention`` in its own forward, directly or by transformers' table: timm's, most of
    transformers', :class:`lqkd.models.GPT`'s.
    """
    return {name: module for name, module in model.named_modules() if _is_attention(module)}


def quantize_attentions(model: nn.Module, recipe: Recipe) -> None:
    """Give the products of attentions quantizers of as many bits as the recipe says, in place.

    The forward of an attention stays as it is: where it calls PyTorch's fused function, its child ``products``
    (:class:`~lqkd.quantization.products.AttentionProducts`) computes instead. Those that have it are left alone.

    Args:
        model: a network with quantised layers.
        recipe: nothing is done where it has no ``attention_bits``.

    Raises:
        UsageError: when there is no attention, a rule matches none, one computes by another function than PyTorch's,
            or a number of bits or the quantizer is not possible.
    """
    found = attentions(model)
    settings = resolve_attentions(recipe, {name: attention_kind(module) for name, module in found.items()})
    for name, bits in settings.items():
        module = found[name]
        if bits == FLOAT_BITS or products_of(module) is not None:
            continue
        _check_fused(name, module)
        quantizers = [
            attention_quantizer(recipe, f"{what} of attention {name!r}", bits, signed)
            for what, signed in (("queries", True), ("keys", True), ("values", True), ("softmax", False))
        ]
        products = AttentionProducts(*quantizers).train(module.training)
        module.register_module("products", products.to(_device(module, model)))
        if not isinstance(module, QuantMultiheadAttention) and not _is_windows(module):
            module.__class__ = quantized_attention(cast(Hashable, type(module)))
            if hasattr(module, "fused_attn"):  # timm's, which would write the same out otherwise
                cast(Any, module).fused_attn = True


def quantized_products(model: nn.Module) -> tuple[QuantizedProducts, ...]:
    """The attentions of ``model`` whose products are quantised."""
    found = []
    for name, module in model.named_modules():
        products = products_of(module)
        if products is not None and products.query_quantizer is not None:
            found.append(QuantizedProducts(name, products.query_quantizer.bits))
    return tuple(found)


def products_of(module: nn.Module) -> AttentionProducts | None:
    """What computes the products of an attention on grids; None in floating point."""
    held = module._modules.get("products")
    return held if isinstance(held, AttentionProducts) else None


def attention_kind(module: nn.Module) -> str:
    """The class name of an attention, the same before and after it is quantised."""
    return getattr(type(module), "float_class", type(module)).__name__.removeprefix("Quant")


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, QuantMultiheadAttention) or _is_windows(module):
        return True
    return not isinstance(module, nn.MultiheadAttention | AttentionProducts) and any(
        name in _CALLED for kind in type(module).__mro__ for name in _names(kind)
    )


def _is_windows(module: nn.Module) -> bool:
    return getattr(module, "calls_layers", False)  # lqkd.quantization.windows, which would import torchvision


def _names(kind: type) -> tuple[str, ...]:
    """The names that the forward of a class reads."""
    forward = inspect.unwrap(kind.__dict__["forward"]) if "forward" in kind.__dict__ else None
    code = getattr(forward, "__code__", None)
    return () if code is None else code.co_names


def _check_fused(name: str, module: nn.Module) -> None:
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", _FUSED)
    if chosen != _FUSED:
        raise UsageError(
            f"attention_bits of {name!r} is not possible: transformers computes it by {chosen!r}; load the network "
            f"with attn_implementation={_FUSED!r}"
        )


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    parameters = (parameter for owner in (module, model) for parameter in owner.parameters())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


class _Exchanged(TorchFunctionMode):
    """Calls ``products`` where PyTorch's fused attention is called, also in a trace and in what is compiled."""

    def __init__(self, products: AttentionProducts) -> None:
        super().__init__()
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.products(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


class QuantizedAttention(nn.Module):
    """An attention of a class that lqkd does not know, with products on grids; see :func:`quantized_attention`."""

    float_class: type[nn.Module]
    products: AttentionProducts

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that pickle cannot find it by name.
        return _new_attention, (self.float_class,), self.__dict__


@cache  # one class for all attentions of a class, so that copies have the type of the original
def quantized_attention(float_class: Any) -> type[QuantizedAttention]:
    """The class of an attention with products on grids, derived from its own."""

    @wraps(float_class.forward)  # whose arguments a trace asks for
    def forward(self: QuantizedAttention, *args: Any, **kwargs: Any) -> Any:
        with _Exchanged(self.products):
            return float_class.forward(self, *args, **kwargs)

    attributes = {"float_class": float_class, "forward": forward, "__doc__": float_class.__doc__}
    return type(f"Quant{float_class.__name__}", (QuantizedAttention, float_class), attributes)


def _new_attention(float_class: type[nn.Module]) -> nn.Module:
    kind = quantized_attention(cast(Hashable, float_class))
    return kind.__new__(kind)
