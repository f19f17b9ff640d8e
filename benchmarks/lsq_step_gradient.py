"""What the bound of LSQ's step gradient changes: where the steps of a network go, and how well it learns.

    LQKD_DATA=FOLDER python -m benchmarks.lsq_step_gradient --csv FILE --data DIR [--bits w2a2] [--seeds N]

ResNet-20 from ResNet-56 on CIFAR-10 in DIR, weights from FOLDER, 100 steps of SGD with a cosine; the same batches,
weights and teacher outputs with ``bound_gradient`` false (the paper's factor) and true. First and last layer have
8 bits. A row says how far the steps of their weights, and all other steps, went from where they started, as factors;
below zero is across zero. Accuracy is on 5,000 validation images, with batch norm re-estimated; the test split is not
looked at.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.regularizer_study import Material, accuracy, key, material, write_rows
from lqkd.losses import HintonKL
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm

FIRST_AND_LAST = ("conv1.weight", "linear.weight")


def train(shared: Material, seed: int, bits: str, bounded: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    lsq = {"name": "lsq", "bound_gradient": bounded}
    network, _ = quantize_model(
        copy.deepcopy(shared.student), Recipe(bits=bits, weight_quantizer=lsq, activation_quantizer=lsq)
    )
    initialize_quantizers(network.train(), shared.batches[0][0])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(shared.batches))
    distillation = HintonKL()
    steps = {name: p for name, p in network.named_parameters() if name.endswith("quantizer.scale")}
    starts = {name: p.detach().clone() for name, p in steps.items()}
    lowest = {name: torch.full_like(p, torch.inf) for name, p in starts.items()}
    highest = {name: torch.full_like(p, -torch.inf) for name, p in starts.items()}
    for images, labels in shared.batches:
        logits = network(images)
        divergence = distillation.reduce(distillation(shared.answers[key(images)], logits))
        loss = 0.7 * F.cross_entropy(logits, labels) + 0.3 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        for name, step in steps.items():
            factor = step.detach() / starts[name]
            lowest[name], highest[name] = torch.minimum(lowest[name], factor), torch.maximum(highest[name], factor)
    reestimate_batchnorm(network, [images for images, _ in shared.batches[-20:]])
    row: dict[str, Any] = {"seed": seed, "bits": bits, "bound_gradient": bounded}
    row["validation_accuracy"] = round(accuracy(network, shared.validation), 4)
    for group, names in (
        ("first_last", [name for name in steps if name.startswith(FIRST_AND_LAST)]),
        ("other", [name for name in steps if not name.startswith(FIRST_AND_LAST)]),
    ):
        low = torch.cat([lowest[name].reshape(-1) for name in names])
        row[f"{group}_steps"], row[f"{group}_crossed"] = len(low), int((low < 0).sum())
        row[f"{group}_lowest"] = round(float(low.min()), 2)
        row[f"{group}_highest"] = round(max(float(highest[name].max()) for name in names), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the results")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--bits", default="w2a2")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        shared = material(options.data, seed, images=6400, epochs=2)
        for bounded in (False, True):
            rows.append(train(shared, seed, options.bits, bounded))
            print(rows[-1], flush=True)
            write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
