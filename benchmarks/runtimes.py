"""The table of runtimes in docs/export.md, from what other benchmarks measured.

    python -m benchmarks.runtimes

prints it; a test holds the page to it. Agreement is on test images that every student of the file named has seen
nothing of, speed that of the file over float32 in the same runtime, one image, one thread; both are the ends of what
the rows of the file say. Versions were tried on ResNet-20 at W4A4: the oldest and the newest that gave the same class
on 64 images, and the same bits where it is said.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
_NOTHING = "-"


@dataclass(frozen=True)
class Runtime:
    """A row of the table.

    Attributes:
        name: the runtime.
        formats: values of ``--format``.
        bits: of weights and activations that the file keeps.
        versions: that were tried.
        lost: what of the student the file has not, or what nobody has tried.
        files: rows of results, by name of the file and value of its column ``file``, where it has one.
    """

    name: str
    formats: str
    bits: str
    versions: str
    lost: str
    files: tuple[tuple[str, str | None], ...] = ()


RUNTIMES = (
    Runtime(
        "ONNX Runtime",
        "`portable`",
        "1 to 8, in 8",
        "1.18.1 (older ones do not know IR version 10) to 1.32.0: the same bits",
        "grids whose levels are not evenly spaced",
        (("onnx_parity_cifar10_cpu_ort1.32.0.csv", None), ("onnx_latency_resnet18_cpu_ort1.32.0.csv", None)),
    ),
    Runtime(
        "ONNX Runtime",
        "`packed4`, `packed2`",
        "weights of 4 or 2, activations in 8",
        "1.20.1 (`packed4`; older ones do not know INT4) to 1.32.0: the same bits",
        "speed: convolutions are computed in floating point",
    ),
    Runtime(
        "OpenVINO",
        "`openvino`",
        "1 to 8, in 8",
        "2023.3.0 to 2026.4.1, the oldest that was tried",
        "some students are rejected by their comparison; other plugins than that of x86 were not tried",
        (("openvino_files_cpu_openvino2026.4.1.csv", "openvino"),),
    ),
    Runtime(
        "TensorRT",
        "`tensorrt`",
        "weights 1 to 8, activations 8, in 8",
        "none: checked by NVIDIA's rules, run in ONNX Runtime",
        "activations of fewer bits; whatever a run in TensorRT would show",
    ),
    Runtime(
        "qonnx, FINN, hls4ml",
        "`qonnx`",
        "1 to 8, as they are",
        "qonnx 1.0",
        "its executor is for tests; FINN and hls4ml were not tried",
    ),
    Runtime(
        "PyTorch",
        "`torch`",
        "1 to 8, as they are",
        "2.7 to 2.14",
        "size: codes are kept as PyTorch has them",
    ),
    Runtime(
        "llama.cpp",
        "`gguf`",
        "weights of 2.06, 4.5 or 8.5",
        "xllamacpp 2026.10",
        "other networks than our GPT and Llamas: [language models](language_models.md)",
    ),
    Runtime(
        "transformers, vLLM",
        "`compressed-tensors`",
        "weights of 4 or 8",
        "transformers 5; vLLM was not tried",
        "other networks than Llamas; tied embeddings are kept whole",
    ),
)


def main() -> None:
    print(table())


def table() -> str:
    """The table as Markdown."""
    head = ("runtime", "`--format`", "bits, and in how many", "versions tried", "same class", "time over float32", "lost")
    rows = [head, ("---",) * len(head), *(_row(runtime) for runtime in RUNTIMES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(runtime: Runtime) -> tuple[str, ...]:
    found = [row for name, file in runtime.files for row in _rows(name, file)]
    same = [_share(row) for row in found if _share(row) is not None]
    times = [time for row in found if (time := _time(row)) is not None]
    agreement = _NOTHING if not same else _span([f"{100 * x:.1f} %" for x in sorted(s for s in same if s is not None)])
    speed = _NOTHING if not times else _span([f"{x:.2f}" for x in sorted(times)])
    return runtime.name, runtime.formats, runtime.bits, runtime.versions, agreement, speed, runtime.lost


def _rows(name: str, file: str | None) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if file is None or row["file"] == file]


def _share(row: dict[str, str]) -> float | None:
    """Of images with the same class in the file and in the deployed network."""
    if "top1_agreement_percent" in row:
        return float(row["top1_agreement_percent"]) / 100
    return float(row["same_class_file_and_deployed"]) if "same_class_file_and_deployed" in row else None


def _time(row: dict[str, str]) -> float | None:
    if "ratio_to_float32" in row:
        return float(row["ratio_to_float32"]) if row["contestant"] != "float32" else None
    if "milliseconds_float32" in row:
        return float(row["milliseconds"]) / float(row["milliseconds_float32"])
    return None


def _span(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


if __name__ == "__main__":
    main()
