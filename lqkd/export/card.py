"""What a person reads about an exported file: a table on the terminal and a model card beside the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqkd.export.deploy import INPUT, OUTPUT, Deployed
from lqkd.export.metadata import LOADER_NOTES, layer_bits, summary_of_bits
from lqkd.export.parity import VALIDATION, Parity
from lqkd.export.runtimes import Kernels
from lqkd.tasks.values import change_shown, shown
from lqkd.utils.escaping import code, markdown, terminal
from lqkd.utils.files import write_text
from lqkd.utils.tables import print_table

NAMED = 8
"""Float nodes that the table names; the card names all."""
_SAME = 0.99
"""Of the samples: where fewer have the answer of the student as trained, it is said what mends it."""


@dataclass(frozen=True)
class Summary:
    """A written file.

    Attributes:
        path: the file.
        file_bytes: its size.
        packed_bytes: of the weights if every one took its bits.
        float_bytes: of the float network.
        kernels: what ONNX Runtime, OpenVINO, LiteRT or ExecuTorch makes of it, ``None`` where it is run by something
            else.
    """

    path: Path
    file_bytes: int
    packed_bytes: int
    float_bytes: int
    kernels: Kernels | None


def card_path(path: Path) -> Path:
    """Where the model card of the file ``path`` lies."""
    return path.with_name(f"{path.name}.md")


def rejected(path: Path) -> Path:
    """The name under which a file that failed the comparison is kept."""
    return path.with_name(f"{path.stem}.rejected{path.suffix}")


def rows(summary: Summary, described: dict[str, Any], parity: Parity) -> list[tuple[str, str]]:
    """What the table and the card say, line by line."""
    result = [
        ("format", described["format"]),
        (
            "file",
            f"{summary.file_bytes / 1000:.1f} kB (weights packed: {summary.packed_bytes / 1000:.1f} kB, "
            f"in float: {summary.float_bytes / 1000:.1f} kB)",
        ),
    ]
    judged = f"{parity.samples} samples of the {parity.split} split"
    if parity.split == VALIDATION:
        judged += ", which chose the checkpoint, as the data have no test split"
    result.append(("judged on", judged if parity.samples else "no samples"))
    result += _measured(described, parity)
    for name, layers in (("not optimised", parity.unoptimised), ("optimised", parity.optimised)):
        if layers:
            worst = max(layers, key=lambda row: (row.steps, row.fraction))
            told = f"at most {worst.steps:g} step, {worst.fraction:.4%} of the codes" if worst.steps else "identical"
            result.append((f"{len(layers)} grids, {name}", told))
    if parity.output_steps is not None:
        result.append(("end to end", _end_to_end(parity)))
    result.append(("batches", ", ".join(map(str, parity.batches))))
    if summary.kernels is not None:
        integer = ", ".join(f"{count} {kind}" for kind, count in summary.kernels.integer.items())
        result.append(("integer kernels", integer or "none"))
        result.append(("float nodes", _named(summary.kernels, NAMED)))
    return result


def _measured(described: dict[str, Any], parity: Parity) -> list[tuple[str, str]]:
    """How good the file is, and how often it says the same."""
    metric, result = parity.metric or "", []
    for name, value in (
        ("as trained", parity.trained),
        ("as deployed, in PyTorch", parity.deployed),
        ("of the file", parity.exported),
    ):
        if value is not None:
            result.append((f"{metric} {name}", shown(metric, value, 2)))
    if parity.trained is not None and parity.deployed is not None:
        change = change_shown(metric, parity.deployed - parity.trained)
        calibrated, rerouted = (len(described[key]) for key in ("calibrated", "rerouted"))
        result.append(("cost of deployment", f"{change} ({calibrated} grids calibrated at export, {rerouted} shared)"))
    if parity.agreement is not None and parity.agreement_with_trained is not None:
        of = f"of {parity.samples} samples"
        told = f"{parity.agreement_with_trained:.2%} {of}"
        if parity.agreement_with_trained < _SAME and described["calibrated"]:
            told += "; residual_bits, function_bits and IntegerBiases in training keep it"
        result.append((f"same {parity.answer} as trained", told))
        result.append((f"same {parity.answer}", f"{parity.agreement:.3%} {of}"))
    return result


def _end_to_end(parity: Parity) -> str:
    """How the file's outputs differ from those of integer arithmetic in PyTorch."""
    what = " and ".join(parity.outputs)
    if not parity.output_steps:
        return f"the same {what} to the last bit"
    told = f"{what} at most {parity.output_steps:.3g} steps of the accumulator apart"
    if not parity.end_to_end:
        return told
    last = parity.end_to_end[-1]
    return f"{told}, {last.fraction:.4%} of the codes of the last grid"


