"""What exports leave in a run folder: the cost of every exported file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError
from lqkd.runs.provenance import REPORTS
from lqkd.studies.results import Run
from lqkd.studies.tables import NONE
from lqkd.utils.files import is_own_file
from lqkd.utils.schema import EXPORT_REPORT, read_json

HEADINGS = (
    *("variant", "seed", "file", "kB", "weights packed, kB", "in float, kB", "million MACs", "million bit operations"),
    *("% of float", "ms an image", "others, ms", "peak memory, MB", "others, MB"),
)
LAYER_HEADINGS = ("layer", "W", "A", "weights", "packed, bytes", "MACs", "bit operations", "%")


@dataclass(frozen=True)
class ExportedFile:
    """The cost of a file that ``lqkd export`` wrote.

    Attributes:
        name: of the file.
        file_bytes, packed_bytes, float_bytes: of the file, of its weights in theory, and of those in float32.
        multiplications, bit_operations: for an image.
        float_share: its bit operations over those of the network in float32.
        milliseconds, peak_bytes: name of each network that was measured to its time for an image and to its peak
            memory; empty without ``--latency``.
        measured: how these were measured, and on what; empty likewise.
        layers: the cells of a table with the cost of each layer.
    """

    name: str
    file_bytes: int
    packed_bytes: int
    float_bytes: int
    multiplications: int
    bit_operations: int
    float_share: float
    milliseconds: dict[str, float]
    peak_bytes: dict[str, int]
    measured: str
    layers: tuple[tuple[str, ...], ...]

    @property
    def latency(self) -> float | None:
        """Its own milliseconds for an image."""
        return next((time for name, time in self.milliseconds.items() if name.startswith(self.name)), None)

    def cells(self) -> list[str]:
        """Its row of a table, from its name on."""
        sizes = (self.file_bytes, self.packed_bytes, self.float_bytes)
        return [
            self.name,
            *(f"{size / 1000:.1f}" for size in sizes),
            *(f"{count / 1e6:.1f}" for count in (self.multiplications, self.bit_operations)),
            f"{100 * self.float_share:.2f}",
            *self._own_and_others(self.milliseconds, 1.0, 2),
            *self._own_and_others(self.peak_bytes, 1e-6, 1),
        ]

    def _own_and_others(self, values: dict[str, Any], unit: float, digits: int) -> tuple[str, str]:
        shown = {name: f"{value * unit:.{digits}f}" for name, value in values.items()}
        own = next((text for name, text in shown.items() if name.startswith(self.name)), NONE)
        others = "; ".join(f"{name}: {text}" for name, text in shown.items() if not name.startswith(self.name))
        return own, others or NONE


def read_exports(folder: Path) -> list[ExportedFile]:
    """All exported files of a run, by name.

    Raises:
        UsageError: when a report is damaged.
    """
    found = []
    for path in sorted(folder.glob(REPORTS)):
        if not is_own_file(path, folder):
            continue
        report = read_json(path, EXPORT_REPORT)
        try:
            latency = report["latency"] or {}
            found.append(
                ExportedFile(
                    name=str(report["file"]),
                    file_bytes=int(report["file_bytes"]),
                    packed_bytes=int(report["packed_bytes"]),
                    float_bytes=int(report["float_bytes"]),
                    multiplications=int(report["multiplications"]),
                    bit_operations=int(report["bit_operations"]),
                    float_share=report["bit_operations"] / report["float_bit_operations"],
                    milliseconds={name: float(time) for name, time in latency.get("milliseconds", {}).items()},
                    peak_bytes={name: int(peak) for name, peak in latency.get("peak_bytes", {}).items()},
                    measured=_measured(latency),
                    layers=tuple(_layer_cells(layer) for layer in report["layers"]),
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"{str(path)!r} is damaged: it is not what export writes") from error
    return found


def _measured(latency: dict[str, Any]) -> str:
    if not latency:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in latency["versions"].items())
    return (
        f"Median of {latency['rounds']} alternated runs, threads: {latency['threads']}, images in a run: "
        f"{latency['batch']}, {latency['machine']}, {versions}"
    )


def _layer_cells(layer: dict[str, Any]) -> tuple[str, ...]:
    counts = (f"{layer[key]:,}" for key in ("weights", "packed_bytes", "multiplications", "bit_operations"))
    bits = (str(layer[key]) for key in ("weight_bits", "activation_bits"))
    return (str(layer["name"]), *bits, *counts, f"{100 * layer['share']:.1f}")


def export_rows(runs: Sequence[Run]) -> list[list[str]]:
    """A row under :data:`HEADINGS` for each exported file."""
    return [[run.variant, str(run.seed), *file.cells()] for run in runs for file in read_exports(run.folder)]


def measurements(runs: Sequence[Run]) -> list[str]:
    """How the times and memory of the exported files were measured, every way once."""
    told = (file.measured for run in runs for file in read_exports(run.folder))
    return [line for line in dict.fromkeys(told) if line]


def layer_tables(runs: Sequence[Run]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """What has these layers, such as ``kl seed 0: student.onnx``, to their rows under :data:`LAYER_HEADINGS`."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for run in runs:
        for file in read_exports(run.folder):
            groups.setdefault(file.layers, []).append(f"{run.variant} seed {run.seed}: {file.name}")
    return {", ".join(names): layers for layers, names in groups.items()}
