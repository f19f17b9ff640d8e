"""Writes the golden losses anew: ``python -m tests.golden.regenerate``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from tests.golden.losses import GOLDEN, VARIANTS, first_losses

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        losses = {variant: first_losses(variant, Path(folder)) for variant in VARIANTS}
    rounded = {name: {key: [round(v, 5) for v in values] for key, values in of.items()} for name, of in losses.items()}
    rows = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in rounded.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
