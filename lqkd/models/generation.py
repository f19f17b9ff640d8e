"""Tokens that a causal language model writes after others: the most probable ones, or drawn by their probabilities."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.models.gpt import GPT
from lqkd.models.outputs import Asked, main_tensor

_KEPT = ("cache", "past_key_values")
"""What transformers calls keys and values that are kept, from 5.24 on and before."""
_LEAST_SEED = -(2**63)


class Sizes(NamedTuple):
    """What a language model takes; None where it is not known."""

    vocabulary: int | None
    """Tokens."""
    context: int | None
    """Of the longest text."""


def sizes_of(network: Any) -> Sizes:
    """The sizes of a :class:`~lqkd.models.GPT`, of a network of transformers, or of one that has them as attributes
    ``vocabulary`` and ``context``.

    Examples:
        >>> sizes_of(GPT(vocabulary=64, context=16, width=8, depth=1, heads=2))
        Sizes(vocabulary=64, context=16)
    """
    if isinstance(network, GPT):
        return Sizes(len(network.token.weight), len(network.position.weight))
    config = getattr(network, "config", None)
    if config is not None:
        return Sizes(getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None))
    return Sizes(getattr(network, "vocabulary", None), getattr(network, "context", None))


@torch.no_grad()
def generate_tokens(
    network: Any,
    prompt: Sequence[int],
    most: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    known: int | None = None,
    end: int | None = None,
) -> list[int]:
    """Continue a text token by token.

    Keys and values of what was read are kept where the network is of transformers and does so; any other reads the
    text again for every token. What is longer than the context is continued from its last tokens.

    Args:
        network: tokens (1, T) int64 to logits (1, T, V), or what transformers returns; in eval mode, on the CPU.
        prompt: at least one token, and no more than the context.
        most: so many tokens, >= 1.
        temperature: 0 takes the most probable token. Above it a token is drawn from ``softmax(logits / temperature)``
            (Hinton et al., arXiv 1503.02531, eq. 1).
        top_k: draw from so many of the most probable (Fan et al., arXiv 1805.04833, section 5.1); None for all.
        seed: of what is drawn.
        known: leave out tokens from this number on, which no text has; None for none.
        end: the token that ends a text, which is left out; None where there is none.

    Returns:
        The new tokens.

    Raises:
        UsageError: when a setting is not possible, the prompt is empty, longer than the context or has tokens that the
            network does not know, or logits are not finite.

    Examples:
        >>> class Counts:  # after token n comes n + 1
        ...     vocabulary, context = 8, 4
        ...     def __call__(self, tokens):
        ...         return torch.nn.functional.one_hot((tokens + 1) % 8, 8).float()
        >>> generate_tokens(Counts(), [2], 7)
        [3, 4, 5, 6, 7, 0, 1]
        >>> generate_tokens(Counts(), [2], 7, end=5)
        [3, 4]
    """
    _check_settings(most, temperature, top_k, seed)
    check_prompt(network, prompt)
    generator = torch.Generator().manual_seed(seed)
    reader, tokens = _Reader(network, sizes_of(network).context), list(prompt)
    while len(tokens) < len(prompt) + most:
        logits = reader.after(tokens)[:known]
        token = _chosen(logits, temperature, top_k, generator)
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class _Reader:
    """A network that reads a growing text, with keys and values of what it has read where it keeps them."""

    def __init__(self, network: Any, context: int | None) -> None:
        self._network, self._context = network, context
        forward = getattr(network, "forward", network)
        taken = inspect.signature(forward).parameters
        self._kept = next((name for name in _KEPT if {name, "use_cache"} <= taken.keys()), None)
        self._past: Any = None
        self._read = 0

    def after(self, tokens: Sequence[int]) -> Tensor:
        """The logits (V,) of the token after these, which are those of the last call and more, float32."""
        if self._kept is not None and (self._context is None or len(tokens) <= self._context):
            new = torch.tensor([tokens[self._read :]])
            returned = self._network(new, use_cache=True, **{self._kept: self._past})
            self._past = returned.get(self._kept)
            self._read = 0 if self._past is None else len(tokens)
        else:  # a text that is cut has other positions, for which nothing is kept
            returned = self._network(torch.tensor([tokens[-self._context :] if self._context else tokens]))
        logits = main_tensor(returned, Asked("network", 1))[0, -1].float()
        if not logits.isfinite().all():
            raise UsageError("the network answers with logits that are not finite: its training diverged")
        return logits


def _chosen(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    best, places = logits.topk(len(logits) if top_k is None else min(top_k, len(logits)))
    scaled = (best.double() - best[0].double()) / temperature  # 0 and less, whatever the temperature
    drawn = torch.multinomial(scaled.softmax(dim=0), 1, generator=generator)
    return int(places[drawn])


def _check_settings(most: int, temperature: float, top_k: int | None, seed: int) -> None:
    if most < 1:
        raise UsageError(f"{most} tokens are not possible: it must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature!r} is not possible: it must be 0 or more")
    if not _LEAST_SEED <= seed < 2**64:
        raise UsageError(f"seed={seed!r} is not possible: it must be from -2**63 to 2**64 - 1, as PyTorch takes it")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k!r} is not possible: it must be at least 1")
    if top_k is not None and temperature == 0:
        raise UsageError(
            f"top_k={top_k!r} does nothing at temperature=0, which takes the most probable token: give a temperature "
            "above 0 to draw"
        )


def check_prompt(network: Any, prompt: Sequence[int]) -> None:
    """Refuse a prompt that a network cannot continue.

    Raises:
        UsageError: when it is empty, longer than the context or has tokens that the network does not know.
    """
    vocabulary, context = sizes_of(network)
    if not len(prompt):
        raise UsageError("the prompt is empty: give at least one token to continue")
    if context is not None and len(prompt) > context:
        raise UsageError(f"the prompt has {len(prompt)} tokens, and the network takes {context}: shorten it")
    if vocabulary is not None and (unknown := [token for token in prompt if not 0 <= token < vocabulary]):
        raise UsageError(f"the prompt has token {unknown[0]}, and the network knows those from 0 to {vocabulary - 1}")
