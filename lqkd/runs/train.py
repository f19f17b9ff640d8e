"""Training, and what else Lightning does with a configuration: the verbs ``fit``, ``resume``, ``test`` ..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Callback

from lqkd.runs.folder import CONFIG
from lqkd.runs.lightning_cli import LqkdCLI
from lqkd.runs.provenance import check_config_code, check_run_code
from lqkd.runs.resume import find
from lqkd.utils.escaping import terminal


def run(
    arguments: Sequence[str],
    configs: Sequence[Path] = (),
    allow_code: bool = False,
    of_distillation: Sequence[Callback] = (),
    outcome: bool = True,
) -> None:
    """Do what a verb of Lightning's says.

    Args:
        arguments: the verb (fit, validate, test, predict) and its settings, as on the command line.
        configs: the configuration files among them, whose code is looked at.
        allow_code: whether classes of a folder that somebody else made may be run.
        of_distillation: callbacks for a DistillModule besides those that every run has.
        outcome: whether a training ends with a table of what it came to; false where the caller has more to add to it.

    Raises:
        UsageError: after a user's mistake.
    """
    for config in configs:
        check_config_code(config, allow_code)
    LqkdCLI(list(arguments), of_distillation=of_distillation, outcome=outcome)


def resume(
    folder: Path,
    settings: Sequence[str] = (),
    allow_code: bool = False,
    of_distillation: Sequence[Callback] = (),
    outcome: bool = True,
) -> None:
    """Go on with a run that was stopped or killed, in its own folder, or say that it is finished.

    Args:
        folder: of the run.
        settings: as ``fit`` takes them, e.g. ``--trainer.max_epochs=60``.
        allow_code: whether classes of a folder that somebody else made may be run.
        of_distillation: callbacks for a DistillModule besides those that every run has.
        outcome: whether a training ends with a table of what it came to; false where the caller has more to add to it.

    Raises:
        UsageError: after a user's mistake.
    """
    resumption = find(folder)
    check_run_code(folder, allow_code)
    finished = None if settings else resumption.finished()
    if finished is None:
        LqkdCLI(["fit", "--config", str(folder / CONFIG), *settings], resumption, of_distillation, outcome)
    else:
        print(terminal(finished))
