"""Rotations of a Llama's residual stream: nothing changes in floating point, and weights suit a grid better."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix (size, size) of Sylvester's construction, float64.

    Raises:
        UsageError: when ``size`` is no power of two.

    Examples:
        >>> 2**0.5 * hadamard(2)
        tensor([[ 1.,  1.],
                [ 1., -1.]], dtype=torch.float64)
    """
    if size < 1 or size & (size - 1):
        raise UsageError(f"size={size} is not possible: a Hadamard matrix here has a power of two")
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found / size**0.5


@torch.no_grad()
def rotate(network: nn.Module, block: int | None = None, seed: int = 0) -> int:
    """Rotate the residual stream of a Llama, in place: the same answers from weights without outlying columns.

    The offline part of QuaRot, Ashkboos et al. (arXiv 2404.00456), section 4, stage 1a: scales of RMS norms move into
    the linear layers behind them, and a rotation R of the hidden states, random signs and then Hadamard matrices of
    blocks of channels, into all weights that write hidden states (embedding, ``o_proj``, ``down_proj``) or read them
    (queries, keys, values, gate, up, head). Nothing is computed while the network runs. Call it on the network in
    floating point, before :func:`lqkd.quantization.quantize_model`; where its own float network is the teacher, that
    may be the one that is not rotated. Whether it helps depends on the grid: measure it.

    A head that is the embedding becomes a matrix of its own, since the last norm's scales are in it.

    Args:
        network: a ``LlamaForCausalLM`` of transformers in float32 or float64.
        block: channels that are rotated together, a power of two that divides the width; null for the largest.
        seed: of the signs.

    Returns:
        ``block``.

    Raises:
        UsageError: when the network is no Llama in floating point, or ``block`` does not fit.

    Examples:
        >>> import transformers
        >>> sizes = {"vocab_size": 64, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
        >>> rotate(network)
        16
    """
    config: Any = getattr(network, "config", None)
    if getattr(config, "model_type", None) != "llama":
        raise UsageError(f"a {type(network).__name__} cannot be rotated: a LlamaForCausalLM of transformers is needed")
    if any(type(layer) not in (nn.Linear, nn.Embedding) for _, layer in _layers(network)):
        raise UsageError("a network with quantised layers cannot be rotated: rotate it before quantize_model")
    width: int = config.hidden_size
    block = width & -width if block is None else block
    if block < 1 or width % block:
        raise UsageError(f"block={block} is not possible: it must divide the width, {width}")
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    rotation = signs[:, None] * torch.block_diag(*[hadamard(block)] * (width // block))
    _untie(network)
    for scale, layers in _norms(network):
        for layer in layers:
            layer.weight.copy_(layer.weight.double() * scale.double())
        scale.fill_(1.0)
    for writes, layer in _layers(network):
        turned = rotation.to(layer.weight.device)
        weight = layer.weight.double()
        if not writes or isinstance(layer, nn.Embedding):  # rows of hidden states, or of what reads them
            layer.weight.copy_(weight @ turned)
            continue
        layer.weight.copy_(turned.t() @ weight)
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() @ turned)
    return block


def _untie(network: Any) -> None:
    if network.lm_head.weight is network.model.embed_tokens.weight:
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.detach().clone())
        network.config.tie_word_embeddings = False


def _norms(network: Any) -> Iterator[tuple[Tensor, list[nn.Linear]]]:
    """The scales of every norm, and the layers behind it."""
    for part in network.model.layers:
        attention, perceptron = part.self_attn, part.mlp
        yield part.input_layernorm.weight, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield part.post_attention_layernorm.weight, [perceptron.gate_proj, perceptron.up_proj]
    yield network.model.norm.weight, [network.lm_head]


def _layers(network: Any) -> Iterator[tuple[bool, Any]]:
    """All layers that write hidden states or read them, and which of the two."""
    yield True, network.model.embed_tokens
    for part in network.model.layers:
        yield True, part.self_attn.o_proj
        yield True, part.mlp.down_proj
    for _, layers in _norms(network):
        yield from ((False, layer) for layer in layers)
