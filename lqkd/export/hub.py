"""A run's student as a folder for the Hugging Face Hub: card with metrics, settings, weights and a verified file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import yaml

from lqkd.errors import UsageError
from lqkd.export import metadata
from lqkd.export.command import export
from lqkd.export.formats import BUILDERS
from lqkd.runs.folder import SUMMARY
from lqkd.runs.student import HUB_CONFIG, HUB_WEIGHTS, describe_student, load_student, student_file
from lqkd.tasks.values import name_of, shown
from lqkd.utils.escaping import markdown
from lqkd.utils.files import atomic_path, write_json, write_text
from lqkd.utils.renames import current_keys

CARD = "README.md"
FILE = "model.onnx"
_PIPELINES = {
    "Classification": "image-classification",
    "MultiLabel": "image-classification",
    "Segmentation": "image-segmentation",
}
"""What the Hub calls a task on images."""
_METRICS = {"acc": "accuracy", "miou": "mean_iou"}
"""What it calls a metric, where that is not our own name."""
_REFERENCES = {
    "teacher": "teacher",
    "student_float": "student in floating point",
    "student_start": "student, quantised and not trained",
    "student_gptq": "student, calibrated by GPTQ and not trained",
}


def hub_folder(
    run: str | Path,
    folder: str | Path,
    *,
    format: str = "portable",
    overwrite: bool = False,
    latency: bool = False,
    frames: bool = False,
    batch: int | None = None,
    allow_code: bool = False,
) -> Path:
    """Write ``README.md``, ``config.json``, ``model.safetensors`` and ``model.onnx`` into a folder.

    The card has the measured values in its metadata (``model-index``), as the Hub shows them; what is compared about
    the file stands in ``model.onnx.md``. :func:`lqkd.from_pretrained` gives the network of the folder back.

    Args:
        run: folder of a finished training.
        folder: to write to; made when missing.
        format: one of the ONNX formats of :data:`lqkd.export.FORMATS`.
        overwrite: whether to replace files that exist.
        latency: whether to time the file against float32 ONNX and PyTorch on this CPU.
        frames: whether the file takes a camera's frames, as for :func:`lqkd.export.command.export`.
        batch: samples that it takes at a time, likewise.
        allow_code: whether classes of a run that somebody else made may be run.

    Returns:
        The folder.

    Raises:
        UsageError: after a user's mistake, or when the run does not say how its network is built.
        ParityError: when the file does not compute what the student computes.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--hub {str(folder)!r} is a file: give a folder")
    if format not in BUILDERS:
        raise UsageError(f"--format {format} is not possible with --hub: use one of {', '.join(BUILDERS)}")
    for name in (CARD, HUB_CONFIG, HUB_WEIGHTS):
        if (folder / name).exists() and not overwrite:
            raise UsageError(f"{str(folder / name)!r} exists: give --overwrite, or another --hub")
    weights = student_file(run)
    load_student(weights, allow_code)  # which says so, if that is not possible
    same = {"overwrite": overwrite, "latency": latency, "frames": frames, "allow_code": allow_code}
    file = export(run, format=format, output=folder / FILE, batch=batch, **same)
    with atomic_path(folder / HUB_WEIGHTS) as temporary:
        shutil.copyfile(weights, temporary)
    write_json(folder / HUB_CONFIG, describe_student(weights))
    summary = current_keys(json.loads((Path(run) / SUMMARY).read_text(encoding="utf-8")))
    described = metadata.read(onnx.load(file, load_external_data=False))
    write_text(folder / CARD, card(folder.resolve().name, summary, described))
    return folder


def card(name: str, summary: dict[str, Any], described: dict[str, Any]) -> str:
    """The model card: metadata for the Hub, then what a person reads.

    Args:
        name: of the model.
        summary: the run's ``summary.json``.
        described: what the exported file says about itself.
    """
    metric, file = summary["metric"], described["parity"]
    tested = summary["test"] is not None
    split = "test" if tested else "validation"
    reached = summary["test" if tested else "val"]
    bits = f"W{summary['weight_bits']} A{summary['activation_bits']}"
    task = str((described.get("task") or {}).get("class_path", "Classification")).rpartition(".")[2]
    pipeline = _PIPELINES.get(task) if described.get("preprocessing") else None
    key = metric.rpartition("/")[2]
    values = {"PyTorch": reached, FILE: file["exported"]}
    measured = [
        {"type": _METRICS.get(key, key), "name": f"{name_of(metric)} ({where})", "value": value}
        for where, value in values.items()
        if value is not None
    ]
    data = str(described.get("data"))
    result = {
        "task": {"type": pipeline or "other"},
        "dataset": {"name": data, "type": data.lower(), "split": split},
        "metrics": measured,
    }
    most = "".join(part.split()[0] for part in (f"w{summary['weight_bits']}", f"a{summary['activation_bits']}"))
    head: dict[str, Any] = {"library_name": "lqkd", "tags": ["quantization", "distillation", "onnx", most]}
    if pipeline is not None:
        head["pipeline_tag"] = pipeline
    if measured:
        head["model-index"] = [{"name": name, "results": [result]}]
    rows = [(title, summary.get(of)) for of, title in _REFERENCES.items()]
    rows += [("student as trained", reached), (f"`{FILE}`", values[FILE])]
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {markdown(name)}",
        "",
        f"A low-bit network ({bits}), distilled and exported by lqkd {described['version']}.",
        "",
        f"| network | {name_of(metric)} on the {split} split of {markdown(data)} |",
        "|---|---|",
        *(f"| {title} | {shown(metric, value, 2)} |" for title, value in rows if value is not None),
        "",
        f"Weights: {summary['packed_bytes'] / 1000:.1f} kB packed, {summary['float_bytes'] / 1000:.1f} kB in float32.",
        "",
        "```python",
        "import lqkd",
        "",
        'network = lqkd.from_pretrained("FOLDER")  # this folder; PyTorch, in eval mode',
        "```",
        "",
        f"`{FILE}` runs on ONNX Runtime: `python -m lqkd predict FOLDER/{FILE} IMAGE`. What it takes and returns, and",
        f"how it was compared with PyTorch: [{FILE}.md]({FILE}.md).",
    ]
    return "\n".join(lines) + "\n"
