"""The cost of quantization-aware training: one training step at W4A4 against the same step in fp32 and by others.

    python -m benchmarks.qat_step --json FILE [--networks resnet20 mobilenet_v2] [--rounds N] [--batch B]

All contestants run in one process and in alternation, since timings on shared machines drift; what counts are the
ratios of the medians. Every convolution and linear layer is quantised. Memory is the peak of what one step allocates on
top of network and optimizer, by PyTorch's own profiler. Brevitas takes part where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lqkd.models import CifarResNet, build_model
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, quantizers

RECIPE = Recipe(bits="w4a4", weight_quantizer="lsq", activation_quantizer="lsq", first_layer_bits=4, last_layer_bits=4)

NETWORKS = ["resnet20", "mobilenet_v2"]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20) if name == "resnet20" else build_model("torchvision/mobilenet_v2", num_classes=10)


def lqkd_network(name: str, images: Tensor) -> nn.Module:
    model, _ = quantize_model(network(name), RECIPE)
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


def with_quantizers(kind: type[EagerLSQ], name: str, images: Tensor) -> nn.Module:
    """The network of lqkd with each of its quantizers replaced by another implementation of the same grid."""
    model = lqkd_network(name, images)
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


def contestants(name: str, images: Tensor) -> dict[str, nn.Module]:
    made: dict[str, Callable[[], nn.Module]] = {
        "fp32": lambda: network(name),
        "lqkd": lambda: lqkd_network(name, images),
        "eager LSQ": lambda: with_quantizers(EagerLSQ, name, images),
        "ATen learnable": lambda: with_quantizers(ATenLearnable, name, images),
        "Brevitas": lambda: brevitas_network(name, images),
    }
    models = {}
    for label, make in made.items():
        try:
            models[label] = make()
        except ImportError as error:
            print(f"{label} left out: {error}")
    return models


def measure(name: str, rounds: int, batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    images = torch.randn(batch, 3, 32, 32) if name == "resnet20" else torch.randn(batch, 3, 64, 64)
    labels = torch.randint(10, (batch,))
    steps: dict[str, Callable[[], None]] = {}
    for label, model in contestants(name, images).items():
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        steps[label] = step
    first = {label: seconds(step) for label, step in steps.items()}  # lqkd's compiles its kernels
    for run in steps.values():
        run()
    memory = {label: round(peak_memory(step) / 2**20, 1) for label, step in steps.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, run in steps.items():
            times[label].append(seconds(run))
    medians = {label: statistics.median(values) for label, values in times.items()}
    return {
        "network": name,
        "batch": batch,
        "rounds": rounds,
        "milliseconds": {label: round(1000 * value, 1) for label, value in medians.items()},
        "ratio_to_fp32": {label: round(value / medians["fp32"], 3) for label, value in medians.items()},
        "first_step_seconds": {label: round(value, 2) for label, value in first.items()},
        "peak_memory_mb": memory,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def peak_memory(step: Callable[[], None]) -> int:
    """The largest number of bytes that ``step`` holds at one time beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=12, help="steps of each contestant that are timed")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    arguments = parser.parse_args()
    results = []
    for name in arguments.networks:
        result = measure(name, arguments.rounds, arguments.batch)
        results.append(result)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{name:16}{'ms':>8}{'ratio':>8}{'MB':>8}{'first step s':>14}")
        for label, milliseconds in result["milliseconds"].items():
            ratio, memory = result["ratio_to_fp32"][label], result["peak_memory_mb"][label]
            print(f"{label:16}{milliseconds:8.1f}{ratio:8.2f}{memory:8.1f}{result['first_step_seconds'][label]:14.1f}")


if __name__ == "__main__":
    main()
