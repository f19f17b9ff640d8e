"""Looking into loaders before and beside the one that trains from them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.data._utils import collate

from lqkd.errors import UsageError


@contextmanager
def apart(loader: Any) -> Iterator[Any]:
    """A loader of the same batches, which may be read while ``loader`` is; no random number is drawn by it.

    A DataLoader with persistent workers has one reader only, which a second one would set back to the first batch.
    """
    generator = getattr(loader, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    beside = loader
    if isinstance(loader, DataLoader):
        beside = copy(loader)
        beside._iterator = None
    try:
        with isolate_rng():
            yield beside
    finally:
        if isinstance(generator, torch.Generator) and state is not None:
            generator.set_state(state)


def first_batch(loader: Any, split: str) -> Any:
    """The first batch of a loader, whose reading leaves no trace; None where it has none.

    Raises:
        UsageError: when torch's own collation cannot make one of the samples.
    """
    with apart(loader) as beside:
        try:
            return next(iter(beside), None)
        except Exception as error:  # whatever the data set raises: it is told as it is, but for the collation's
            problem = collation_problem(error)
            if problem is None:
                raise
            raise UsageError(f"the {split} DataLoader cannot make a batch: {problem}") from error


def only_loader(loaders: Any, split: str) -> Any:
    """The loader of a split, of what Lightning takes: it alone, or in a list or a dict; None for none.

    Raises:
        UsageError: when there are several.

    Examples:
        >>> only_loader({"one": ["loader"]}, "validation")
        'loader'
    """
    found = tree_leaves(loaders)
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} {split} DataLoaders: give one, of torch.utils.data.ConcatDataset, say"
        )
    return found[0] if found else None


def check_collates(loader: Any, split: str) -> None:
    """Refuse a DataLoader with torch's own collation whose first samples are no batch for it; others are not read.

    Raises:
        UsageError: then.
    """
    if isinstance(loader, DataLoader) and loader.collate_fn is collate.default_collate:
        first_batch(loader, split)


def collation_problem(error: BaseException) -> str | None:
    """Why samples are no batch, and what helps, where torch's own collation raised ``error``; None elsewhere.

    Args:
        error: of a loader, with or without worker processes, which hand over the text of theirs alone.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    files = re.findall(r'File "(.+?)", line', text)
    if not files or files[-1] != collate.__file__:
        return None
    found = re.search(r"must contain tensors.*; found (?:<class ')?([\w.]+)", text)
    if found is not None:
        what = "images of Pillow" if found[1].startswith("PIL.") else found[1]
        return (
            f"its samples hold {what}, where tensors, arrays, numbers, texts, or tuples, lists and dicts of them are "
            f"needed: give its dataset a transform that makes tensors, or give the DataLoader a collate_fn"
        )
    sizes = re.search(r"equal size, but got (\[.*?\]) at entry \d+ and (\[.*?\])", text)
    if sizes is not None or "not resizable" in text or "should be of equal size" in text:
        which = "" if sizes is None else f" ({sizes[1]} and {sizes[2]})"
        return (
            f"its samples differ in size{which}: crop or pad them to one in its dataset's transform, or give the "
            "DataLoader a collate_fn"
        )
    return (
        f"its samples do not fit together ({text.splitlines()[-1]}): make them alike in its dataset, or give the "
        "DataLoader a collate_fn"
    )
