"""Gradient checkpointing of the student, where a training can have it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lqkd.errors import UsageError
from lqkd.models import recompute_activations
from lqkd.modules.compilation import Compilation
from lqkd.modules.terms import Term
from lqkd.regularizers import LookAhead

_SETTING = "gradient_checkpointing=True is not possible with"


def recompute(asked: bool, student: nn.Module, compilation: Compilation, terms: Mapping[str, Term]) -> None:
    """Let the student compute activations again in the backward pass, where that is ``asked`` for.

    Raises:
        UsageError: when it cannot, or something else cannot with it.
    """
    if not asked:
        return
    if compilation.setting:
        raise UsageError(f"{_SETTING} compile, which decides itself what is computed again: leave one of them out")
    players = [term.regularizer.player for term in terms.values() if term.regularizer is not None]
    if any(isinstance(player, LookAhead) and player.exact for player in players):
        raise UsageError(
            f"{_SETTING} player LookAhead(exact=True), whose student has other weights when the backward pass comes: "
            "leave one of them out"
        )
    recompute_activations(student)
