"""What OpenVINO, LiteRT, ExecuTorch and ncnn compute of the files of trained students, and how long it takes.

    LQKD_DATA=FOLDER python -m benchmarks.runtime_files RUNTIME --csv FILE --cifar10 DIR --fashion DIR --keep DIR

RUNTIME is openvino, litert, executorch or ncnn; the students are those of :mod:`benchmarks.trained_students`, for ncnn
trained with its target. Each file is proven as an export proves it, layer by layer on 32 test images and by whole
answers on 1,000, and timed in alternation with a float32 file of the same layers in the same runtime: one image, one
thread, the median of 300 rounds. Trained networks are kept in a folder and read from it in the next run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.regularizer_study import write_rows
from benchmarks.trained_students import NETWORKS, Trained, students
from lqkd.export import check, executorch, floating, litert, ncnn, openvino
from lqkd.export.deploy import Deployed
from lqkd.export.executorch_file import lowered
from lqkd.export.executorch_proof import ExecuTorchRunner, check_executorch
from lqkd.export.executorch_writer import EXECUTORCH
from lqkd.export.executorch_writer import Writer as ExecuTorchWriter
from lqkd.export.formats import deployed_for
from lqkd.export.integer import IntegerConv
from lqkd.export.latency import machine
from lqkd.export.litert_proof import LiteRTRunner, check_litert
from lqkd.export.litert_runner import Interpreted
from lqkd.export.litert_values import CHANNELS_LAST, Pending, real_bias_of
from lqkd.export.litert_writer import Writer
from lqkd.export.ncnn_proof import NcnnRunner, check_ncnn
from lqkd.export.ncnn_writer import Writer as NcnnWriter
from lqkd.export.nodes import Operation
from lqkd.export.parity import Parity
from lqkd.export.reference import Reference
from lqkd.models.calls import Inputs

ROUNDS, EXAMPLE, BATCH = 300, 32, 50
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Judged:
    """A file in its runtime.

    Attributes:
        parity: what its proof found.
        run, run_float: compute the answer for one image by it, and by a float32 file of the same layers.
        further: columns that only this runtime has.
    """

    parity: Parity
    run: Callable[[], Any]
    run_float: Callable[[], Any]
    further: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("--csv", type=Path, required=True, help="file for the results")
    parser.add_argument("--cifar10", required=True, help="folder with CIFAR-10")
    parser.add_argument("--fashion", required=True, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--keep", type=Path, required=True, help="folder for trained networks")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    judge, package = RUNTIMES[options.runtime]
    target = options.runtime if options.runtime == ncnn.NCNN else None
    rows: list[dict[str, Any]] = []
    roots = {"CIFAR-10": options.cifar10, "Fashion-MNIST": options.fashion}
    for trained in students(roots, options.keep, options.only, target):
        deployed = deployed_for(options.runtime, trained.student, trained.test[:EXAMPLE], trained.calibration)
        batches = list(zip(trained.test.split(BATCH), trained.labels.split(BATCH), strict=True))
        judged = judge(trained, deployed, batches)
        parity, milliseconds = judged.parity, _milliseconds(judged.run, judged.run_float)
        rows.append(
            {
                "network": trained.name,
                "data": NETWORKS[trained.name],
                "bits": trained.bits,
                "images": parity.samples,
                "accuracy_trained": parity.trained,
                "accuracy_deployed": parity.deployed,
                "accuracy_file": parity.exported,
                "same_class_file_and_deployed": parity.agreement,
                "same_class_deployed_and_trained": parity.agreement_with_trained,
                "codes_apart": max(row.fraction for row in parity.optimised or parity.unoptimised),
                "passed": parity.problem is None,
                "problem": parity.problem or "",
                **judged.further,
                "milliseconds": round(milliseconds[0], 3),
                "milliseconds_float32": round(milliseconds[1], 3),
                "machine": machine(),
                "runtime": f"{package} {metadata.version(package)}",
                "torch": torch.__version__.partition("+")[0],
            }
        )
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        write_rows(options.csv, rows)


def _in_openvino(trained: Trained, deployed: Deployed, batches: Batches) -> Judged:
    file = openvino.build(deployed)
    example, image = trained.test[:EXAMPLE], trained.test[:1].numpy()
    parity = check(file, deployed, example, batches, trained.student, runner=openvino.OpenVINORunner)
    runs = [openvino.compile_model(model, threads=1) for model in (file.model, floating.build(deployed).model)]
    return Judged(parity, lambda: runs[0](image), lambda: runs[1](image), {})


def _in_litert(trained: Trained, deployed: Deployed, batches: Batches) -> Judged:
    written, plain = litert.build(deployed), FloatWriter(deployed).build()
    parity = check_litert(written, deployed, trained.test[:EXAMPLE], batches, trained.student)
    own = LiteRTRunner(written, deployed, delegated=False)(Inputs.of(trained.test))["logits"].argmax(1)
    pytorch = torch.cat([Reference(deployed.network)(images).argmax(1) for images, _ in batches]).numpy()
    image = [trained.test[:1].permute(CHANNELS_LAST).numpy()]
    runs = [Interpreted(one.content) for one in (written, plain)]
    further = {
        "accuracy_without_delegates": float((own == trained.labels.numpy()).mean()),
        "same_class_without_delegates_and_deployed": float((own == pytorch).mean()),
        "codes_apart_without_delegates": max(row.fraction for row in parity.unoptimised),
        "bytes": len(written.content),
        "bytes_float32": len(plain.content),
    }
    return Judged(parity, lambda: runs[0](image), lambda: runs[1](image), further)


def _in_executorch(trained: Trained, deployed: Deployed, batches: Batches) -> Judged:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    written = executorch.build(deployed)
    plain = lowered(ExecuTorchFloatWriter(deployed).build().module, written.example)
    parity = check_executorch(written, deployed, trained.test[:EXAMPLE], batches, trained.student)
    _unsafe_reset_threadpool(1)
    image = Inputs.of(trained.test[:1])
    runs = [ExecuTorchRunner(one, deployed) for one in (written.content, plain)]
    further = {
        "not_delegated": sum(name == "not delegated" for name, _ in executorch.kernels(written.content).floats),
        "bytes": len(written.content),
        "bytes_float32": len(plain),
    }
    return Judged(parity, lambda: runs[0](image), lambda: runs[1](image), further)


def _in_ncnn(trained: Trained, deployed: Deployed, batches: Batches) -> Judged:
    written, plain = ncnn.build(deployed), NcnnFloatWriter(deployed).build()
    parity = check_ncnn(written, deployed, trained.test[:EXAMPLE], batches, trained.student)
    image = Inputs.of(trained.test[:1])
    runs = [NcnnRunner(one, deployed) for one in (written, plain)]
    further = {
        "products_in_int8": sum(ncnn.kernels(written).integer.values()),
        "products_in_float32": len(ncnn.kernels(written).float_products),
        "bytes": len(written.content),
        "bytes_float32": len(plain.content),
    }
    return Judged(parity, lambda: runs[0](image), lambda: runs[1](image), further)


RUNTIMES: dict[str, tuple[Callable[[Trained, Deployed, Batches], Judged], str]] = {
    openvino.OPENVINO: (_in_openvino, openvino.OPENVINO),
    litert.LITERT: (_in_litert, litert.PACKAGE),
    EXECUTORCH: (_in_executorch, EXECUTORCH),
    ncnn.NCNN: (_in_ncnn, ncnn.NCNN),
}
"""How the file of a student is judged, and the package that has the runtime, by the names of formats."""


def _milliseconds(*runs: Callable[[], Any]) -> list[float]:
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for taken, run in zip(times, runs, strict=True):
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return [1000 * statistics.median(taken) for taken in times]


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


class ExecuTorchFloatWriter(ExecuTorchWriter):
    """Likewise in ExecuTorch."""

    def _grid(self, node: fx.Node, found: Operation) -> Any:
        return self.values[found.inputs[0]]

    def _layer(self, node: fx.Node, found: Operation) -> fx.Node:
        layer, name = found.settings["module"], str(node.target)
        weight, bias = self._held(f"{name}.weight", layer.float_weight()), layer.float_bias()
        held = None if bias is None else self._held(f"{name}.bias", bias)
        return self._product(layer, self.values[found.inputs[0]], weight, held)


class NcnnFloatWriter(NcnnWriter):
    """Likewise in ncnn."""

    def _grid(self, node: fx.Node, found: Operation) -> None:
        self._clamped(node, found.inputs[0], None, None)


if __name__ == "__main__":
    main()
