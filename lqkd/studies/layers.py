"""The layers of a run, their bits and what they take, read from its ``layers.txt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lqkd.runs.folder import LAYERS
from lqkd.utils.files import is_own_file


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: in the network.
        kind: its class.
        weight_bits: e.g. ``4``, or ``float``.
        activation_bits: likewise, of its input.
        parameters: their number.
        note: what quantises it, or why nothing does.
    """

    name: str
    kind: str
    weight_bits: str
    activation_bits: str
    parameters: int
    note: str

    @property
    def packed_bytes(self) -> float | None:
        """Bytes of the parameters at these bits, without scales; None where layers share other bits."""
        bits = {"float": "32"}.get(self.weight_bits, self.weight_bits)
        return self.parameters * int(bits) / 8 if bits.isdecimal() else None


def read_layers(folder: Path) -> tuple[list[Layer], list[str]]:
    """The layers of the run in ``folder``, and lines about what else is not quantised; both empty without a list."""
    path = folder / LAYERS
    if not is_own_file(path, folder):
        return [], []
    layers, others = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]:
        cells = re.split(r" {2,}", line.strip(), maxsplit=5)
        if len(cells) >= 5 and cells[4].replace(",", "").isdecimal():
            name, kind, weight, activation, parameters, *note = cells
            layers.append(Layer(name, kind, weight, activation, int(parameters.replace(",", "")), " ".join(note)))
        elif line.strip():
            others.append(line.strip())
    return layers, others
