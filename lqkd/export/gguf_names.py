"""What llama.cpp calls the parts of a network that it can run, and what else a file tells it of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn

from lqkd.errors import UsageError
from lqkd.models import GPT
from lqkd.models.gpt import GPTBlock

ARCHITECTURE = "gpt2"
"""Learned positions, layer norm with bias before each part, one matrix for query, key and value, GELU by tanh."""
BYTES = 256
"""Tokens of a text of bytes."""
_OF_BLOCK = {
    "norm1": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.out": "attn_output",
    "norm2": "ffn_norm",
    "expand": "ffn_up",
    "contract": "ffn_down",
}
_OF_NETWORK = {"token": "token_embd", "position": "position_embd", "norm": "output_norm", "head": "output"}


@dataclass(frozen=True)
class Sizes:
    """What a file tells about a network beside its tensors: the arguments of :class:`~lqkd.models.GPT`."""

    vocabulary: int
    context: int
    width: int
    depth: int
    heads: int
    epsilon: float
    """Of the layer norms."""


def check_known(network: nn.Module) -> GPT:
    """``network`` as what llama.cpp has an architecture for.

    Raises:
        UsageError: when it is no such network.
    """
    if type(network) is not GPT:
        raise UsageError(
            f"--format gguf is not possible for {type(network).__name__}: of the networks here llama.cpp has an "
            "architecture for lqkd.models.GPT alone"
        )
    return network


def sizes(network: GPT) -> Sizes:
    """The sizes of ``network``."""
    vocabulary, width = network.token.weight.shape
    block = cast(GPTBlock, network.blocks[0])
    context, depth = len(network.position.weight), len(network.blocks)
    return Sizes(vocabulary, context, width, depth, block.attention.heads, network.norm.eps)


def layers(network: GPT) -> Iterator[tuple[str, nn.Module]]:
    """What the file calls each layer of ``network``, and the layer; a head that is the embedding has no name."""
    tied = network.head.weight is network.token.weight
    for own, name in _OF_NETWORK.items():
        if not (tied and own == "head"):
            yield name, network.get_submodule(own)
    for index, block in enumerate(network.blocks):
        for own, name in _OF_BLOCK.items():
            yield f"blk.{index}.{name}", block.get_submodule(own)


def byte_tokens() -> list[str]:
    """The 256 bytes as the tokenizer of GPT-2 writes them (Radford et al. 2019, section 2.2): printable ones of Latin-1
    as themselves, the others as the characters from 256 on, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(BYTES + others.index(byte)) for byte in range(BYTES)]
