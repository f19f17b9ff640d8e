"""The two products of attention on grids: of queries and keys, and of what a softmax makes of these and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.quantization.quantizers import Quantizer

_UNSEEN = -3e4
"""Is added to the score of a key that is not seen: of any type of numbers, and its exponential is zero."""


class AttentionProducts(nn.Module):
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, equation 1) whose operands are on grids.

    ``softmax(scale * q k^T + mask) v`` with ``q``, ``k``, ``v`` and the softmax each on a grid of its own, as I-BERT
    (Kim et al., arXiv 2101.01321, figure 1) and FQ-ViT (Lin et al., arXiv 2111.13824) have it. The scale is a factor of
    the sums, so that both products are of whole numbers. The softmax is in floating point.

    Args:
        query_quantizer, key_quantizer, value_quantizer: of the operands, with both signs.
        weights_quantizer: of the softmax, which has no negative values.

    Examples:
        >>> from lqkd.quantization import LSQ
        >>> products = AttentionProducts(*(LSQ(8, signed=True) for _ in range(3)), LSQ(8, signed=False))
        >>> q, k, v = torch.randn(3, 2, 4, 5, 8)  # (B, heads, L, width) each
        >>> attended, weights = products(q, k, v)
        >>> attended.shape, weights.shape
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 4, 5, 5]))
    """

    query_quantizer: Quantizer | None
    key_quantizer: Quantizer | None
    value_quantizer: Quantizer | None
    weights_quantizer: Quantizer | None

    def __init__(
        self,
        query_quantizer: Quantizer,
        key_quantizer: Quantizer,
        value_quantizer: Quantizer,
        weights_quantizer: Quantizer,
    ) -> None:
        super().__init__()
        self.query_quantizer = query_quantizer
        self.key_quantizer = key_quantizer
        self.value_quantizer = value_quantizer
        self.weights_quantizer = weights_quantizer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Values weighed (..., L, E) and their weights (..., L, S); arguments as of PyTorch's function.

        Args:
            query, key, value: (..., L, D), (..., S, D) and (..., S, E).
            attn_mask: that broadcasts to (..., L, S): true where keys are seen, or real numbers to add to the scores.
            dropout_p: of the weights.
            is_causal: whether no query sees a later key.
            scale: of the scores; ``D ** -0.5`` where it is None.
            enable_gqa: whether several heads of queries share one of keys and values.
        """
        if enable_gqa:
            heads = query.shape[-3]
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        scores = self.scores(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            later = torch.full((query.shape[-2], key.shape[-2]), _UNSEEN, dtype=query.dtype, device=query.device)
            scores = scores + later.triu(1)
        seen = None
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            seen = attn_mask.to(query.dtype)
            scores = scores + (1.0 - seen) * _UNSEEN
        elif attn_mask is not None:
            scores = scores + attn_mask.clamp(min=_UNSEEN)
        weights = scores.softmax(-1)
        return self.weighed(weights if seen is None else weights * seen, value, dropout_p)  # where nothing is seen: 0

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """The products of each query with each key, (..., L, S), without a scale."""
        return _on(self.query_quantizer, query) @ _on(self.key_quantizer, key).transpose(-2, -1)

    def weighed(self, weights: Tensor, value: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
        """The sums of values (..., L, E), and the weights on their grid, of which some are zero in training."""
        weights = F.dropout(_on(self.weights_quantizer, weights), dropout_p)
        return weights @ _on(self.value_quantizer, value), weights


OPERANDS = ("query_quantizer", "key_quantizer", "value_quantizer", "weights_quantizer")
"""What the quantizers of :class:`AttentionProducts` are called."""


def _on(quantizer: Quantizer | None, x: Tensor) -> Any:
    return x if quantizer is None else quantizer(x)
