"""The verbs that are none of Lightning's: from arguments to a function of the library, and its result to the screen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from lqkd.cli import arguments
from lqkd.studies.settings import Study
from lqkd.utils.escaping import terminal


def _compare(studies: Any, given: tuple[Study, dict[str, Any], bool]) -> int:
    studies.compare(*given)
    return 0


def _distill(pipelines: Any, given: arguments.Distill) -> int:
    pipelines.distill_folder(**vars(given))
    return 0


def _export(export: Any, given: arguments.Export) -> int:
    asked = {key: value for key, value in vars(given).items() if key != "hub"}
    if given.hub is None:
        export.export(**asked)
    else:
        from lqkd.export.hub import hub_folder

        del asked["output"]
        hub_folder(folder=given.hub, **asked)
    return 0


def _make_shards(data: Any, given: arguments.MakeShards) -> int:
    data.make_shards(given.source, given.dest, given.shard_mb * 10**6)
    return 0


def _predict(export: Any, given: arguments.Predict) -> int:
    """Status 2 when an image could not be read, which is told in one line; the others are predicted."""
    if given.prompt:
        return _continue(given)
    found = []
    asked = {key: getattr(given, key) for key in ("top_k", "output", "allow_code")}
    for entry in export.predict(given.run, given.images, **asked):
        found.append(entry)
        if "error" in entry:
            print(f"lqkd: error: {terminal(entry['error'])}", file=sys.stderr)
        elif not given.json:
            told = ", ".join(f"{x['class']} {x['confidence']:.1%}" for x in entry.get("predictions", ()))
            written = ", ".join(entry[key] for key in ("output", "picture") if key in entry)
            print(terminal(f"{entry['image']}: {written or told}"))
    if given.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    return 2 if any("error" in entry for entry in found) else 0


def _continue(given: arguments.Predict) -> int:
    """A text is printed as it is read, in lines, without what a terminal would obey."""
    from lqkd.export.continuation import continue_texts

    keys = ("tokens", "temperature", "top_k", "seed", "allow_code")
    asked = {key: value for key in keys if (value := getattr(given, key)) is not None}
    found = []
    for entry in continue_texts(given.run, given.prompt, **asked):
        found.append(entry)
        if not given.json:
            text = f"{entry['prompt']}{entry['continuation']}"
            print("\n".join(terminal(line) for line in text.split("\n")))
    if given.json:
        print(json.dumps(found, indent=2))
    return 0


def _report(studies: Any, given: arguments.Report) -> int:
    studies.report(given.folder, given.figures)
    return 0


def _sensitivity(studies: Any, given: arguments.Sensitivity) -> int:
    studies.sensitivity(**vars(given))
    return 0


def _wandb_report(studies: Any, given: tuple[str, str, str, tuple[str, ...]]) -> int:
    studies.wandb_report(*given)
    return 0


VERBS: dict[str, tuple[str, Callable[[Any, Any], int]]] = {
    "compare": ("lqkd.studies.compare", _compare),
    "distill": ("lqkd.pipelines.from_folder", _distill),
    "export": ("lqkd.export.command", _export),
    "make-shards": ("lqkd.data.shards", _make_shards),
    "predict": ("lqkd.export.predict", _predict),
    "report": ("lqkd.studies.report", _report),
    "sensitivity": ("lqkd.studies.sensitivity", _sensitivity),
    "wandb-report": ("lqkd.studies.wandb_report", _wandb_report),
}
"""The module with what a verb does, which is loaded when it is asked for, and the door to it; ``predict`` is one of
these where it is given images."""
