"""What ExecuTorch computes of exported files against the students they were made of, and how long it takes.

    LQKD_DATA=FOLDER python -m benchmarks.executorch_files --csv FILE --cifar10 DIR --keep DIR

The students are those of :mod:`benchmarks.litert_files`, of ResNet-20 alone: W4A4 trained for 60 steps, W8A8 fitted
alone. The file is judged on 1,000 test images and timed in alternation with the same layers in float32, both by
XNNPACK, one image, one thread: the median of the rounds. Trained networks are kept in a folder and read from it in the
next run.
"""

from __future__ import annotations

from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.litert_files import EPOCHS, TRAINED_ON, medians
from benchmarks.openvino_files import BATCH, measure
from lqkd.export import deploy, executorch
from lqkd.export.executorch_file import lowered
from lqkd.export.executorch_proof import ExecuTorchRunner, check_executorch
from lqkd.export.executorch_writer import Writer
from lqkd.export.latency import machine
from lqkd.export.nodes import Operation
from lqkd.models.calls import Inputs

NETWORKS = ("resnet20",)


def main() -> None:
    measure(__doc__, compare, EPOCHS, TRAINED_ON, NETWORKS)


def compare(student: nn.Module, x: Tensor, test: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The row of a student."""
    deployed = deploy(student, test[:32], [x[i * BATCH : (i + 1) * BATCH] for i in range(8)])
    written = executorch.build(deployed)
    plain = lowered(FloatWriter(deployed).build().module, written.example)
    batches = list(zip(test.split(50), labels.split(50), strict=True))
    parity = check_executorch(written, deployed, test[:32], batches, student)
    times = _times({"file": written.content, "float": plain}, deployed, Inputs.of(test[:1]))
    return [
        {
            "images": parity.samples,
            "accuracy_trained": parity.trained,
            "accuracy_deployed": parity.deployed,
            "accuracy_file": parity.exported,
            "same_class_file_and_deployed": parity.agreement,
            "same_class_deployed_and_trained": parity.agreement_with_trained,
            "codes_apart": max(row.fraction for row in parity.unoptimised),
            "not_delegated": sum(name == "not delegated" for name, _ in executorch.kernels(written.content).floats),
            "passed": parity.problem is None,
            "bytes": len(written.content),
            "bytes_float32": len(plain),
            "milliseconds": round(times["file"], 3),
            "milliseconds_float32": round(times["float"], 3),
            "machine": machine(),
            "executorch": metadata.version("executorch"),
            "torch": torch.__version__.partition("+")[0],
        }
    ]


class FloatWriter(Writer):
    """The layers of a deployed network in float32, without its grids."""

    def _grid(self, node: fx.Node, found: Operation) -> Any:
        return self.values[found.inputs[0]]

    def _layer(self, node: fx.Node, found: Operation) -> fx.Node:
        layer, name = found.settings["module"], str(node.target)
        weight, bias = self._held(f"{name}.weight", layer.float_weight()), layer.float_bias()
        held = None if bias is None else self._held(f"{name}.bias", bias)
        return self._product(layer, self.values[found.inputs[0]], weight, held)


def _times(files: dict[str, bytes], deployed: Any, image: Inputs) -> dict[str, float]:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(1)
    return medians({name: partial(ExecuTorchRunner(file, deployed), image) for name, file in files.items()})


if __name__ == "__main__":
    main()
