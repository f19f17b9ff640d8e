"""The cost of quantization-aware training: one quantised training step against the same step in fp32 and by others.

    python -m benchmarks.qat_step --csv FILE [--networks resnet20 mobilenet_v2] [--bits w4a4 w2a2] [--rounds N]
        [--batch B] [--contestants fp32 lqkd]

All contestants run in one process and in alternation, since timings on shared machines drift; what counts are the
ratios of the medians. Where other work runs beside it, the processor's time is steadier than that of the clock, for
one thread (``OMP_NUM_THREADS=1``). Freed memory is kept, as the command line keeps it. Every convolution and linear
layer is quantised. Memory is the peak of what one step allocates on top of network and optimizer, by PyTorch's own
profiler. Brevitas takes part where it is installed, at four bits.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lqkd.export.latency import machine
from lqkd.models import CifarResNet, build_model
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, quantizers
from lqkd.utils.memory import keep_freed_memory

PIXELS = {"resnet20": 32, "mobilenet_v2": 64, "resnet18": 224}
BITS = {"w4a4": 4, "w2a2": 2}
CONTESTANTS = ["fp32", "lqkd", "eager LSQ", "ATen learnable", "Brevitas"]
COMPILED = ["fp32 compiled", "lqkd compiled"]
"""Through ``torch.compile`` as ``model.compile: true`` does it; only where asked for, since it takes minutes."""


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20) if name == "resnet20" else build_model(f"torchvision/{name}", num_classes=10)


def lqkd_network(name: str, images: Tensor, bits: str = "w4a4") -> nn.Module:
    recipe = Recipe(
        bits=bits,
        weight_quantizer="lsq",
        activation_quantizer="lsq",
        first_layer_bits=BITS[bits],
        last_layer_bits=BITS[bits],
    )
    model, _ = quantize_model(network(name), recipe)
    initialize_quantizers(model, images)
    return model


class EagerLSQ(nn.Module):
    """LSQ as it is usually written, with detach tricks (Esser et al., arXiv 1902.08153, appendix A)."""

    def __init__(self, scale: Tensor, qmin: int, qmax: int, elements: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)
        self.range = qmin, qmax
        self.gradient_scale = (elements * qmax) ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (x.ndim - 1) if self.scale.ndim else ()
        scaled = self.scale * self.gradient_scale
        scale = ((self.scale - scaled).detach() + scaled).view(shape)
        ratio = (x / scale).clamp(*self.range)
        return ((ratio.round() - ratio).detach() + ratio) * scale


class ATenLearnable(EagerLSQ):
    """The same through ATen's learnable fake quantization."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(self.scale)
        if self.scale.ndim:
            return torch._fake_quantize_learnable_per_channel_affine(
                x, self.scale, zeros, 0, *self.range, self.gradient_scale
            )
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale.view(1), zeros.view(1), *self.range, self.gradient_scale
        )


def with_quantizers(kind: type[EagerLSQ], name: str, images: Tensor, bits: str = "w4a4") -> nn.Module:
    """The network of lqkd with each of its quantizers replaced by another implementation of the same grid."""
    model = lqkd_network(name, images, bits)
    for path, quantizer in quantizers(model).items():
        ours: Any = quantizer
        parent, _, attribute = path.rpartition(".")
        layer: Any = model.get_submodule(parent)
        elements = layer.weight.numel() // (ours.channels or 1)
        low, high = ours.code_range()
        theirs = kind(ours.step().detach().clone(), low, high, elements)
        # An attribute with a Quantizer's annotation takes any module that maps tensors to tensors.
        setattr(layer, attribute, theirs)
    return model


def brevitas_network(name: str, images: Tensor) -> nn.Module:
    import brevitas.nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    model = network(name)
    common = {
        "weight_quant": Int8WeightPerChannelFloat,
        "weight_bit_width": 4,
        "input_quant": Int8ActPerTensorFloat,
        "input_bit_width": 4,
    }
    for path, layer in list(model.named_modules()):
        parent, _, attribute = path.rpartition(".")
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Conv2d):
            theirs = qnn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                groups=layer.groups,
                bias=bias,
                **common,
            )
        elif isinstance(layer, nn.Linear):
            theirs = qnn.QuantLinear(layer.in_features, layer.out_features, bias=bias, **common)
        else:
            continue
        setattr(model.get_submodule(parent), attribute, theirs)
    model.train()
    model(images)
    return model


