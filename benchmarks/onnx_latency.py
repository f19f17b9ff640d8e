"""Latency of exported networks on integer kernels against float32 and ONNX Runtime's own static quantisation.

    python -m benchmarks.onnx_latency --csv FILE [--threads N] [--rounds N] [--bits w8a8] [--busy] [--only NETWORK ...]

torchvision's networks at 224 px, batch 1, with random weights and batch norm statistics of random images; grids of both
kinds of quantisation are fitted to the same images, and none of it changes the time. The float network is that of the
file, batch norms folded. Of ONNX Runtime's quantisation (QDQ, int8 weights by channel) the fastest of its usual
settings counts, found in a few rounds before. Then the three run in one process and in alternation; what counts is the
median over the rounds of one's time over another's in the same round. Other work on the machine is felt by all;
``--busy`` counts the processor's time of this process in place of the clock's.

Rows are written as soon as a network is done; networks that the file has with the same settings are not
measured again. Beside it, in a file that ends in ``.operators.csv``, stands how long each kind of operator took by ONNX
Runtime's profiler, at least: the sum over its nodes of the fastest of 60 runs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from benchmarks.regularizer_study import write_rows
from lqkd.export import check, deploy, floating, portable
from lqkd.export.deploy import INPUT
from lqkd.export.latency import alternate, machine, peak_memory, slowest_nodes
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm

NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")
FLOAT, STATIC, PORTABLE = "float32", "static", "portable"
SETTINGS: dict[str, dict[str, Any]] = {
    "u8s8": {"activation_type": QuantType.QUInt8},
    "s8s8": {"activation_type": QuantType.QInt8},
    "u8s8, products alone": {"activation_type": QuantType.QUInt8, "op_types_to_quantize": ["Conv", "Gemm", "MatMul"]},
}
"""Of ONNX Runtime's quantisation: its default for x86 and for others, and layers alone."""
CHOSEN_IN, SIZE, IMAGES = 10, 224, 8
FEWEST = 2
"""Rounds of which quartiles can be told."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--csv", type=Path, required=True, help="file for the result; networks that it has with these settings are kept"
    )
    parser.add_argument("--bits", default="w8a8", help="of the network; first and last layer keep 8")
    parser.add_argument("--threads", type=int, default=1, help="of each contestant")
    parser.add_argument("--rounds", type=int, default=100, help="runs of each contestant that are timed")
    parser.add_argument("--busy", action="store_true", help="count the time of the processor, not of the clock")
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=NETWORKS, help="networks; default: all")
    options = parser.parse_args()
    if options.rounds < FEWEST:
        parser.error(f"--rounds {options.rounds} is too few for quartiles: give {FEWEST} or more")
    operators = options.csv.with_suffix(".operators.csv")
    rows, kinds = _read(options.csv), _read(operators)
    for name in options.only:
        settings = {"network": name, "pixels": SIZE, "batch": 1, "threads": options.threads, "rounds": options.rounds}
        settings |= {"clock": "processor" if options.busy else "wall"}
        if has(rows, settings | {"contestant": PORTABLE, "bits": options.bits}):
            continue
        clock = time.process_time if options.busy else time.perf_counter
        models, setting, images = contestants(name, options.bits, options.threads, clock)
        one = Inputs.of(images[:1])
        times = alternate(models, one, threads=options.threads, rounds=options.rounds, clock=clock)
        for contestant, model in models.items():
            told = {FLOAT: "float32", STATIC: f"w8a8 ({setting})", PORTABLE: options.bits}[contestant]
            peak = peak_memory(model, one, options.threads)
            row = {"network": name, "bits": told} | {key: settings[key] for key in ("pixels", "batch", "threads")}
            row |= _summary(contestant, times) | {"peak_memory_mb": "" if peak is None else round(peak / 1e6, 1)}
            row |= {"clock": settings["clock"], "machine": machine()}
            row |= {of: metadata.version(of) for of in ("onnxruntime", "torch")}
            rows.append(row)
            same = {key: row[key] for key in ("network", "bits", "threads", "contestant")}
            if not has(kinds, same):
                kinds += [same | kind for kind in _by_kind(model, one, options.threads)]
            print(", ".join(f"{key} {row[key]}" for key in list(row)[5:-4]), f"({name}, {told})", flush=True)
        write_rows(options.csv, rows)
        write_rows(operators, kinds)


def has(rows: list[dict[str, Any]], wanted: dict[str, Any]) -> bool:
    """Whether a row of a file, or one that will be, has all values of ``wanted``."""
    return any(all(str(row[key]) == str(value) for key, value in wanted.items()) for row in rows)


def contestants(
    name: str, bits: str, threads: int, clock: Callable[[], float]
) -> tuple[dict[str, onnx.ModelProto], str, Tensor]:
    """The models by name, which setting of ONNX Runtime's quantisation is one of them, and images."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    network = getattr(torchvision.models, name)(weights=None).eval()
    reestimate_batchnorm(network, [images])
    student, _ = quantize_model(network, Recipe(bits=bits, residual_bits=8))
    initialize_quantizers(student.eval(), images)
    deployed = deploy(student, images[:2], [images], gates=True)
    plain, exported = floating.build(deployed).model, portable.build(deployed)
    parity = check(exported, deployed, images[:2])
    if parity.problem is not None:
        raise SystemExit(f"{name}: {parity.problem}")
    static = {setting: _static(plain, images, given) for setting, given in SETTINGS.items()}
    times = alternate(static, Inputs.of(images[:1]), threads=threads, rounds=CHOSEN_IN, clock=clock)
    chosen = min(times, key=lambda setting: statistics.median(times[setting]))
    return {FLOAT: plain, STATIC: static[chosen], PORTABLE: exported.model}, chosen, images


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Tensor) -> None:
        self.left = iter(images.numpy())

    def get_next(self) -> Any:
        image = next(self.left, None)
        return None if image is None else {INPUT: image[None]}


def _static(model: onnx.ModelProto, images: Tensor, setting: dict[str, Any]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, written = (str(Path(folder) / f"{step}.onnx") for step in ("given", "prepared", "written"))
        onnx.save(model, given)
        quant_pre_process(given, prepared)
        settings = {"per_channel": True, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ} | setting
        quantize_static(prepared, written, _Reader(images), **settings)
        return onnx.load(written)


def _summary(contestant: str, times: dict[str, list[float]]) -> dict[str, Any]:
    own = times[contestant]
    row: dict[str, Any] = {"rounds": len(own), "contestant": contestant}
    row |= {"milliseconds": round(statistics.median(own), 3), "fastest": round(min(own), 3)}
    for base in (FLOAT, STATIC):
        ratios = [mine / theirs for mine, theirs in zip(own, times[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row |= {f"ratio_to_{base}": round(middle, 4), f"ratio_to_{base}_quartiles": f"{low:.3f} to {high:.3f}"}
    return row


def _by_kind(model: onnx.ModelProto, one: Inputs, threads: int) -> list[dict[str, Any]]:
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _, kind, milliseconds in slowest_nodes(model, one, threads, runs=60):
        count[kind] += 1
        total[kind] += milliseconds  # type: ignore[assignment]
    return [{"operator": kind, "nodes": count[kind], "milliseconds": round(ms, 3)} for kind, ms in total.most_common()]


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


if __name__ == "__main__":
    main()
