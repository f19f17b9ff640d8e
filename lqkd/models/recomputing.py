"""Activations that are computed again in the backward pass, in place of being kept."""

from __future__ import annotations

from typing import Any

from torch import nn

from lqkd.errors import UsageError, first_line

_WAYS = ("activation_checkpointing", "gradient_checkpointing")
"""What transformers calls it from version 5 on, and what it did before."""


def recompute_activations(network: nn.Module) -> None:
    """Let blocks keep nothing but what they are given in training, and compute the rest again in the backward pass.

    Gradient checkpointing, Chen et al., arXiv 1604.06174: memory for activations falls to one block's and the inputs of
    all, for one more forward pass; numbers stay the same. :class:`lqkd.models.GPT` and networks of Hugging Face's
    transformers can do it, and any other with a method ``gradient_checkpointing_enable`` that takes
    ``gradient_checkpointing_kwargs``, arguments of :func:`torch.utils.checkpoint.checkpoint`.

    Args:
        network: changed in place.

    Raises:
        UsageError: when the network cannot.

    Examples:
        >>> from lqkd.models import GPT
        >>> network = GPT(depth=1)
        >>> recompute_activations(network)
        >>> network.blocks[0].recomputes
        True
    """
    for way in _WAYS:
        enable: Any = getattr(network, f"{way}_enable", None)
        if enable is not None:
            try:
                enable(**{f"{way}_kwargs": {"use_reentrant": False}})
            except ValueError as error:
                raise UsageError(f"gradient_checkpointing=True is not possible: {first_line(error)}") from error
            return
    raise UsageError(
        f"gradient_checkpointing=True is not possible for a {type(network).__name__}: lqkd.models.GPT and networks of "
        "transformers can do it, and others with a method gradient_checkpointing_enable"
    )
