"""What became of a regularizer, in one word and one sentence with a number and a remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lqkd.callbacks.regularizer.moments import EpochWeights

TURNED_DOWN = 0.1
"""Mean or effective weights below this turn distillation down; every regularizer starts at 1."""

OF_OPTIMUM = 0.1
"""Part of the contribution at the guard's closed form below which turned down weights are a collapse."""

SHARE = 0.01
"""Share of the student's gradient below which turned down weights are a collapse whatever the guard wants."""

CONCENTRATED = 5.0
"""Effective over mean weight above which the weights are where teacher and student differ most."""

ALL = 0.95
"""Share of the student's gradient above which concentrated weights leave nothing to the task."""

_REGULARIZER = "model.init_args.regularizer.init_args"
_BALANCE = "model.init_args.balance.init_args"
_LEARNING_RATE = "model.init_args.regularizer_optimizer.init_args.lr"
_STUDENT_LEARNING_RATE = "model.init_args.student_optimizer.init_args.lr"


@dataclass(frozen=True)
class Verdict:
    """What became of the weights, and a sentence that gives the number and, where one is needed, a remedy."""

    kind: Literal["healthy", "collapsed", "dominant", "saturated", "uniform", "diverged", "believed"]
    sentence: str


def verdict(history: Sequence[EpochWeights], term: str = "", held_out: str | None = None) -> Verdict:
    """Judge a training by its last epoch.

    Args:
        history: of one regularizer, with at least one epoch.
        term: the name of its distillation term; empty for the only one.
        held_out: what held-out rows have taught it, in a sentence, empty while that is not known; None for a
            regularizer that learns from the divergence. Small weights of one that does not are no collapse.
    """
    judged = _judged(history[-1])
    if held_out is not None and judged.kind != "diverged":
        last = history[-1]
        told = f"teachers are believed {last.mean:.2f} against the student in epoch {last.epoch + 1}"
        judged = Verdict("believed", f"{held_out or told}.")
    if not term:
        return judged
    sentence = judged.sentence.replace(_REGULARIZER, f"model.init_args.distillation.{term}.regularizer.init_args")
    return Verdict(judged.kind, f"{term}: {sentence.replace(f'{_BALANCE}.distill', f'{_BALANCE}.terms.{term}')}")


def _judged(last: EpochWeights) -> Verdict:
    number = last.epoch + 1
    if not math.isfinite(last.mean):
        return Verdict(
            "diverged",
            f"The regularizer's weights are no longer finite (mean {last.mean} in epoch {number}): the training "
            f"diverged; lower {_STUDENT_LEARNING_RATE} or {_LEARNING_RATE}.",
        )
    reason = _collapse(last)
    if reason is not None:
        return Verdict("collapsed", reason)
    if last.effective > CONCENTRATED * last.mean and last.share is not None and last.share > ALL:
        return Verdict(
            "dominant",
            f"The divergence counts {last.effective:.3g} times in epoch {number}, since the regularizer's weights "
            f"(mean {last.mean:.3g}) are where teacher and student differ most, and has {last.share:.0%} of the "
            f"student's gradient, which leaves next to nothing to the task: lower {_BALANCE}.distill, or take a "
            "regularizer with fewer weights, e.g. one for a sample or a class.",
        )
    if last.at_maximum is not None and last.at_maximum > 0.9:
        return Verdict(
            "saturated",
            f"{last.at_maximum:.0%} of the regularizer's weights are at their bound in epoch {number}, where they "
            f"no longer tell elements apart: raise {_REGULARIZER}.max_weight (.high of a guard with bounds), or lower "
            f"{_LEARNING_RATE}.",
        )
    if last.spread < 0.01 * last.mean:
        return Verdict(
            "uniform",
            f"The regularizer's weights are all about {last.mean:.3g} (spread {last.spread:.2g}) in epoch {number}, no "
            f"different from fixed distillation: raise {_LEARNING_RATE} or train longer.",
        )
    share = "" if last.share is None else f" and has {last.share:.0%} of the student's gradient"
    return Verdict(
        "healthy",
        f"The regularizer's weights differ: mean {last.mean:.3g}, spread {last.spread:.3g} in epoch {number}; the "
        f"divergence counts {last.effective:.3g} times{share}.",
    )


def _collapse(last: EpochWeights) -> str | None:
    """Why the weights of an epoch are a collapse; None when they are not.

    Small weights alone are none: at divergences around 30 the barrier wants weights of 0.03, with which distillation
    counts as much as it ever does. They are one when they are small against what the guard's closed form wants, or
    when next to nothing of the student's gradient comes from distillation.
    """
    if not (last.mean < TURNED_DOWN or last.effective < TURNED_DOWN):
        return None
    number = last.epoch + 1
    if last.mean < TURNED_DOWN:
        fell = (
            f"The regularizer's mean weight fell from 1 to {last.mean:.3g} in epoch {number}, which all but turns "
            "distillation off"
        )
    else:
        fell = (
            f"The divergence counts only {last.effective:.3g} times in epoch {number}, since the regularizer's "
            f"weights (mean {last.mean:.3g}) are where teacher and student agree, which all but turns distillation off"
        )
    if last.optimum and last.contribution is not None:  # a guard that wants weights above zero
        if last.contribution < OF_OPTIMUM * last.optimum:
            return (
                f"{fell}: the mean of weight times divergence is {last.contribution:.3g}, where the guard alone would "
                f"lead to {last.optimum:.3g}; lower {_LEARNING_RATE}, or give the regularizer more capacity "
                f"(e.g. {_REGULARIZER}.hidden)."
            )
        if last.share is not None and last.share < SHARE:
            return (
                f"{fell}: it has {last.share:.2%} of the student's gradient, although the weights are those that the "
                f"guard wants for such divergences; raise {_BALANCE}.distill, or use a guard that holds weights from "
                f"below, e.g. {_REGULARIZER}.guard=bounded."
            )
        return None
    if last.optimum is None and last.share is not None and last.share >= SHARE:
        return None  # no closed form, but distillation still counts
    share = "" if last.share is None else f" ({last.share:.2%} of the student's gradient)"
    return (
        f"{fell}{share}: use a guard other than none, e.g. {_REGULARIZER}.guard=barrier, since without one weight zero "
        "is the optimum of the literal formula."
        if last.optimum == 0
        else f"{fell}{share}: use a guard with an optimum above zero, e.g. {_REGULARIZER}.guard=barrier."
    )
