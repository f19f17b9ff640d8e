"""What the arithmetic of a runtime asks of a network's grids, so that it is trained under it and not bent to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lqkd.errors import UsageError
from lqkd.quantization.quantizers import PACT, DoReFa, LSQPlus, LSQPowerOfTwo, Mse, Quantizer, UniformQuantizer

FLOAT = 32
RESIDUAL_BITS = 8
"""Of the grid of a result that training left in floating point."""


class Target(ABC):
    """A runtime, or a kind of hardware, whose arithmetic is not that of all files.

    Attributes:
        runtime: its name, for messages.
        quantizer: the quantizer where a recipe names none, of all bits; None for what it is without a target.
        per_channel: whether a weight may have a grid for each output channel, and has where a recipe does not say.
        folds_batch_norm: whether batch norms are folded into the layers before these are quantised.
    """

    runtime: str
    quantizer: str | None = None
    per_channel = True
    folds_batch_norm = False

    @abstractmethod
    def constrained(self, kind: type[Quantizer], arguments: dict[str, Any], bits: int, place: str) -> dict[str, Any]:
        """The arguments of a quantizer of activations with what the target asks for.

        Args:
            kind: its family.
            arguments: further ones, as a recipe gives them.
            bits: 32 for no quantizer at all.
            place: what is quantised, for messages.

        Raises:
            UsageError: when the family, a number of bits or an argument is not possible.
        """

    @abstractmethod
    def check_weights(self, kind: type[Quantizer], bits: tuple[int, int], settings: dict[str, Any], place: str) -> None:
        """Refuse a weight that cannot be.

        Args:
            kind: the family of its quantizer.
            bits: of the weight and of the input beside it.
            settings: ``per_channel`` and ``group_size`` of a recipe.
            place: the layer, for messages.

        Raises:
            UsageError: then.
        """

    @abstractmethod
    def missing_grid(self) -> Quantizer:
        """The quantizer of a result that training left in floating point, to be fitted before the file is written."""

    @property
    def name(self) -> str:
        """What a recipe calls it."""
        return next(name for name, target in TARGETS.items() if target is self)

    def _signed(self, kind: type[Quantizer], arguments: dict[str, Any], place: str) -> dict[str, Any]:
        """The arguments of codes that are signed around zero."""
        if not issubclass(kind, UniformQuantizer) or issubclass(kind, LSQPlus | PACT):
            raise self._impossible(
                f"quantizer {kind.__name__} of the {place} is",
                f"zero is the middle of {self.runtime}'s codes, as lsq, lsq_ewgs, minmax and mse have it",
            )
        if not arguments.get("signed", True):
            raise self._impossible(
                f"signed={arguments['signed']!r} of the {place} is", f"{self.runtime}'s codes are signed"
            )
        return arguments | {"signed": True}

    def _impossible(self, what: str, why: str) -> UsageError:
        return UsageError(f"{what} not possible with target={self.name!r}: {why}")


class _TensorRT(Target):
    """Activations are signed 8-bit codes with zero in the middle."""

    runtime = "TensorRT"

    def constrained(self, kind: type[Quantizer], arguments: dict[str, Any], bits: int, place: str) -> dict[str, Any]:
        if bits == FLOAT:
            return arguments
        if bits != RESIDUAL_BITS:
            raise self._impossible(
                f"{bits} bits of the {place} are",
                f"{self.runtime} has codes of {RESIDUAL_BITS} bits, and {FLOAT} leaves it in floating point",
            )
        return self._signed(kind, arguments, place)

    def check_weights(self, kind: type[Quantizer], bits: tuple[int, int], settings: dict[str, Any], place: str) -> None:
        """Its weights are those of all files."""

    def missing_grid(self) -> Quantizer:
        return Mse(RESIDUAL_BITS, signed=True, batched=True)


class _PowerOfTwo(Target):
    """Fixed point: every scale is a power of two and of a whole tensor, and every zero point is zero.

    Going from grid to grid is then a shift of bits. Batch norms are folded before training, since afterwards each
    channel would be multiplied by a factor of its own (Jacob et al., arXiv 1712.05877, section 3.2; Krishnamoorthi,
    arXiv 1806.08342, section 3.2.2; Jain et al., arXiv 1903.08066, section 4.1).
    """

    runtime = "fixed-point hardware"
    quantizer = "lsq_power_of_two"
    per_channel = False
    folds_batch_norm = True

    def constrained(self, kind: type[Quantizer], arguments: dict[str, Any], bits: int, place: str) -> dict[str, Any]:
        if bits != FLOAT:
            self._check_kind(kind, place)
        return arguments

    def check_weights(self, kind: type[Quantizer], bits: tuple[int, int], settings: dict[str, Any], place: str) -> None:
        if bits[0] == FLOAT:
            return
        if bits[1] == FLOAT:
            raise self._impossible(
                f"a weight of {bits[0]} bits beside an input in floating point, of {place}, is",
                f"its product is in floating point; give both bits, or both {FLOAT}",
            )
        self._check_kind(kind, f"weight of {place}")
        for setting, only in (("per_channel", False), ("group_size", None)):
            if settings[setting] != only:
                raise self._impossible(
                    f"{setting}={settings[setting]!r} of {place} is",
                    "a weight has one scale, or no shift goes from grid to grid; leave it out",
                )

    def _check_kind(self, kind: type[Quantizer], place: str) -> None:
        if not issubclass(kind, LSQPowerOfTwo):
            raise self._impossible(
                f"quantizer {kind.__name__} of the {place} is", f"its scale is no power of two: use {self.quantizer}"
            )

    def missing_grid(self) -> Quantizer:
        return LSQPowerOfTwo(RESIDUAL_BITS, batched=True)


class _Apart(Mse):
    """A ten-thousandth finer, so that no level of another grid is the middle between two of its own.

    Largest levels are fitted to largest levels: their quotients are small fractions. And ncnn multiplies by the
    reciprocal of a step, where the network divides: which of the two levels is nearer would be left to the last bit.
    """

    def _initial_step(self, rows: Tensor) -> Tensor:
        return super()._initial_step(rows) * (1 - 1e-4)


class _Ncnn(Target):
    """Activations are whole numbers from -127 to 127, so that 8 bits are signed and without the lowest code.

    Fewer bits are any multiples of a step: families without a zero, or with uneven levels, have none.
    """

    runtime = "ncnn"

    def constrained(self, kind: type[Quantizer], arguments: dict[str, Any], bits: int, place: str) -> dict[str, Any]:
        if bits == FLOAT:
            return arguments
        if not issubclass(kind, UniformQuantizer | DoReFa):
            raise self._impossible(
                f"quantizer {kind.__name__} of {bits} bit for the {place} is",
                "its layers read multiples of one step, as lsq, lsq_plus, lsq_ewgs, minmax, mse, pact and dorefa have "
                "them; choose one of these, which take 1 bit where no value is negative, or more bits",
            )
        if bits != RESIDUAL_BITS:
            return arguments
        if not arguments.get("narrow_range", True):
            raise self._impossible(
                f"narrow_range={arguments['narrow_range']!r} of the {place} is", "its lowest code is -127"
            )
        return self._signed(kind, arguments, place) | {"narrow_range": True}

    def check_weights(self, kind: type[Quantizer], bits: tuple[int, int], settings: dict[str, Any], place: str) -> None:
        """Its weights are those of all files."""

    def missing_grid(self) -> Quantizer:
        return _Apart(RESIDUAL_BITS, signed=True, narrow_range=True, batched=True)


TARGETS: dict[str, Target] = {"tensorrt": _TensorRT(), "power_of_two": _PowerOfTwo(), "ncnn": _Ncnn()}
"""By the name that a recipe's ``target`` and the format of the file have."""


def find_target(name: str | None) -> Target | None:
    """The target of a recipe; None for none.

    Raises:
        UsageError: when there is no such target.
    """
    if name is None:
        return None
    if name not in TARGETS:
        raise UsageError(
            f"quantization.target={name!r} is unknown: use {', '.join(TARGETS)}, or null for all files that ask for "
            "nothing"
        )
    return TARGETS[name]
