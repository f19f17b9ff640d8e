"""Keeps from the screen what libraries say of every training and nobody can do anything about."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "huggingface_hub.utils._http",
)
_SAID = re.compile(
    r"(GPU|TPU|HPU|IPU) available: |💡 Tip: |Seed set to |Restoring states from the checkpoint |"
    r"Retrying in \d+s |'.*' thrown while requesting |"  # what fails in the end is told in one sentence
    r"Loaded model weights from the checkpoint |`Trainer\.fit` stopped: `max_(epochs|steps)=\S+` reached\."
)
"""Beginnings of such lines: the header and the table of a run say it, or it is no news."""
_WARNED = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # of Lightning's own code
    r".*torch\.distributed\.nn\.functional\.\w+ is deprecated",
    r"You defined a `validation_step` but have no `val_dataloader`",  # the header says what is kept then
    r"Found \d+ module\(s\) in eval mode at the start of training",  # lqkd puts the student into training mode itself
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave these lines out inside the block; everything else is said as ever."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for text in _WARNED:
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.addFilter(_is_news)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return _SAID.match(record.getMessage()) is None
