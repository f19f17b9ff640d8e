"""The table of runtimes in docs/export.md, from what other benchmarks measured.

    python -m benchmarks.runtimes

prints it; a test holds the page to it. Agreement is with the deployed network on test images, speed that of the file
over float32 in the same runtime, one image, one thread; both are the ends of what was measured of files that pass their
comparison, of which the table says how many do. Versions were tried on a ResNet at W4A4 with random weights: the oldest
and the newest that gave the same class on 64 images, and the same bits where it is said.
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
        files: of results, and the values that columns of their rows have.
    """

    name: str
    formats: str
    bits: str
    versions: str
    lost: str
    files: tuple[tuple[str, dict[str, str]], ...] = ()


RUNTIMES = (
    Runtime(
        "ONNX Runtime",
        "`portable`",
        "1 to 8, in 8",
        "1.18.1 (1.16.3 does not know IR version 10), 1.20.1, 1.32.0: the same bits",
        "grids whose levels are not evenly spaced",
        (
            ("onnx_parity_cifar10_cpu_ort1.32.0.csv", {"integer_biases": "yes"}),
            ("onnx_latency_resnet18_cpu_ort1.32.0.csv", {"contestant": "portable"}),
            ("onnx_latency_xeon_cpu_ort1.32.0.csv", {"contestant": "portable"}),
            ("onnx_latency_xeon_again_cpu_ort1.32.0.csv", {"contestant": "portable"}),
            ("onnx_latency_epyc_cpu_ort1.32.0.csv", {"contestant": "portable"}),
        ),
    ),
    Runtime(
        "ONNX Runtime",
        "`packed4`, `packed2`",
        "weights of 4 or 2, activations in 8",
        "`packed4` 1.20.1 (older ones do not know INT4) to 1.32.0: the same bits; `packed2` 1.32.0",
        "speed: convolutions are computed in floating point",
    ),
    Runtime(
        "OpenVINO",
        "`openvino`",
        "1 to 8, in 8",
        "2023.3.0 (no older one was tried), 2024.6.0, 2025.3.0, 2026.4.1",
        "other plugins than that of x86 were not tried",
        (
            ("openvino_files_cpu_openvino2026.4.1.csv", {"file": "openvino", "network": "resnet20"}),
            ("trained_files_cpu_openvino2026.4.1.csv", {}),
        ),
    ),
    Runtime(
        "LiteRT",
        "`litert`",
        "weights 1 to 8, activations 2 to 8, in 8",
        "1.4.0 (1.0.1 does not take the file), 2.0.3, 2.3.0",
        "layers in floating point beside the last, and batches; phones' delegates were not tried",
        (
            ("litert_files_cpu_litert2.3.0.csv", {"network": "resnet20"}),
            ("trained_files_cpu_litert2.3.0.csv", {}),
        ),
    ),
    Runtime(
        "ExecuTorch",
        "`executorch`",
        "weights 1 to 8, activations 2 to 8, in 8",
        "1.5.1",
        "batches; the last layer has float32 weights; other delegates than XNNPACK and phones were not tried",
        (
            ("executorch_files_cpu_executorch1.5.1.csv", {}),
            ("trained_files_cpu_executorch1.5.1.csv", {}),
        ),
    ),
    Runtime(
        "Core ML",
        "`coreml`",
        "weights 1 to 8, in 4 or 8, activations 2 to 8, in 8",
        "none: written by coremltools 9.0, read back and evaluated in PyTorch",
        "batches; whatever a run in Core ML would show",
    ),
    Runtime(
        "ncnn",
        "`ncnn`",
        "weights 1 to 8, activations 2 to 8, in 8",
        "1.0.20261020, on x86",
        "batches; convolutions with groups, additions and activations are in floating point, some operators are "
        "refused; its ARM and Vulkan kernels were not tried",
        (("trained_files_cpu_ncnn1.0.20261020.csv", {}),),
    ),
    Runtime(
        "TensorRT",
        "`tensorrt`",
        "weights 1 to 8, activations 8, in 8",
        "none: checked by NVIDIA's rules, run in ONNX Runtime",
        "activations of fewer bits; whatever a run in TensorRT would show",
    ),
    Runtime(
        "fixed-point hardware",
        "`power_of_two`",
        "weights 2 to 8, activations 1 to 8, in 8",
        "none: every scale is checked, run in ONNX Runtime",
        "scales that are no powers of two; whatever a vendor's compiler would show",
    ),
    Runtime(
        "qonnx, FINN, hls4ml",
        "`qonnx`",
        "1 to 8, as they are",
        "qonnx 1.0.0",
        "its executor is for tests; FINN and hls4ml were not tried",
    ),
    Runtime(
        "PyTorch",
        "`torch`",
        "1 to 8, as they are",
        "2.14.1; `torch.export` of such networks needs 2.7",
        "size: codes are kept as PyTorch has them",
    ),
    Runtime(
        "llama.cpp",
        "`gguf`",
        "weights of 2.06, 4.5 or 8.5",
        "xllamacpp 2026.10.11549",
        "other networks than our GPT and Llamas: [language models](language_models.md)",
    ),
    Runtime(
        "transformers, vLLM",
        "`compressed-tensors`",
        "weights of 4 or 8",
        "transformers 5.24.0; vLLM was not tried",
        "other networks than Llamas; tied embeddings are kept whole",
    ),
)


def main() -> None:
    print(table())


def table() -> str:
    """The table as Markdown."""
    head = ("runtime", "`--format`", "bits, in a file of", "versions tried", "same class", "time over float32", "lost")
    rows = [head, ("---",) * len(head), *(_row(runtime) for runtime in RUNTIMES)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(runtime: Runtime) -> tuple[str, ...]:
    found = [row for name, wanted in runtime.files for row in _rows(name, wanted)]
    passed = [row for row in found if row.get("passed", "True") == "True"]
    same = _span([100 * share for row in passed if (share := _share(row)) is not None], "{:.1f} %")
    if len(passed) < len(found):
        same += f"; {len(passed)} of {len(found)} files pass"
    times = _span([time for row in passed if (time := _time(row)) is not None], "{:.2f}")
    return runtime.name, runtime.formats, runtime.bits, runtime.versions, same, times, runtime.lost


def _rows(name: str, wanted: dict[str, str]) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as stream:
        return [row for row in csv.DictReader(stream) if all(row[key] == value for key, value in wanted.items())]


def _share(row: dict[str, str]) -> float | None:
    """Of images with the same class in the file and in the deployed network."""
    if "top1_agreement_percent" in row:
        return float(row["top1_agreement_percent"]) / 100
    return float(row["same_class_file_and_deployed"]) if "same_class_file_and_deployed" in row else None


def _time(row: dict[str, str]) -> float | None:
    if "ratio_to_float32" in row:
        return float(row["ratio_to_float32"])
    if row.get("milliseconds_float32"):
        return float(row["milliseconds"]) / float(row["milliseconds_float32"])
    return None


def _span(values: list[float], form: str) -> str:
    """The least and the largest."""
    ends = list(dict.fromkeys(form.format(value) for value in (min(values), max(values)))) if values else [_NOTHING]
    return " to ".join(ends)


if __name__ == "__main__":
    main()
