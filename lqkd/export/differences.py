"""How the codes of each grid differ between an exported file and its network in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from lqkd.errors import ParityError
from lqkd.export.grids import ActivationGrid
from lqkd.export.reference import Codes, Reference


@dataclass(frozen=True)
class LayerDifference:
    """How the codes of one grid differ between file and PyTorch.

    Attributes:
        name: the grid's node, named after what it quantises.
        steps: the largest difference in steps of the grid.
        fraction: the share of codes that differ.
        codes: how many were compared.
    """

    name: str
    steps: float
    fraction: float
    codes: int


class Forced(fx.Interpreter):
    """Runs a network on the codes of the file: each grid is compared, and what comes after gets the file's values."""

    def __init__(self, network: fx.GraphModule, theirs: dict[str, np.ndarray]) -> None:
        super().__init__(network)
        self.theirs = theirs
        self.rows: list[LayerDifference] = []

    def run_node(self, n: fx.Node) -> Any:
        ours = super().run_node(n)
        if n.name not in self.theirs:
            return ours
        grid: Any = self.fetch_attr(str(n.target))
        values = torch.from_numpy(np.array(self.theirs[n.name]))
        check_shape(f"the codes of {n.target}", ours, values)
        if not values.is_floating_point():
            values = _centred(values, grid) * grid.scale
        self.rows.append(_difference(n, (ours - values) / grid.scale))
        return values


class Compared(Reference):
    """The arithmetic of integer kernels, of which each grid is compared with the file's.

    Args:
        network: the deployed network.
        theirs: the file's codes by node, as the grids have them, or signed with zero in the middle.
        forced: whether what comes after a grid gets the file's codes.
    """

    def __init__(
        self, network: fx.GraphModule, theirs: Mapping[str, np.ndarray] | None = None, *, forced: bool = False
    ) -> None:
        super().__init__(network)
        self.theirs = theirs or {}
        self.forced = forced
        self.rows: list[LayerDifference] = []

    def run_node(self, n: fx.Node) -> Any:
        ours = super().run_node(n)
        if n.name not in self.theirs or not isinstance(ours, Codes):
            return ours
        values = _centred(torch.from_numpy(np.array(self.theirs[n.name])), ours.grid)
        check_shape(f"the codes of {n.target}", ours.values, values)
        self.rows.append(_difference(n, ours.values - values))
        return replace(ours, values=values) if self.forced else ours


def check_shape(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Refuse numbers of a file in another shape than PyTorch's, with which they could not be compared one by one.

    Raises:
        ParityError: then; ``what`` is what the message calls them.
    """
    if ours.shape != theirs.shape:
        raise ParityError(f"{what} have the shape {(*theirs.shape,)} in the file and {(*ours.shape,)} in PyTorch")


def _centred(codes: Tensor, grid: ActivationGrid) -> Tensor:
    """Codes minus that of zero, which is the middle of signed ones."""
    return codes.float() - (0 if codes.dtype == torch.int8 else grid.zero_point)


def _difference(node: fx.Node, steps: Tensor) -> LayerDifference:
    steps = torch.where(steps.isfinite(), steps.abs(), torch.inf).round()
    return LayerDifference(str(node.target), float(steps.max()), float((steps > 0).double().mean()), steps.numel())
