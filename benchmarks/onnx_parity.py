"""What ONNX Runtime computes against PyTorch, end to end, for networks at 224 px with random, calibrated weights.

    python -m benchmarks.onnx_parity --csv FILE [--images N]

ResNet-18 and MobileNetV2 of torchvision and MobileNetV3 small of timm, batch norm and grids fitted to four random
images and judged on others. Networks with random weights are hard: a code that differs by one step in an early layer
changes many in the last. PyTorch computes in whole numbers (``lqkd.export.reference``) and, for comparison, with
simulated quantization in floating point.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.export import check, deploy, portable
from lqkd.export.latency import machine
from lqkd.export.reference import Reference
from lqkd.export.runtimes import Runner, kernels
from lqkd.models import build_model
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm
from lqkd.utils.files import atomic_path

NETWORKS = ("torchvision/resnet18", "torchvision/mobilenet_v2", "timm/mobilenetv3_small_100")
BITS = ("w8a8", "w4a4")
CALIBRATION = 4
CLASSES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--images", type=int, default=32, help="to judge on")
    arguments = parser.parse_args()
    rows = []
    for name in NETWORKS:
        for bits in BITS:
            rows.append(compare(name, bits, arguments.images))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    with atomic_path(arguments.csv) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@torch.no_grad()
def compare(name: str, bits: str, count: int) -> dict[str, Any]:
    """One row of the result."""
    torch.manual_seed(0)
    network, calibration = build_model(name, num_classes=CLASSES).eval(), torch.randn(CALIBRATION, 3, 224, 224)
    reestimate_batchnorm(network, [calibration])
    network, _ = quantize_model(network, Recipe(bits=bits, residual_bits=8))
    initialize_quantizers(network, calibration)
    deployed = deploy(network.eval(), calibration, [calibration], gates=True)
    exported, images = portable.build(deployed), torch.randn(count, 3, 224, 224)
    parity = check(exported, deployed, images)
    theirs = torch.from_numpy(Runner(exported.model, optimised=True)(images.numpy())["logits"])
    found = kernels(exported.model)
    assert parity.problem is None, parity.problem
    row = {
        "network": name,
        "bits": bits,
        "residual_additions": "8 bits",
        "pixels": 224,
        "images": count,
        "integer_convolutions": found.integer["QLinearConv"],
        "float_nodes": len(found.floats),
        "grids": len(parity.end_to_end),
        "largest_difference_of_codes_steps": max(row.steps for row in parity.end_to_end),
        "largest_fraction_of_codes": max(row.fraction for row in parity.end_to_end),
        "largest_difference_of_logits_steps": parity.output_steps,
        "same_class": _agreeing(Reference(deployed.network), images, theirs)[0],
    }
    same, difference = _agreeing(deployed.network, images, theirs)
    row |= {"simulated_same_class": same, "simulated_difference_of_logits": round(difference, 4)}
    return row | {
        "machine": machine(),
        "onnxruntime": metadata.version("onnxruntime"),
        "torch": torch.__version__.partition("+")[0],
    }


def _agreeing(network: Callable[[Tensor], Tensor], images: Tensor, theirs: Tensor) -> tuple[int, float]:
    """On how many images the first class is the same, and the largest difference in units of the largest logit."""
    ours = torch.cat([network(batch) for batch in images.split(CALIBRATION)])
    return int((ours.argmax(1) == theirs.argmax(1)).sum()), float((ours - theirs).abs().max() / theirs.abs().max())


if __name__ == "__main__":
    main()