def _named(kernels: Kernels, limit: int | None) -> str:
    names = [f"{name} ({kind})" for name, kind in kernels.floats]
    more = "" if limit is None or len(names) <= limit else f" and {len(names) - limit} more"
    return ", ".join(names[:limit]) + more if names else "none but the quantization of the input"


def _interface(described: dict[str, Any]) -> list[str]:
    """The lines about what the file takes and returns."""
    told = {
        name: f"{code(name)}: ({', '.join(map(str, [described.get('batch', 'batch'), *shape]))}) float32"
        for kind in ("inputs", "outputs")
        for name, shape in described[kind].items()
    }
    preprocessing, names = described.get("preprocessing"), described.get("class_names")
    if preprocessing:
        told[INPUT] += (
            f"; {preprocessing.get('scale')}; mean {preprocessing.get('mean')}, std {preprocessing.get('std')}"
        )
    if OUTPUT in told:
        told[OUTPUT] += f"; classes: {markdown(', '.join(map(str, names))) if names else 'unnamed'}"
    return [line for text in told.values() for line in (f"{text}.", "")]


def _teacher(settings: dict[str, Any] | None) -> str:
    """A teacher's configuration in a line: its network as it would be called, and its weights."""
    if settings is None:
        return "none"
    given = settings.get("init_args", settings)
    if "teachers" in given:
        return f"{len(given['teachers'])} ({given.get('combination')}): {'; '.join(map(_teacher, given['teachers']))}"
    if not given.keys() & {"network", "class_path"}:  # several by name
        return "; ".join(f"{code(name)}: {_teacher(one)}" for name, one in given.items())
    network = given.get("network") or {}
    arguments = ", ".join(f"{k}={v}" for k, v in (network.get("init_args") or {}).items() if v is not None)
    weights = f", weights {markdown(given['weights'])}" if given.get("weights") else ""
    return code(f"{str(network.get('class_path')).rpartition('.')[2]}({arguments})") + weights


def print_card(summary: Summary, described: dict[str, Any], parity: Parity) -> None:
    """Print the table."""
    print_table(f"export to {summary.path.name}", None, rows(summary, described, parity), left=2)
    print(terminal(f"written to {summary.path}"))


def write_card(summary: Summary, described: dict[str, Any], parity: Parity, deployed: Deployed) -> Path:
    """Write the model card beside the file, complete or not at all, and return its path."""
    lines = [f"# {markdown(summary.path.name)}", "", f"A low-bit network exported by lqkd {described['version']}.", ""]
    lines += [
        "| | |",
        "|---|---|",
        *(f"| {name} | {markdown(value)} |" for name, value in rows(summary, described, parity)),
        "",
    ]
    if summary.kernels is not None and len(summary.kernels.floats) > NAMED:
        lines += [f"Nodes in floating point: {markdown(_named(summary.kernels, None))}.", ""]
    lines += ["## Input and output", "", *_interface(described)]
    if described["format"] in LOADER_NOTES:
        lines += ["## Loading", "", f"{LOADER_NOTES[described['format']]}.", ""]
    lines += ["## Origin", "", f"teacher: {_teacher(described.get('teacher'))}", ""]
    lines += [f"data: {markdown(described.get('data'))}", ""]
    if described.get("checkpoint"):
        lines += [f"checkpoint: SHA-256 `{described['checkpoint']}`", ""]
    lines += [f"## Layers: {summary_of_bits(deployed)}", "", "| layer | bits |", "|---|---|"]
    lines += [f"| {markdown(name)} | {bits} |" for name, bits in layer_bits(deployed).items()]
    for title, key in (
        ("Grids fitted at export, which training did not have", "calibrated"),
        ("Inputs that read a value from the 8-bit grid of another", "rerouted"),
    ):
        if described[key]:
            lines += ["", f"## {title}", "", *(f"- {markdown(place)}" for place in described[key])]
    path = card_path(summary.path)
    write_text(path, "\n".join(lines) + "\n")
    return path
