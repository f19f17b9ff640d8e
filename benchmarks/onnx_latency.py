"""Latency of a low-bit network on integer kernels against the same network in float32, both in ONNX Runtime.

    python -m benchmarks.onnx_latency --csv FILE [--threads N] [--rounds N] [--bits w4a4]

ResNet-18 of torchvision at 224 px, batch 1, with random weights and grids fitted to random images: time does not depend
on their values. Both run in one process and in alternation; what counts is the median over the rounds of one's time
over the other's in the same round. Where the portable file takes more than 0.6 of the time, the nodes that hold it are
printed. On a processor without integer dot products (VNNI) that is to be expected.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
import torchvision

from lqkd.export import deploy, floating, portable
from lqkd.export.latency import Latency, measure, slowest_nodes
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.utils.files import atomic_path

TARGET = 0.6
FLOAT, PORTABLE = "float32", "portable"
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--bits", default="w4a4", help="of the network; first and last layer keep 8")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each contestant that are timed")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)
    network, _ = quantize_model(torchvision.models.resnet18(weights=None), Recipe(bits=arguments.bits))
    initialize_quantizers(network, images, batch_statistics=True)
    deployed = deploy(network, images, [images])
    integer, plain = portable.build(deployed).model, floating.build(deployed).model
    one = Inputs.of(images[:1])
    latency = measure({FLOAT: plain, PORTABLE: integer}, one, threads=arguments.threads, rounds=arguments.rounds)
    write(arguments.csv, latency, arguments.bits)
    for name, value in latency.milliseconds.items():
        print(f"{name:10}{value:9.2f} ms{latency.ratios[name]:8.3f}")
    if latency.ratios[PORTABLE] > TARGET:
        nodes = slowest_nodes(integer, one, arguments.threads)
        total = sum(milliseconds for _, _, milliseconds in nodes)
        print(f"\nmore than {TARGET} of float32; {total:.2f} ms of the portable file by node:")
        for name, kind, milliseconds in nodes[:SHOWN]:
            print(f"{milliseconds:9.3f} ms  {milliseconds / total:6.1%}  {kind:28}{name}")


def write(file: Path, latency: Latency, bits: str) -> None:
    """One row for each contestant."""
    columns = (
        "network",
        "bits",
        "pixels",
        "batch",
        "threads",
        "rounds",
        "contestant",
        "milliseconds",
        "ratio_to_float32",
    )
    machine = ("peak_memory_mb", "machine", "onnxruntime", "torch")
    with atomic_path(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow((*columns, *machine))
        for name, value in latency.milliseconds.items():
            peak = latency.peak_bytes.get(name)
            writer.writerow(
                (
                    *("resnet18", bits if name == PORTABLE else "float32", 224),
                    *(latency.batch, latency.threads, latency.rounds),
                    *(name, round(value, 3), round(latency.ratios[name], 4)),
                    *("" if peak is None else round(peak / 1e6, 1), latency.machine),
                    *(latency.versions["onnxruntime"], latency.versions["torch"]),
                )
            )


if __name__ == "__main__":
    main()
