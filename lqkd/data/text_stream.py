"""Texts that do not fit into memory, read and tokenized while a training goes on."""

from __future__ import annotations

import random
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.data.text import SEPARATOR, Tokens
from lqkd.data.text_files import TextFiles, files_of, text_of_line
from lqkd.errors import UsageError
from lqkd.utils.escaping import terminal

_TOGETHER = 256
"""Lines and texts that are given to the tokenizer together."""


class TextStream(TextFiles):
    """Like :class:`lqkd.data.TextFiles`, but for a text to train on that is never in memory as a whole.

    Files are read from the first to the last, line by line: of ``.jsonl`` a line is a text, elsewhere it is a part of
    one. What they give is put together and cut into windows of ``context`` tokens; each that is read changes places
    with a random one of ``mixed``: the order of a training is a pure function of (seed, epoch, mixed).
    Texts for validation and testing are files of their own, and held in memory.

    An epoch has no length that is known before its end: give ``trainer.max_steps``, and count validations in steps
    (``val_check_interval`` and ``check_val_every_n_epoch: null``). A training that is resumed reads and tokenizes the
    epoch anew up to where it was, and goes on with the same bits; a change in the names or sizes of files, or in what
    windows and their order depend on, is refused. One that has ended at ``max_steps`` and is given more of them begins
    a new epoch, at the first file.
    Every process reads all of the text, and takes its share of the windows. There is no ``teacher_cache`` of it, and a
    text that is there twice is not looked for. A damaged line ends the training where it is reached.

    Args:
        root: A file, or a folder.
        val: A file or folder for validation.
        test: Likewise for testing.
        tokenizer: As of :class:`lqkd.data.TextFiles`; null for bytes.
        context: Bytes, or tokens, that the network sees at once, 2 or more.
        batch_size: Windows per process and training step.
        eval_batch_size: Windows per process and step in validation and test; null means batch_size.
        seed: Seed of the order; null means the run's seed (seed_everything), else 0.
        mixed: Windows that are held to be mixed, 1 or more; 1 for the order of the files.

    Raises:
        UsageError: when there is no such file, nothing in it, or it is no text in UTF-8, or no such tokenizer.
    """

    def __init__(
        self,
        *,
        root: str,
        val: str,
        test: str,
        tokenizer: str | None = None,
        context: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        seed: int | None = None,
        mixed: int = 1024,
    ) -> None:
        if isinstance(mixed, bool) or not isinstance(mixed, int) or mixed < 1:
            raise UsageError(f"mixed={mixed!r} is not accepted: it must be a whole number from 1 on.")
        super().__init__(
            root=root,
            val=val,
            test=test,
            tokenizer=tokenizer,
            context=context,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        self.mixed = mixed
        self.files: list[Path] = []

    def setup(self, stage: str | None = None) -> None:
        if not self.files:
            held_out = [Path(path) for path in (self.val, self.test) if path is not None]
            self.files = files_of("root", Path(self.root), held_out)
            if not any(file.stat().st_size for file in self.files):
                raise UsageError(f"root={self.root} has no text, beside what val and test name")
        super().setup(stage)
        self.__dict__.pop("train_indices", None)  # which nobody knows

    def texts(self) -> dict[str, list[bytes]]:
        return self.held_out_texts() | {"train": []}

    def _cut(self, split: str, texts: list[bytes]) -> Tensor:
        return torch.zeros(0, self.context) if split == "train" else super()._cut(split, texts)

    def train_dataloader(self) -> Any:
        """This process's share of the windows, in a new order in each epoch."""
        rank, processes = self._place()
        return StreamedWindows(self, rank=rank, processes=processes)

    def state_dict(self) -> dict[str, Any]:
        """What the order of windows depends on, for a checkpoint: names and sizes of the files, and settings."""
        return {
            "files": [[file.name, file.stat().st_size] for file in self.files],
            "seed": getattr(self, "run_seed", self.seed),
            "mixed": self.mixed,
            "context": self.context,
            "tokenizer": None if self._tokenizer is None else self._tokenizer.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a training to go on with other files, or the same ones in another order."""
        if not self.files:
            return
        own = self.state_dict()
        if state_dict["files"] != own["files"]:
            raise UsageError(
                f"root={self.root} has other files, or files of other sizes, than the checkpoint was trained on: a "
                "stream goes on where it was in the same ones"
            )
        for name in ("seed", "mixed", "context", "tokenizer"):
            if state_dict.get(name, own[name]) != own[name]:
                now = self.tokenizer if name == "tokenizer" else own[name]
                before = "another one" if name == "tokenizer" else state_dict[name]
                raise UsageError(
                    f"{name}={now} is not possible: the checkpoint was trained with {before}, and a stream goes on "
                    "where it was with the same one"
                )


class StreamedWindows:
    """Batches of windows of a :class:`TextStream`, as :class:`~lqkd.data.text.Tokens`.

    Global batch t is the windows from t * B * W on for W processes with B each, as if they were one; the last, short
    one is dropped.
    """

    def __init__(self, data: TextStream, rank: int, processes: int) -> None:
        self._data, self._rank, self._processes = data, rank, processes
        self._start = self.epoch = 0
        self.sampler = self  # of which Lightning asks set_epoch
        self.batch_sampler = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order comes next."""
        self.epoch = epoch

    def start_at(self, batch: int) -> None:
        """Let the next epoch that is read, and only that, start at this batch."""
        self._start = batch

    def __iter__(self) -> Iterator[Tokens]:
        step = self._data.batch_size * self._processes
        windows = self._mixed(random.Random(f"{self._data.run_seed} {self.epoch}"))
        first, self._start = self._start, 0
        for _ in islice(windows, first * step):
            pass
        while len(batch := list(islice(windows, step))) == step:
            own = batch[self._rank :: self._processes]
            places = torch.tensor([place for place, _ in own])
            yield Tokens(torch.stack([window for _, window in own]), None, places)

    def _mixed(self, chance: random.Random) -> Iterator[tuple[int, Tensor]]:
        """Windows with their places in the text."""
        held: list[tuple[int, Tensor]] = []
        for window in enumerate(self._windows()):
            if len(held) < self._data.mixed:
                held.append(window)
                continue
            place = chance.randrange(len(held))
            yield held[place]
            held[place] = window
        chance.shuffle(held)
        yield from held

    def _windows(self) -> Iterator[Tensor]:
        left = torch.empty(0, dtype=torch.int32)
        texts = _texts(self._data.files)
        while some := list(islice(texts, _TOGETHER)):
            left = torch.cat((left, self._data.tokens_of(some)))
            count = len(left) // self._data.context
            yield from left[: count * self._data.context].view(count, self._data.context)
            left = left[count * self._data.context :]


def _texts(files: Sequence[Path]) -> Iterator[bytes]:
    """Lines of files, and texts of lines of ``.jsonl``, each text with what ends it."""
    for file in files:
        ends = False
        with open(file, "rb") as stream:
            if stream.read(len(BOM_UTF8)) != BOM_UTF8:
                stream.seek(0)
            for number, line in enumerate(stream, 1):
                if file.suffix.lower() == ".jsonl":
                    if line.strip():
                        yield text_of_line(file, number, line) + SEPARATOR
                    continue
                _check(file, number, line)
                yield line
                ends = True
        if ends:
            yield SEPARATOR


def _check(file: Path, number: int, line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{terminal(str(file))} line {number} is not in UTF-8 ({line[error.start]:#04x}): convert the file, or "
            "take it out"
        ) from None
