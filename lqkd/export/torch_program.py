"""The deployed network as a program of ``torch.export``, with integer weights among its buffers."""

from __future__ import annotations

from typing import Any

import torch

from lqkd.export.deploy import Deployed, as_float32
from lqkd.export.explicit import parameters


def build(deployed: Deployed, example: Any) -> Any:
    """A :class:`torch.export.ExportedProgram` with a dynamic batch; it expresses every grid.

    Args:
        deployed: the network.
        example: as for :func:`~lqkd.export.deploy`; the program is called likewise.
    """
    batch = torch.export.Dim("batch")
    network, inputs = deployed.network.eval(), as_float32(example, "an example")
    shapes = {name: {0: batch} for name in parameters(network)}
    return torch.export.export(network, inputs.args, dict(inputs.keywords), dynamic_shapes=shapes)
