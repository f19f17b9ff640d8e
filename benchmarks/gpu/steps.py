"""Stage: what one step costs: float against W4A4, float32 against bfloat16, eager, as a graph, compiled, and others'.

ResNet-20, batches of 128. The distillation steps are those of benchmarks.distill_step, with ResNet-56 asked live and
from a cache. Linear layers of 1024 at W4A8 are compared with torchao, which trains no convolutions.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import distill_step, qat_step
from benchmarks.gpu.plan import BATCH, UNFINISHED, settings_of, stage_parser
from benchmarks.gpu.results import FAILED, Clock, Table, device, machine, synchronize, why
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.teachers.cache import TeacherCache

Step = Callable[[], Any]
MILLISECONDS = ("milliseconds", "first_step_milliseconds")


class OnlyOnGPU(Exception):
    """The contestant makes no sense on this machine."""


def training_step(model: nn.Module, images: Tensor, labels: Tensor, *, bf16: bool = False) -> Step:
    """Forward, backward and SGD."""
    model.to(images.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def graphed(step: Step) -> Step:
    """The same as a CUDA graph.

    Raises:
        OnlyOnGPU: elsewhere.
    """
    if not torch.cuda.is_available():
        raise OnlyOnGPU("needs CUDA")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def compiled(model: nn.Module) -> nn.Module:
    """The model through torch.compile.

    Raises:
        OnlyOnGPU: on a CPU, where compiling takes minutes.
    """
    if not torch.cuda.is_available():
        raise OnlyOnGPU("needs CUDA")
    model.compile()
    return model


def linear_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def linear_lqkd(x: Tensor) -> nn.Module:
    recipe = Recipe(bits="w4a8", first_layer_bits=None, last_layer_bits=None)
    model, _ = quantize_model(linear_network(), recipe)
    initialize_quantizers(model, x)
    return model


def linear_torchao() -> nn.Module:
    """Dynamic 8-bit activations a token, 4-bit weights in groups of 32, by torchao's own fake quantization."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = linear_network()
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)  # type: ignore[attr-defined]
    quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return model


def contestants(batch: int, target: torch.device, folder: str) -> dict[tuple[str, str], Callable[[], Step]]:
    """How each step is made, by what is trained and how; the most telling first."""
    torch.manual_seed(1)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    there = images.to(target), labels.to(target)
    rows = torch.randn(8 * batch, 1024)
    of_rows = rows.to(target), torch.randint(10, (8 * batch,)).to(target)
    float_network, w4a4 = partial(qat_step.network, "resnet20"), partial(qat_step.lqkd_network, "resnet20", images)

    def conv(make: Callable[[], nn.Module], **options: Any) -> Step:
        return training_step(make(), *there, **options)

    def linear(make: Callable[[], nn.Module]) -> Step:
        return training_step(make(), *of_rows)

    def distillation(cached: bool) -> Step:
        cache = TeacherCache(folder) if cached else None
        return distill_step.lqkd_step(*there, None, cache, True)

    return {
        ("float", "fp32"): lambda: conv(float_network),
        ("W4A4 lqkd", "fp32"): lambda: conv(w4a4),
        ("float", "bf16"): lambda: conv(float_network, bf16=True),
        ("W4A4 lqkd", "bf16"): lambda: conv(w4a4, bf16=True),
        ("float", "bf16, graph"): lambda: graphed(conv(float_network, bf16=True)),
        ("W4A4 lqkd", "bf16, graph"): lambda: graphed(conv(w4a4, bf16=True)),
        ("W4A4 ATen learnable", "fp32"): lambda: conv(
            partial(qat_step.with_quantizers, qat_step.ATenLearnable, "resnet20", images)
        ),
        ("W4A4 eager LSQ", "fp32"): lambda: conv(
            partial(qat_step.with_quantizers, qat_step.EagerLSQ, "resnet20", images)
        ),
        ("W4A4 Brevitas", "fp32"): lambda: conv(partial(qat_step.brevitas_network, "resnet20", images)),
        ("plain distillation", "fp32"): lambda: distill_step.naive_step(*there, torch.channels_last),
        ("W4A4 distilled by lqkd, live teacher", "fp32"): lambda: distillation(cached=False),
        ("W4A4 distilled by lqkd, cached teacher", "fp32"): lambda: distillation(cached=True),
        ("linear float", "fp32"): lambda: linear(linear_network),
        ("linear W4A8 lqkd", "fp32"): lambda: linear(partial(linear_lqkd, rows)),
        ("linear W4A8 torchao", "fp32"): lambda: linear(linear_torchao),
        ("float", "bf16, compiled"): lambda: conv(lambda: compiled(float_network()), bf16=True),
        ("W4A4 lqkd", "bf16, compiled"): lambda: conv(lambda: compiled(w4a4()), bf16=True),
    }


def measure(step: Step, rounds: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a step, in the median over rounds of ``steps``, and of the first one."""
    started = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - started
    times = []
    for _ in range(rounds + 1):  # the first round warms up
        started = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        times.append((time.perf_counter() - started) / steps)
    return 1000 * statistics.median(times[1:]), 1000 * first


def main() -> int:
    arguments = stage_parser(__doc__ or "").parse_args()
    clock, settings, target = Clock(arguments.seconds), settings_of(arguments.out), device()
    table = Table(arguments.out / "steps.csv", "step", "how")
    rounds, steps = (5, 20) if settings.whole else (1, 1)
    with tempfile.TemporaryDirectory() as folder:
        made = contestants(BATCH if settings.whole else 4, target, folder)
        for (name, how), make in made.items():
            if table.has(name, how) or clock.left() < 0:
                continue
            row: dict[str, Any] = {
                "step": name,
                "how": how,
                "milliseconds": "",
                "first_step_milliseconds": "",
                "note": "",
            }
            try:
                step = make()
                first, median = measure(step, rounds, steps)
                row |= {"milliseconds": round(median, 3), "first_step_milliseconds": round(first, 1)}
            except OnlyOnGPU as reason:
                row["note"] = f"left out: {reason}"
            except ImportError as error:
                row["note"] = f"left out: {why(error)}"
            except Exception as error:
                row["note"] = f"{FAILED}{why(error)}"
            table.add(row | machine())
    return 0 if all(table.has(*key) for key in made) else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
