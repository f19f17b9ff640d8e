"""Language models as graphs of ONNX: what they compute between their layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import nn

from lqkd.errors import UsageError
from lqkd.export import gguf_llama
from lqkd.export.nbits_graph import Graph
from lqkd.models import GPT

_FIXED = ("default", "linear", "llama3", "yarn")
"""Rotary positions whose frequencies do not depend on the length of a text."""


def is_known(network: nn.Module) -> bool:
    """Whether it is of a class that graphs are made of."""
    return type(network) is GPT or gguf_llama.is_llama(network)


def check_known(network: nn.Module) -> None:
    """Refuse a network that a graph would compute otherwise, or not at all.

    Raises:
        UsageError: then.
    """
    if not is_known(network):
        raise UsageError(
            f"--format nbits is not possible for {type(network).__name__}: files are made of lqkd.models.GPT and of "
            "transformers' LlamaForCausalLM"
        )
    config: Any = getattr(network, "config", None)
    if config is None:
        return
    rotary = config.rope_parameters.get("rope_type", "default")
    if rotary not in _FIXED:
        raise UsageError(
            f"--format nbits is not possible for rotary positions of type {rotary!r}: of {', '.join(_FIXED)} alone"
        )
    if config.hidden_act != "silu":
        raise UsageError(f"--format nbits is not possible for hidden_act={config.hidden_act!r}: silu is")


def known_sizes(network: Any) -> tuple[int, int]:
    """How many tokens there are, and the longest text, of a network that is known."""
    if type(network) is GPT:
        return len(network.token.weight), len(network.position.weight)
    return gguf_llama.vocabulary(network), network.config.max_position_embeddings


def logits(graph: Graph, tokens: str, network: nn.Module) -> str:
    """The logits (B, T, V) of tokens (B, T) of a network that is known."""
    return _gpt(graph, tokens, network) if type(network) is GPT else _llama(graph, tokens, network)


def _gpt(graph: Graph, tokens: str, network: Any) -> str:
    x = graph.embedding(tokens, network.token, "token")
    positions = graph("Unsqueeze", _positions(graph, tokens), graph.axes(0))  # (1, T)
    x = graph("Add", x, graph.embedding(positions, network.position, "position"))
    allowed = _causal(graph, tokens)
    width, heads = network.token.weight.shape[1], network.blocks[0].attention.heads
    for index, block in enumerate(network.blocks):
        name = f"blocks.{index}"
        joined = graph.linear(
            _layer_norm(graph, x, block.norm1, f"{name}.norm1"), block.attention.qkv, f"{name}.attention.qkv"
        )
        parts = graph("Split", joined, graph.axes(width, width, width), results=3, axis=-1)
        q, k, v = (_by_head(graph, part, heads, width // heads) for part in parts)
        k = graph("Transpose", k, perm=[0, 1, 3, 2])
        mixed = _together(graph, _attend(graph, q, k, v, width // heads, allowed), width)
        x = graph("Add", x, graph.linear(mixed, block.attention.out, f"{name}.attention.out"))
        wide = graph.linear(_layer_norm(graph, x, block.norm2, f"{name}.norm2"), block.expand, f"{name}.expand")
        wide = graph("Gelu", wide, approximate=block.gelu)
        x = graph("Add", x, graph.linear(wide, block.contract, f"{name}.contract"))
    return graph.linear(_layer_norm(graph, x, network.norm, "norm"), network.head, "head")


def _llama(graph: Graph, tokens: str, network: Any) -> str:
    config, model = network.config, network.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = model.layers[0].self_attn.head_dim
    x = graph.embedding(tokens, model.embed_tokens, "model.embed_tokens")
    cosine, sine = _rotary(graph, _positions(graph, tokens), model.rotary_emb)
    allowed = _causal(graph, tokens)
    for index, layer in enumerate(model.layers):
        name, attention, mlp = f"model.layers.{index}", layer.self_attn, layer.mlp
        seen = _rms_norm(graph, x, layer.input_layernorm, f"{name}.input_layernorm")
        q, k, v = (
            _by_head(graph, graph.linear(seen, getattr(attention, part), f"{name}.self_attn.{part}"), count, size)
            for part, count in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
        )
        q, k = (_rotated(graph, part, cosine, sine, size) for part in (q, k))
        q = graph.reshape(q, 0, groups, heads // groups, -1, size)  # (B, groups, heads of a group, T, size)
        k, v = (graph("Unsqueeze", part, graph.axes(2)) for part in (graph("Transpose", k, perm=[0, 1, 3, 2]), v))
        mixed = graph.reshape(_attend(graph, q, k, v, size, allowed), 0, heads, -1, size)
        mixed = _together(graph, mixed, heads * size)
        x = graph("Add", x, graph.linear(mixed, attention.o_proj, f"{name}.self_attn.o_proj"))
        seen = _rms_norm(graph, x, layer.post_attention_layernorm, f"{name}.post_attention_layernorm")
        gate = graph.linear(seen, mlp.gate_proj, f"{name}.mlp.gate_proj")
        gate = graph("Mul", gate, graph("Sigmoid", gate))
        wide = graph("Mul", gate, graph.linear(seen, mlp.up_proj, f"{name}.mlp.up_proj"))
        x = graph("Add", x, graph.linear(wide, mlp.down_proj, f"{name}.mlp.down_proj"))
    return graph.linear(_rms_norm(graph, x, model.norm, "model.norm"), network.lm_head, "lm_head")


def _positions(graph: Graph, tokens: str) -> str:
    """(T,) int64: 0, 1, ..."""
    length = graph("Squeeze", graph("Shape", tokens, start=1, end=2))
    zero, one = (graph.hold(f"int_{value}", np.array(value, np.int64)) for value in (0, 1))
    return str(graph("Range", zero, length, one))


def _causal(graph: Graph, tokens: str) -> str:
    """(T, T) whether the token of the column may be seen from that of the row."""
    places = _positions(graph, tokens)
    rows, columns = (graph("Unsqueeze", places, graph.axes(axis)) for axis in (1, 0))
    return str(graph("LessOrEqual", columns, rows))


def _by_head(graph: Graph, x: str, heads: int, size: int) -> str:
    """(B, T, heads * size) as (B, heads, T, size)."""
    return str(graph("Transpose", graph.reshape(x, 0, 0, heads, size), perm=[0, 2, 1, 3]))


def _together(graph: Graph, x: str, width: int) -> str:
    """(B, heads, T, size) as (B, T, width)."""
    return graph.reshape(graph("Transpose", x, perm=[0, 2, 1, 3]), 0, 0, width)


def _attend(graph: Graph, q: str, k: str, v: str, size: int, allowed: str) -> str:
    """What each token takes of those that it may see: q and v are (..., T, size), k is (..., size, T)."""
    scores = graph("Mul", graph("MatMul", q, k), graph.number(size**-0.5))
    scores = graph("Where", allowed, scores, graph.number(-np.inf))
    return str(graph("MatMul", graph("Softmax", scores, axis=-1), v))


def _rotary(graph: Graph, positions: str, rotary: Any) -> tuple[str, str]:
    """Cosine and sine (T, size) of rotary positions (Su et al., arXiv 2104.09864, eq. 15), halves of a head turned."""
    steps = graph.hold("rotary.frequencies", rotary.inv_freq.float().numpy()[None])
    places = graph("Unsqueeze", graph("Cast", positions, to=TensorProto.FLOAT), graph.axes(1))
    half = graph("Mul", places, steps)
    angles = graph("Concat", half, half, axis=-1)
    factor = graph.number(float(rotary.attention_scaling))
    cosine, sine = (graph("Mul", graph(function, angles), factor) for function in ("Cos", "Sin"))
    return cosine, sine


def _rotated(graph: Graph, x: str, cosine: str, sine: str, size: int) -> str:
    first, second = graph("Split", x, graph.axes(size // 2, size // 2), results=2, axis=-1)
    turned = graph("Concat", graph("Neg", second), first, axis=-1)
    return str(graph("Add", graph("Mul", x, cosine), graph("Mul", turned, sine)))


def _layer_norm(graph: Graph, x: str, norm: nn.LayerNorm, name: str) -> str:
    weight, bias = (graph.hold(f"{name}.{key}", getattr(norm, key).detach().numpy()) for key in ("weight", "bias"))
    return str(graph("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps))


def _rms_norm(graph: Graph, x: str, norm: Any, name: str) -> str:
    square = graph("ReduceMean", graph("Mul", x, x), graph.axes(-1))
    root = graph("Sqrt", graph("Add", square, graph.number(float(norm.variance_epsilon))))
    return str(graph("Mul", graph("Div", x, root), graph.hold(f"{name}.weight", norm.weight.detach().numpy())))
