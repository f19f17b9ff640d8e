"""What a checkpoint of a distillation has beside tensors: measurements, what held-out rows taught, and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lqkd.balances.base import DISTILL
from lqkd.modules.held_out import HeldOutRows, Known
from lqkd.modules.held_out_features import asked_of, restore_asked
from lqkd.modules.own import Joined, leave_own
from lqkd.modules.state import check_quantizers, quantizer_names
from lqkd.quantization import quantizers
from lqkd.utils.renames import current_keys


class Checkpointed(Joined, Protocol):
    """A module whose checkpoints have it; :class:`lqkd.modules.DistillModule` is one."""

    references: dict[str, float | None]
    trust: dict[str, dict[str, Any]]
    reliability: dict[str, dict[str, dict[str, list[float]]]]
    held_out: dict[str, HeldOutRows]
    known_of_held_out: dict[str, Known]

    @property
    def student(self) -> nn.Module: ...


def kept(module: Checkpointed) -> dict[str, Any]:
    """What is kept of a module, in plain values and tensors."""
    of_terms: dict[str, Any] = {"trust": module.trust}
    if module.trust:
        of_terms["reliability"] = module.reliability
    known = module.known_of_held_out | {name: rows.known for name, rows in module.held_out.items()}
    if known:
        of_terms["held_out"] = {name: vars(of_term) for name, of_term in known.items()}
    asked = asked_of(module.distillation)
    if asked:
        of_terms["held_out_features"] = asked
    return {
        "references": module.references,
        **of_terms,
        "distillation_shapes": module.distillation.shapes,
        "quantizers": quantizer_names(module.student),
        # A switch of bits that no batch has followed yet.
        "fit_by_mse": [name for name, q in quantizers(module.student).items() if q.wants_mse],
    }


def bring_back(module: Checkpointed, checkpoint: Mapping[str, Any]) -> None:
    """Put it back into a module that has just been made, from a checkpoint of an earlier version too.

    Raises:
        UsageError: when the checkpoint was trained with other quantizers.
    """
    check_quantizers(module.student, checkpoint.get("quantizers", {}))
    module.references = current_keys(checkpoint.get("references", module.references))
    module.trust = checkpoint.get("trust", {})
    module.reliability = checkpoint.get("reliability", {})
    module.known_of_held_out = {name: Known(**of) for name, of in checkpoint.get("held_out", {}).items()}
    restore_asked(module.distillation, checkpoint.get("held_out_features", {}))
    leave_own(module, module.trust)
    for name, quantizer in quantizers(module.student).items():
        quantizer.wants_mse = name in checkpoint.get("fit_by_mse", ())
    shapes = checkpoint.get("distillation_shapes")
    if shapes is not None:  # in earlier versions of one term without a name
        module.distillation.connect(shapes if isinstance(shapes, dict) else {DISTILL: shapes})
