"""What llama.cpp calls the parts of a network that it can run, and what else a file tells it of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import gguf_llama
from lqkd.models import GPT
from lqkd.models.gpt import GPTBlock

ARCHITECTURE = "gpt2"
"""Learned positions, layer norm with bias before each part, one matrix for query, key and value, GELU by tanh."""
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


def check_known(network: nn.Module) -> nn.Module:
    """``network`` as what llama.cpp has an architecture for.

    Raises:
        UsageError: when it is no such network.
    """
    if gguf_llama.is_llama(network):
        gguf_llama.check(network)
    elif type(network) is not GPT:
        raise UsageError(
            f"--format gguf is not possible for {type(network).__name__}: files are made of lqkd.models.GPT and of "
            "transformers' LlamaForCausalLM"
        )
    return network


def architecture(network: nn.Module) -> str:
    """What llama.cpp calls it."""
    return ARCHITECTURE if isinstance(network, GPT) else gguf_llama.ARCHITECTURE


def vocabulary(network: nn.Module) -> int:
    """The number of its tokens."""
    return len(network.token.weight) if isinstance(network, GPT) else gguf_llama.vocabulary(network)


def sizes(network: GPT) -> Sizes:
    """The sizes of ``network``."""
    tokens, width = network.token.weight.shape
    block = cast(GPTBlock, network.blocks[0])
    context, depth = len(network.position.weight), len(network.blocks)
    return Sizes(tokens, context, width, depth, block.attention.heads, network.norm.eps)


def describe(network: nn.Module, writer: Any) -> None:
    """Write the sizes by llama.cpp's names."""
    if not isinstance(network, GPT):
        gguf_llama.describe(network, writer)
        return
    told = sizes(network)
    writer.add_context_length(told.context)
    writer.add_embedding_length(told.width)
    writer.add_block_count(told.depth)
    writer.add_feed_forward_length(4 * told.width)
    writer.add_head_count(told.heads)
    writer.add_layer_norm_eps(told.epsilon)
    writer.add_vocab_size(told.vocabulary)


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """What the file calls each layer of ``network``, the layer, and the order of its rows there; None for its own.

    A head that is the embedding has no name.
    """
    if not isinstance(network, GPT):
        yield from gguf_llama.layers(network)
        return
    tied = network.head.weight is network.token.weight
    for own, name in _OF_NETWORK.items():
        if not (tied and own == "head"):
            yield name, network.get_submodule(own), None
    for index, block in enumerate(network.blocks):
        for own, name in _OF_BLOCK.items():
            yield f"blk.{index}.{name}", block.get_submodule(own), None
