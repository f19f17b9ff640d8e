"""Keys and values of attention in few bits, as a runtime that keeps them so computes with them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.quantizers.dynamic import Dynamic


class RoundedCache(nn.Module):
    """A language model of transformers whose keys and values are kept in 2 to 8 bits, to measure what that costs.

    Each key and each value (a vector of one head and token, after rotary positions) is rounded to a grid of its own
    from its least to its largest number, as :class:`~lqkd.quantization.quantizers.dynamic.Dynamic` has it with a zero
    point; queries and sums stay in float. It is for evaluation: nothing of it is trained, and a text is read at once.

    Args:
        network: (B, T) tokens to what transformers returns; it is not changed.
        bits: 2 to 8.

    Raises:
        UsageError: when the number of bits is not possible, or the network keeps no keys and values.

    Examples:
        >>> import torch, transformers
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        >>> tokens = torch.arange(12)[None]
        >>> with torch.no_grad():
        ...     exact, rounded = network(tokens).logits, RoundedCache(network, 8)(tokens).logits
        >>> bool(0 < (exact - rounded).abs().max() < 0.01 * exact.abs().max())
        True
    """

    def __init__(self, network: nn.Module, bits: int) -> None:
        super().__init__()
        taken = inspect.signature(network.forward).parameters
        self._kept = next((name for name in ("cache", "past_key_values") if name in taken), None)
        if self._kept is None or not hasattr(network, "config"):
            raise UsageError(
                f"keys and values of {type(network).__name__} cannot be rounded: a network of transformers that keeps "
                "them is needed"
            )
        self.network, self.grid = network, Dynamic(bits, batched=True, symmetric=False)

    def forward(self, tokens: Tensor) -> Any:
        return self.network(tokens, use_cache=True, **{str(self._kept): _cache(self.grid)})


def _cache(grid: Dynamic) -> Any:
    """An empty cache of transformers that hands out what it is given on the grid."""
    from transformers import DynamicCache

    class Rounded(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            return super().update(grid(key_states), grid(value_states), layer_idx, *args, **kwargs)

    return Rounded()
