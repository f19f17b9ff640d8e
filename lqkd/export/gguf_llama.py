"""Networks of Llama's kind by Hugging Face, as llama.cpp knows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.hugging_face import causal_lm

ARCHITECTURE = "llama"
"""Rotary positions, RMS norm before each part, grouped queries, SwiGLU."""
_CLASS = "LlamaForCausalLM"


def is_llama(network: nn.Module) -> bool:
    """Whether it is of transformers' class, whose layers may be quantised."""
    return type(network).__name__ == _CLASS and type(network).__module__.startswith("transformers.")


def check(network: Any) -> None:
    """Refuse what llama.cpp's architecture does not compute.

    Raises:
        UsageError: then.
    """
    config = network.config
    rotary = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotary != "default":
        raise UsageError(f"--format gguf is not possible for rotary positions of type {rotary!r}: of 'default' alone")
    if config.hidden_act != "silu":
        raise UsageError(f"--format gguf is not possible for hidden_act={config.hidden_act!r}: llama.cpp has silu")


def layers(network: Any) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """What the file calls each layer, the layer, and the order of its rows in the file where that is another."""
    import gguf

    config = network.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = network.lm_head.weight is network.model.embed_tokens.weight
    for place, layer in network.named_modules():
        if not isinstance(getattr(layer, "weight", None), Tensor) or (tied and layer is network.lm_head):
            continue
        name = names.get_name(place)
        if name is None:
            raise UsageError(f"--format gguf is not possible: llama.cpp has no name for {place} of a {_CLASS}")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(place.split(".")[-1])
        yield name, layer, None if heads is None else _interleaved(len(layer.weight), heads)


def _interleaved(rows: int, heads: int) -> Tensor:
    """The rows of queries or keys as llama.cpp wants them (N,), int64.

    It turns pairs of neighbours, where transformers turns the first half of a head with the second: row ``2 i + j`` of
    a head is there row ``j d / 2 + i``, as its converter's ``permute`` says.
    """
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).flatten()


def vocabulary(network: Any) -> int:
    """The number of tokens."""
    return len(network.model.embed_tokens.weight)


def describe(network: Any, writer: Any) -> None:
    """Write the sizes."""
    config = network.config
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary(network))


def read(path: str | Path) -> nn.Module:
    """The network of a file, by transformers' own reader."""
    return causal_lm(str(path))
