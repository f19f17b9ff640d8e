"""The arguments of the verbs that are none of Lightning's.

They are read before PyTorch is loaded, so that help and mistakes are told at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lqkd.errors import UsageError
from lqkd.run_folder import CONFIG, run_within
from lqkd.suggest import suggestion


def read(verb: str, args: Sequence[str]) -> Any:
    """The arguments of ``verb`` as its ``main`` takes them.

    Raises:
        UsageError: after a user's mistake.
        SystemExit: after one about the arguments, told in one line (status 2), and after ``--help``.
    """
    if verb == "compare":
        from lqkd.study.settings import read_arguments

        return read_arguments(args)
    return {"export": export, "predict": predict, "report": report, "sensitivity": sensitivity}[verb](args)


class VerbParser(argparse.ArgumentParser):
    """The parser of a verb that is none of Lightning's; ``prog`` is ``python -m lqkd VERB``."""

    def __init__(self, prog: str, description: str) -> None:
        width = max(80, shutil.get_terminal_size((120, 24)).columns)
        super().__init__(
            prog,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=width),
        )

    def error(self, message: str) -> NoReturn:
        told = f"{message}{suggestion(message, self)}"
        print(f"lqkd: error: {told} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def export(args: Sequence[str]) -> argparse.Namespace:
    """Of ``export``."""
    parser = VerbParser(
        prog="python -m lqkd export",
        description="Export the student of a run from its best checkpoint, verify the file against PyTorch on the test "
        "split and write a model card beside it.",
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--format",
        default="portable",
        help="portable (8-bit codes), packed4, packed2 (storage), qonnx (FPGAs) or torch (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="file to write (default: student.onnx in the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists (default: false)")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="also time it against float32 ONNX and PyTorch on this CPU, for some seconds (default: false)",
    )
    given = parser.parse_args(args)
    _check_exists(given.run, "the folder of a finished training")
    return given


def names_images(args: Sequence[str]) -> bool:
    """Whether the arguments of ``predict`` name a run or file; those of LightningCLI are all options."""
    return bool(args) and (not args[0].startswith("-") or args[0].partition("=")[0] in ("--top-k", "--json"))


def predict(args: Sequence[str]) -> argparse.Namespace:
    """Of ``predict``, given images."""
    parser = VerbParser(
        prog="python -m lqkd predict",
        description="Print the classes of image files. Images are prepared as validation prepares them; those of "
        "another size are resized. predict --config CONFIG writes the classes of the run's own test split instead.",
    )
    parser.add_argument("network", metavar="RUN", help="run folder, or file that export wrote (.onnx or .pt2)")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files of any size")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="classes for each image (default: 1)")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON list, one entry for each image (default: false)"
    )
    given = parser.parse_args(args)
    _check_exists(given.network, "a run folder, or a file that export wrote")
    return given


def sensitivity(args: Sequence[str]) -> argparse.Namespace:
    """Of ``sensitivity``."""
    parser = VerbParser(
        prog="python -m lqkd sensitivity",
        description="Quantise each layer of a network alone, without training, and rank the layers by what the loss on "
        "the validation split says. Test data are not used.",
    )
    parser.add_argument(
        "run",
        help="run folder, whose best checkpoint gives the float weights; or a config, before any training",
    )
    parser.add_argument(
        "--bits",
        default="8,4,2",
        help="bits to try: 4 is short for w4a4 (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        help="also find bits under size=120kB, size=12%%, bops=2.5G or bops=3%% (of float) (default: none)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=16,
        metavar="N",
        help="validation batches, spread over the split (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FOLDER", help="folder for what is written (default: the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier ranking (default: false)")
    given = parser.parse_args(args)
    _check_exists(given.run, "a run folder or a config file")
    return given


def report(args: Sequence[str]) -> argparse.Namespace:
    """Of ``report``."""
    parser = VerbParser(
        prog="python -m lqkd report",
        description="Write report.html, one page that needs no network, report.md, table.csv and runs.csv into the "
        "folder of a run or a study.",
    )
    parser.add_argument("folder", type=Path, help="run folder, or folder of a study, finished or not")
    given = parser.parse_args(args)
    _check_exists(given.folder, "the folder of a run or a study")
    return given


def resume(args: Sequence[str]) -> tuple[Path, list[str]]:
    """Of ``resume``: the run's folder, and the settings for ``fit``."""
    parser = VerbParser(
        prog="python -m lqkd resume",
        description="Go on with a run that was stopped or killed, in its own folder, from checkpoints/last.ckpt, or "
        "from the start when there is none yet. On the CPU the result is bit for bit that of a run that was never "
        "stopped. Further arguments are settings as fit takes them, e.g. --trainer.max_epochs 60.",
    )
    parser.add_argument("run", type=Path, help="a run folder")
    given, settings = parser.parse_known_args(list(args))
    if any(setting.partition("=")[0] == "--ckpt_path" for setting in settings):
        raise UsageError("--ckpt_path is not possible with resume: it goes on from the run's own checkpoints/last.ckpt")
    check_resumable(given.run)
    return given.run, settings


def check_resumable(folder: Path) -> None:
    """Refuse what is no run folder.

    Raises:
        UsageError: then.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{str(folder)!r} is no run folder that can be resumed: it has no {CONFIG}{run_within(folder)}"
        )


def _check_exists(given: str | Path, wanted: str) -> None:
    if not Path(given).exists():
        raise UsageError(f"{str(given)!r} does not exist: give {wanted}")
