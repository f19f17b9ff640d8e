"""A small GPT for texts of bytes or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lqkd.errors import UsageError


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every token to itself and those before it, on (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, width / heads)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GPTBlock(nn.Module):
    """Attention and a perceptron of four times the width, each after a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, gelu: str) -> None:
        super().__init__()
        self.recomputes = False  # activations in the backward pass
        self.gelu = "tanh" if gelu == "tanh" else "none"  # as PyTorch says it
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and self.training and torch.is_grad_enabled():
            found: Tensor = checkpoint(self._computed, x, use_reentrant=False)
            return found
        return self._computed(x)

    def _computed(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x)), approximate=self.gelu))


class GPT(nn.Module):
    """A decoder with learned positions and layer norm before each part (Radford et al. 2019, "GPT-2", section 2.3).

    Input (B, T) int64 tokens with T <= context, output (B, T, vocabulary) logits of the token that follows each.

    Args:
        vocabulary: number of tokens; 256 for bytes.
        context: the longest text, in tokens.
        width: of the hidden state.
        depth: number of blocks.
        heads: of the attention, a divisor of ``width``.
        gelu: ``exact``, or ``tanh``, the approximation that GPT-2 was trained with and llama.cpp computes (Hendrycks
            and Gimpel, arXiv 1606.08415, section 2).

    Raises:
        UsageError: when a number is less than 1, ``heads`` does not divide ``width``, or there is no such ``gelu``.

    Examples:
        >>> import torch
        >>> GPT(context=16, width=8, depth=1, heads=2)(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 256])
    """

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 128,
        width: int = 96,
        depth: int = 3,
        heads: int = 4,
        gelu: str = "exact",
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "width": width, "depth": depth, "heads": heads}
        for name, value in sizes.items():
            if value < 1:
                raise UsageError(f"{name}={value} is not possible: it must be at least 1")
        if width % heads:
            raise UsageError(f"heads={heads} is not possible: it must divide width={width}")
        if gelu not in ("exact", "tanh"):
            raise UsageError(f"gelu={gelu!r} is not possible: it is exact or tanh")
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads, gelu) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        # GPT-2's start: small, and smaller where a block adds to the shortcut.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                added = name.endswith(("attention.out.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if added else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compute what is inside of a block again in the backward pass, as transformers' networks do by this name.

        Args:
            gradient_checkpointing_kwargs: nothing but ``use_reentrant: False``, which is what is done.
        """
        assert not (gradient_checkpointing_kwargs or {}).get("use_reentrant")
        for block in self.blocks:
            assert isinstance(block, GPTBlock)
            block.recomputes = True

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.ones_like(tokens[:1]).cumsum(1) - 1  # (1, T): 0, 1, ...
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places))))
