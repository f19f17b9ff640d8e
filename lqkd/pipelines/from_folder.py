"""A low-bit student from a folder of images or texts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml
from lightning.pytorch import Callback

from lqkd.errors import Stopped, UsageError
from lqkd.pipelines.asked import ASKED, Asked
from lqkd.pipelines.look import kind_of, look_at
from lqkd.pipelines.plan import FLOAT, STUDENT, TEACHER, plan
from lqkd.runs.folder import CONFIG
from lqkd.runs.outcome import print_outcome
from lqkd.runs.provenance import outdated_exports
from lqkd.runs.resume import find
from lqkd.runs.train import resume, run
from lqkd.studies.report import report
from lqkd.utils.files import write_text
from lqkd.utils.screen import tell

_WHAT = {FLOAT: "the student in floating point", TEACHER: "the teacher", STUDENT: "the low-bit student"}
_ABOUT = """\
# {what}, chosen by lqkd distill.
#   python -m lqkd fit --config {path} --run.version NEW
"""


def distill_folder(
    folder: str | Path,
    student: str | None = None,
    bits: str | None = None,
    *,
    teacher: str | None = None,
    student_weights: str | None = None,
    teacher_weights: str | None = None,
    epochs: int | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> Path:
    """Train a student on what a folder holds, distil it at few bits, export it and make a page about it.

    ===============================  ============================  =========================================
    the folder holds                 task                          student and bits, unless others are given
    ===============================  ============================  =========================================
    ``CLASS/IMAGE``                  ``Classification``            ``resnet18``, ``w4a4``
    ``images/`` and ``masks/``       ``Segmentation``              ``lraspp_mobilenet_v3_large``, ``w4a4``
    boxes as VOC's or COCO's         ``Detection``                 ``small_fcos``, ``w4a4``
    ``.txt``, ``.md``, ``.jsonl``    ``CausalLM``                  ``gpt``, ``q4_0``
    ===============================  ============================  =========================================

    Everything that is not given is chosen by the data and printed, and becomes a configuration that ``fit`` takes:
    ``float.yaml`` for the student in floating point, where its weights do not know these classes; ``teacher.yaml`` for
    a teacher of which that is true; ``student.yaml`` for the distillation. Their runs lie beside them, in ``float/``,
    ``teacher/`` and ``student/``, and the last has ``student.onnx``, ``report.html`` and ``summary.json``; of texts
    ``student.gguf`` for llama.cpp, unless ``bits`` are others than ``q4_0`` and ``q8_0``, for which there is no file.
    Called again in the same way it goes on with what was stopped or killed; what is done is kept.

    Args:
        folder: as :class:`~lqkd.data.ImageFolder`, :class:`~lqkd.data.SegmentationFolder`,
            :class:`~lqkd.data.VocDetection`, :class:`~lqkd.data.CocoDetection` or :class:`~lqkd.data.TextFiles` take
            it; also with ``train/``, ``val/`` and ``test/``.
        student: the network: ``resnet18`` and other names of torchvision, then of timm; ``torchvision/NAME``,
            ``timm/NAME``, ``hf-hub:OWNER/NAME``; ``small_fcos``; ``gpt``; a YAML file with ``class_path`` and
            ``init_args``. None for that of the table.
        bits: such as ``w8a8``, ``w4a4``, ``w2a2``; None likewise.
        teacher: a network, likewise, or the run of one that ``fit`` has trained; None for the student's own float
            network.
        student_weights: a file, ``builtin:NAME``, or ``pretrained`` for what the network's library publishes; None for
            these, and random ones where they cannot be had.
        teacher_weights: likewise.
        epochs: of each training.
        image_size: side in pixels of what networks see.
        batch_size: images of a step.
        out: folder for all of it, new or empty; None for ``runs/FOLDER_STUDENT_BITS``.

    Returns:
        The run folder of the student.

    Raises:
        UsageError: when a setting is not possible, the folder holds something else, or ``out`` was begun
            with other settings: before anything is trained.
        ParityError: when the exported file does not compute what was trained.
        Stopped: after Ctrl-C or SIGTERM.
    """
    asked = Asked(str(folder), student, bits, teacher, student_weights, teacher_weights, epochs, image_size, batch_size)
    kind = kind_of(Path(asked.folder).expanduser())
    asked = replace(asked, student=student or kind.student, bits=bits or kind.bits)
    place, wanted = asked.place(out), kind.file_format(bits or kind.bits)
    if asked.begun_in(place):
        tell(f"going on in {place}")
    else:
        _begin(asked, place)
    for name in (name for name in _WHAT if (place / f"{name}.yaml").is_file()):
        with _told(_WHAT[name]):
            _train(place / f"{name}.yaml", place / name, exported=wanted is not None)
    with _told("the export"):
        _take_away(place / STUDENT, wanted)
    return place / STUDENT


def _begin(asked: Asked, place: Path) -> None:
    """Choose, tell, and make the folder with all that is chosen; it appears whole."""
    made = place.parent / f".{place.name}.tmp"
    try:
        shutil.rmtree(made, ignore_errors=True)  # of a call that was killed
        made.mkdir(parents=True)
        chosen = plan(asked, look_at(Path(asked.folder).expanduser()), made, place)
        for name, config in chosen.configs.items():
            about = _ABOUT.format(what=f"{_WHAT[name][0].upper()}{_WHAT[name][1:]}", path=place / f"{name}.yaml")
            write_text(made / f"{name}.yaml", about + yaml.safe_dump(config, sort_keys=False))
        asked.write(made)
        if place.exists():  # an empty one may be where the caller is
            for path in sorted(made.iterdir(), key=lambda path: path.name == ASKED):
                path.rename(place / path.name)
        else:
            made.rename(place)
    except OSError as error:
        raise UsageError(f"out={str(place)!r} cannot be written ({error.strerror}): give another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    files = ", ".join(f"{name}.yaml" for name in chosen.configs)
    for about, told in (*chosen.told, ("folder", f"{place}: {files}, which fit --config takes")):
        tell(f"{about:<12}{told}", indent=12)


def _train(config: Path, folder: Path, exported: bool) -> None:
    """Train as a configuration says, unless that is done, or go on with it."""
    from lqkd.export.export_check import ExportCheck  # whose packages are optional

    callbacks: list[Callback] = [ExportCheck()] if exported else []
    last = folder.name == STUDENT  # after whose export all is told
    if not (folder / CONFIG).is_file():
        run(["fit", "--config", str(config)], [config], False, callbacks, outcome=not last)
    elif find(folder).finished() is None:
        resume(folder, of_distillation=callbacks, outcome=not last)


def _take_away(folder: Path, wanted: str | None) -> None:
    """The file of the format that is wanted, the page and what they are."""
    from lqkd.export.command import export  # whose packages are optional
    from lqkd.export.formats import file_name
    from lqkd.export.report import report_path

    try:
        if wanted is not None:
            file = folder / file_name(wanted)
            made = file.is_file() and report_path(file).is_file() and file not in outdated_exports(folder)
            if not made:
                export(folder, format=wanted, overwrite=True)
        report(folder)
    finally:  # the training has not told it, and is done whatever comes of its file
        print_outcome(folder)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A stop says how all of it goes on, not only the run that was stopped."""
    try:
        yield
    except Stopped as stop:
        name = "SIGTERM" if stop.code == 143 else "Ctrl-C"
        raise Stopped(stop.number, f"stopped by {name} at {what}; the same command goes on") from stop
    except KeyboardInterrupt as stop:
        raise Stopped(2, f"stopped by Ctrl-C at {what}; the same command goes on") from stop
