"""What ``python -m lqkd --help`` says: every verb in a line, and what an exit status means."""

from __future__ import annotations

from lqkd.utils.suggest import nearest

VERBS = {
    "From photographs to a file": {
        "distill": "make a low-bit student for a folder of images or texts: distill FOLDER",
    },
    "Training": {
        "fit": "train as a config says, in a new run folder, and test the best checkpoint",
        "resume": "go on with a run that was stopped or killed: resume RUN",
        "compare": "train the variants of a study with several seeds and compare them",
    },
    "Looking at a run": {
        "validate": "measure a run on its validation split: validate --config RUN/config.yaml",
        "test": "measure a run on its test split: test --config RUN/config.yaml",
        "report": "make one page of a run or a study: report FOLDER",
        "wandb-report": "draft a W&B report of a project's runs: wandb-report ENTITY/PROJECT",
        "sensitivity": "rank the layers by what few bits cost, find bits under a budget: sensitivity RUN",
    },
    "Preparing data": {
        "make-shards": "pack folders of images into tar shards: make-shards SOURCE DEST",
    },
    "Using a student": {
        "export": "write a run's student as a verified file: export RUN",
        "predict": "tell what a run or an exported file says of image files: predict RUN IMAGE...",
    },
}
"""Group -> verb -> what it does."""
EXIT_STATUS = {
    0: "done",
    1: "an exported file failed its comparison, or an error of lqkd itself, with a traceback",
    2: "a mistake in the arguments or settings, told in one line before the first batch",
    3: "a training that diverged",
    4: "a full disk",
    5: "a process that was lost to a training of several",
    130: "Ctrl-C; what was trained is saved, and the command that goes on is printed",
    141: "a reader of the output that has gone, such as head",
    143: "SIGTERM, likewise",
}


def overview() -> str:
    """The text of ``--help``."""
    lines = ["usage: python -m lqkd VERB ...", "", "Distil networks into low-bit ones through a learnable regularizer."]
    for group, verbs in VERBS.items():
        lines += ["", f"{group}:", *(f"  {verb:<12} {text}" for verb, text in verbs.items())]
    lines += ["", "Exit status:", *(f"  {status:<12} {text}" for status, text in EXIT_STATUS.items())]
    return "\n".join([*lines, "", "python -m lqkd VERB --help tells more."])


def unknown(verb: str) -> str | None:
    """What is wrong with a verb; None when it is one."""
    verbs = [name for group in VERBS.values() for name in group]
    if verb in verbs:
        return None
    return f"verb {verb!r} is unknown{nearest(verb, verbs) or ': use ' + ', '.join(verbs)}"
