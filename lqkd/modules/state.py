"""Where a module's weights come from: files to start from, and checkpoints that must belong to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import load_weights
from lqkd.quantization import quantizers
from lqkd.quantization.residual import other_places


def check_state(module: nn.Module, state: Mapping[str, Tensor], any_bits: Collection[str] = ()) -> None:
    """Raise one sentence when ``state`` is that of another architecture or of another number of bits.

    Args:
        module: what the state is for.
        state: a state dict.
        any_bits: names of layers whose bits may differ, since a schedule changes them.

    Raises:
        UsageError: naming the first tensor that differs, or both numbers of bits.
    """
    own = module.state_dict()
    wrong = [
        (problem, keys)
        for problem, keys in (
            ("it lacks", [key for key in own if key not in state]),
            ("it also has", [key for key in state if key not in own]),
            ("another shape has", [key for key in own if key in state and own[key].shape != state[key].shape]),
        )
        if keys
    ]
    if wrong:
        moved = other_places(own, state)
        if moved is not None:
            raise UsageError(f"the checkpoint does not fit: {moved}")
        details = "; ".join(f"{problem} {keys[0]!r}" + _more(keys) for problem, keys in wrong)
        raise UsageError(f"the checkpoint is of another architecture than this configuration's: {details}")
    bits = [
        key
        for key in own
        if key.endswith(".format") and int(own[key][0]) != int(state[key][0]) and key.rsplit(".", 2)[0] not in any_bits
    ]
    if bits:
        key = bits[0]
        raise UsageError(
            f"the checkpoint has {int(state[key][0])} bits where quantization asks for {int(own[key][0])} "
            f"({key.removesuffix('.format')!r}{_more(bits)}): take its quantization.bits, or start a new run"
        )


def quantizer_names(network: nn.Module) -> dict[str, str]:
    """The class name of every quantizer of ``network``: several have tensors of the same names and shapes."""
    return {name: type(quantizer).__name__ for name, quantizer in quantizers(network).items()}


def check_quantizers(network: nn.Module, saved: Mapping[str, str]) -> None:
    """Raise one sentence when a checkpoint was trained with other quantizers than those of ``network``.

    Args:
        network: the quantised network.
        saved: what :func:`quantizer_names` said when the checkpoint was saved; empty when nothing is known.

    Raises:
        UsageError: naming both quantizers and the first place where they differ.
    """
    own = quantizer_names(network)
    other = [name for name in own if name in saved and saved[name] != own[name]]
    if other:
        name = other[0]
        raise UsageError(
            f"the checkpoint has the quantizer {saved[name]} where quantization asks for {own[name]} "
            f"({name!r}{_more(other)}): take its quantizers, or start a new run"
        )


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def start_from(network: nn.Module, weights: str | None, replace_head: bool) -> None:
    """Load the float weights that a training starts from, where there are any, and tell what starts anew.

    Raises:
        UsageError: when they are of another network; see :func:`lqkd.models.load_weights`.
    """
    told = None if weights is None else load_weights(network, weights, replace_head)
    if told is not None:
        rank_zero_info(told)
