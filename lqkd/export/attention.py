"""Attention as the layers and products that it consists of, which a file has; PyTorch's is one module."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.quantization.layers import QuantLinear, QuantMultiheadAttention


def take_attention_apart(network: nn.Module) -> None:
    """Exchange every quantised attention for its projections, as quantised layers, and the products between them.

    Args:
        network: changed in place; what it computes stays the same for attention of a sequence to itself.

    Raises:
        UsageError: when an attention has inputs or tokens that a file cannot have.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            continue  # a trace does not look into it
        for child_name, child in list(module.named_children()):
            if isinstance(child, QuantMultiheadAttention):
                setattr(module, child_name, _Apart(child, f"{name}.{child_name}".lstrip(".")))


class _Apart(nn.Module):
    """What :class:`QuantMultiheadAttention` computes for itself: input projection, attention, output projection.

    Args:
        attention: with its quantizers, which are taken over.
        place: its name, for messages.
    """

    def __init__(self, attention: QuantMultiheadAttention, place: str) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise UsageError(
                f"attention {place!r} cannot be exported: its keys and values are of another width than its queries, "
                "or tokens are added to them"
            )
        projection = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, bias=False, device="meta")
        projection.weight = attention.in_proj_weight
        projection.bias = attention.in_proj_bias
        self.place = place
        self.in_proj = QuantLinear.from_float(projection, attention.weight_quantizer, attention.input_quantizer)
        self.out_proj = attention.out_proj
        self.heads, self.width = attention.num_heads, attention.head_dim
        self.batch_first = attention.batch_first
        self.products = attention.products
        self.eval()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if key_padding_mask is not None or attn_mask is not None:
            raise UsageError(f"attention {self.place!r} cannot be exported: it is given a mask")
        if query is not key or key is not value:
            raise UsageError(f"attention {self.place!r} cannot be exported: keys or values are not what queries are of")
        x = query if self.batch_first else query.transpose(0, 1)  # (B, L, E)
        parts = self.in_proj(x).chunk(3, dim=-1)
        q, k, v = self._by_head(parts[0]), self._by_head(parts[1]), self._by_head(parts[2])
        weights = None
        if self.products is not None:
            attended, made = self.products(q, k, v)
            weights = made if need_weights else None
        elif need_weights:
            weights = ((q * self.width**-0.5) @ k.transpose(-2, -1)).softmax(-1)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