def compiled(model: nn.Module) -> nn.Module:
    """The model, compiled in place as training passes are."""
    model.compile(fullgraph=True, dynamic=False)
    return model


def contestants(name: str, images: Tensor, bits: str, wanted: Sequence[str]) -> dict[str, nn.Module]:
    made: dict[str, Callable[[], nn.Module]] = {
        "fp32": lambda: network(name),
        "lqkd": lambda: lqkd_network(name, images, bits),
        "eager LSQ": lambda: with_quantizers(EagerLSQ, name, images, bits),
        "ATen learnable": lambda: with_quantizers(ATenLearnable, name, images, bits),
        "Brevitas": lambda: brevitas_network(name, images),
        "fp32 compiled": lambda: compiled(network(name)),
        "lqkd compiled": lambda: compiled(lqkd_network(name, images, bits)),
    }
    models = {}
    for label in wanted:
        try:
            models[label] = made[label]()
        except ImportError as error:
            print(f"{label} left out: {error}")
    return models


def measure(name: str, bits: str, rounds: int, batch: int, wanted: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each contestant."""
    torch.manual_seed(1)
    images = torch.randn(batch, 3, PIXELS[name], PIXELS[name])
    labels = torch.randint(10, (batch,))
    steps: dict[str, Callable[[], None]] = {}
    for label, model in contestants(name, images, bits, wanted).items():
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        steps[label] = step
    first = {label: seconds(step)[0] for label, step in steps.items()}  # lqkd's makes its kernels
    for run in steps.values():
        run()
    memory = {label: peak_memory(step) for label, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, run in steps.items():
            times[label].append(seconds(run))
    medians = {
        label: [statistics.median(column) for column in zip(*rows, strict=True)] for label, rows in times.items()
    }
    of_fp32 = medians["fp32"]
    return [
        {
            "network": name,
            "bits": bits,
            "batch": batch,
            "rounds": rounds,
            "contestant": label,
            "milliseconds": round(1000 * wall, 1),
            "ratio_to_fp32": round(wall / of_fp32[0], 3),
            "peak_memory_mb": round(memory[label] / 2**20, 1),
            "first_step_seconds": round(first[label], 2),
            "processor_milliseconds": round(1000 * processed, 1),
            "processor_ratio_to_fp32": round(processed / of_fp32[1], 3),
            "memory_ratio_to_fp32": round(memory[label] / memory["fp32"], 3),
            "pixels": PIXELS[name],
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "torch": torch.__version__,
        }
        for label, (wall, processed) in medians.items()
    ]


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processor."""
    started = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def peak_memory(step: Callable[[], None]) -> int:
    """The largest number of bytes that ``step`` holds at one time beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result")
    parser.add_argument("--networks", nargs="+", choices=PIXELS, default=["resnet20", "mobilenet_v2"])
    parser.add_argument("--bits", nargs="+", choices=BITS, default=["w4a4"])
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS + COMPILED, default=CONTESTANTS, help="fp32 among them"
    )
    parser.add_argument("--rounds", type=int, default=12, help="steps of each contestant that are timed")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for name, bits in itertools.product(arguments.networks, arguments.bits):
        new = measure(name, bits, arguments.rounds, arguments.batch, arguments.contestants)
        rows += new
        with open(arguments.csv, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"{name} {bits:8}{'ms':>16}{'ratio':>9}{'processor':>10}{'memory':>8}{'first step s':>14}")
        for row in new:
            ratios = [row[f"{kind}ratio_to_fp32"] for kind in ("", "processor_", "memory_")]
            print(f"{row['contestant']:24}{row['milliseconds']:8.1f}", *(f"{ratio:8.3f}" for ratio in ratios), end="")
            print(f"{row['first_step_seconds']:12.1f}", flush=True)


if __name__ == "__main__":
    main()
