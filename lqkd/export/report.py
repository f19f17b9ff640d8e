"""What an exported file costs: bytes, multiply-accumulates, bit operations and, on request, time and memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from lqkd.export import floating
from lqkd.export.card import Summary
from lqkd.export.deploy import Deployed
from lqkd.export.latency import Latency, measure
from lqkd.models.calls import Inputs
from lqkd.quantization import float_mode, layer_costs
from lqkd.quantization.computed import copy_of
from lqkd.quantization.recipe import FLOAT_BITS
from lqkd.runs.provenance import FLOAT_ONNX
from lqkd.utils.files import write_json
from lqkd.utils.progress import Progress
from lqkd.utils.tables import print_table

SUFFIX = ".report.json"
SHOWN_LAYERS = 12
"""Layers on the screen; the file has all."""


def report_path(file: Path) -> Path:
    """The report beside an exported file."""
    return file.with_name(f"{file.name}{SUFFIX}")


def describe(
    student: nn.Module, inputs: Inputs, summary: Summary, described: dict[str, Any], latency: Latency | None = None
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        student: as it was trained.
        inputs: of one sample, for the size of what layers see.
        summary: of the written file.
        described: what the file says about itself, of which its format and checkpoint are kept.
        latency: where it was measured.
    """
    layers = layer_costs(student, *inputs.args, keywords=inputs.keywords)
    image = inputs.alone()
    total = sum(layer.bit_operations for layer in layers)
    multiplications = sum(layer.multiplications for layer in layers)
    return {
        "file": summary.path.name,
        "format": described["format"],
        "checkpoint": described.get("checkpoint"),
        "measured": {
            "value": described["parity"]["exported"],
            "metric": described["parity"]["metric"],
            "split": described["parity"]["split"],
        },
        "file_bytes": summary.file_bytes,
        "packed_bytes": summary.packed_bytes,
        "float_bytes": summary.float_bytes,
        "image_shape": None if image is None else list(image.shape[1:]),
        "multiplications": multiplications,
        "bit_operations": total,
        "float_bit_operations": multiplications * FLOAT_BITS**2,
        "layers": [
            asdict(layer) | {"bit_operations": layer.bit_operations, "share": layer.bit_operations / total}
            for layer in layers
        ],
        "latency": None if latency is None else asdict(latency),
    }


def write(report: dict[str, Any], file: Path) -> Path:
    """Write the report beside ``file``, complete or not at all, and return its path."""
    write_json(report_path(file), report)
    return report_path(file)


def measure_latency(
    exported: onnx.ModelProto | nn.Module, name: str, deployed: Deployed, student: nn.Module, inputs: Inputs
) -> Latency:
    """Time the exported network against the same in float32 ONNX and in PyTorch, one sample and one thread each.

    Args:
        exported: what was exported, as it runs.
        name: what to call it.
        deployed: the network that it was made of.
        student: as it was trained; timed in float32 and with its quantizers, which PyTorch only simulates.
        inputs: of one sample.
    """
    plain = copy_of(student).eval()
    with float_mode(plain), Progress("timing the file and its network in other forms") as bar:
        contestants: dict[str, onnx.ModelProto | nn.Module] = {
            FLOAT_ONNX: floating.build(deployed).model,
            name: exported,
            "float32 PyTorch": plain,
            "PyTorch with simulated quantization": copy_of(student).eval(),
        }
        return measure(contestants, inputs, progress=bar.update)


def tell(report: dict[str, Any], file: Path) -> None:
    """Print the report and write it beside ``file``."""
    print_report(report)
    write(report, file)


def print_report(report: dict[str, Any]) -> None:
    """Print the layers that cost most and, where measured, the times."""
    share = report["bit_operations"] / report["float_bit_operations"]
    operations = f"{report['bit_operations']:.4g} bit operations ({share:.2%} of float)"
    rows: list[tuple[str, ...]] = []
    layers = sorted(report["layers"], key=lambda layer: -layer["share"])
    for layer in layers[:SHOWN_LAYERS]:
        bits = "".join(f"{kind}{layer[key]}" for kind, key in (("W", "weight_bits"), ("A", "activation_bits")))
        cells = (f"{layer['weights']:,}", f"{layer['multiplications']:.3g}", f"{layer['share']:.1%}")
        rows.append((layer["name"], bits, *cells))
    if len(layers) > SHOWN_LAYERS:
        rest = sum(layer["share"] for layer in layers[SHOWN_LAYERS:])
        rows.append((f"{len(layers) - SHOWN_LAYERS} more", "", "", "", f"{rest:.1%}"))
    title = f"{report['multiplications']:.4g} MACs, {operations}"
    print_table(title, ("layer", "bits", "weights", "MACs", "bit operations"), rows, left=2)
    if report["latency"] is not None:
        _print_latency(report["latency"])


def _print_latency(latency: dict[str, Any]) -> None:
    title = (
        f"median of {latency['rounds']} alternated runs of {latency['batch']} sample, "
        f"{latency['threads']} thread, {latency['machine']}"
    )
    rows = []
    for name, value in latency["milliseconds"].items():
        peak = latency["peak_bytes"].get(name)
        memory = "" if peak is None else f"{peak / 1e6:.1f} MB"
        rows.append((name, f"{value:.3f}", f"{latency['ratios'][name]:.2f}x", memory))
    print_table(title, ("network", "ms", f"of {next(iter(latency['ratios']))}", "peak memory"), rows)
