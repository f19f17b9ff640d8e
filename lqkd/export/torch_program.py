"""The deployed network as a program of ``torch.export``, with integer weights among its buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lqkd.export.deploy import Deployed


def build(deployed: Deployed, example: Tensor) -> Any:
    """A :class:`torch.export.ExportedProgram` with a dynamic batch; it expresses every grid.

    Args:
        deployed: the network.
        example: (B, C, H, W) with B of at least 2.
    """
    batch = torch.export.Dim("batch")
    network = deployed.network.eval()
    return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
