"""What LiteRT computes of exported files against the students they were made of, and how long it takes.

    LQKD_DATA=FOLDER python -m benchmarks.litert_files --csv FILE --cifar10 DIR --fashion DIR --keep DIR

The networks and data are those of :mod:`benchmarks.openvino_files`, the MobileNets with half of the images; students of
W4A4 have been trained with simulated quantization, ResNet-20 for 60 steps, the MobileNets for 75, those of W8A8 are
fitted alone. The file is judged on 1,000 test images, as XNNPACK computes it and as the interpreter's own kernels do,
and timed in alternation with a float32 TFLite file of the same layers, both with XNNPACK, one image, one thread: the
median of the rounds. Trained networks are kept in a folder and read from it in the next run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from benchmarks.openvino_files import BATCH, measure
from lqkd.export import deploy, litert
from lqkd.export.integer import IntegerConv
from lqkd.export.latency import machine
from lqkd.export.litert_proof import LiteRTRunner, check_litert
from lqkd.export.litert_runner import Interpreted
from lqkd.export.litert_values import CHANNELS_LAST, Pending, real_bias_of
from lqkd.export.litert_writer import Writer
from lqkd.export.nodes import Operation
from lqkd.export.reference import Reference
from lqkd.models.calls import Inputs

EPOCHS = {"CIFAR-10": 4, "Fashion-MNIST": 3}
"""Of W4A4 with simulated quantization."""
TRAINED_ON = 3200
"""Images at most; CIFAR-10's are 1,920."""
ROUNDS = 300


def main() -> None:
    measure(__doc__, compare, EPOCHS, TRAINED_ON)


def compare(student: nn.Module, x: Tensor, test: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The row of a student."""
    deployed = deploy(student, test[:32], [x[i * BATCH : (i + 1) * BATCH] for i in range(8)])
    written = litert.build(deployed)
    plain = FloatWriter(deployed).build().content
    batches = list(zip(test.split(50), labels.split(50), strict=True))
    parity = check_litert(written, deployed, test[:32], batches, student)
    own = _classes(LiteRTRunner(written, deployed, delegated=False), test)
    image = np.ascontiguousarray(test[:1].permute(CHANNELS_LAST).numpy())
    runs = {name: Interpreted(content) for name, content in {"file": written.content, "float": plain}.items()}
    times = medians({name: partial(run, [image]) for name, run in runs.items()})
    pytorch = Reference(deployed.network)(test).argmax(1)
    return [
        {
            "images": parity.samples,
            "accuracy_trained": parity.trained,
            "accuracy_deployed": parity.deployed,
            "accuracy_file": parity.exported,
            "same_class_file_and_deployed": parity.agreement,
            "same_class_deployed_and_trained": parity.agreement_with_trained,
            "accuracy_without_delegates": float((own == labels).double().mean()),
            "same_class_without_delegates_and_deployed": float((own == pytorch).double().mean()),
            "codes_apart": max(row.fraction for row in parity.optimised),
            "codes_apart_without_delegates": max(row.fraction for row in parity.unoptimised),
            "passed": parity.problem is None,
            "bytes": len(written.content),
            "bytes_float32": len(plain),
            "milliseconds": round(times["file"], 3),
            "milliseconds_float32": round(times["float"], 3),
            "machine": machine(),
            "ai_edge_litert": metadata.version("ai-edge-litert"),
            "torch": torch.__version__.partition("+")[0],
        }
    ]


class FloatWriter(Writer):
    """The layers of a deployed network in float32, without its grids."""

    def _grid(self, node: fx.Node, found: Operation) -> Any:
        return self.values[found.inputs[0]]

    def _layer(self, node: fx.Node, found: Operation) -> Pending:
        layer, label = found.settings["module"], self.label(node)
        weight = layer.float_weight()
        if isinstance(layer, IntegerConv):
            depthwise = self._is_depthwise(node, layer)
            weight = weight.permute((1, 2, 3, 0) if depthwise else CHANNELS_LAST).contiguous()
        bias = real_bias_of(layer)
        held = self.file.tensor(f"{label}.weight", weight.shape, "float32", data=weight.numpy())
        added = self.file.tensor(f"{label}.bias", bias.shape, "float32", data=bias)
        made = self.floats(label, self._shape_of_result(node))
        return self.quantized(node, self._product(node, layer, self.real(found.inputs[0]), held, added, made, False))

    def _add(self, node: fx.Node, found: Operation) -> Pending:
        made = self.floats(self.label(node), self._shape_of_result(node))
        operands = [self.real(x) for x in found.inputs]
        return self.quantized(
            node, self.file.operator(found.kind.upper(), operands, made, f"{found.kind.title()}Options")
        )

    _mul = _add


def _classes(run: LiteRTRunner, test: Tensor) -> Tensor:
    return torch.from_numpy(run(Inputs.of(test))["logits"]).argmax(1)


def medians(runs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of the milliseconds that each of ``runs`` takes, in alternation."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
