"""Perplexity of a language model in floating point on a whole text, by lqkd's evaluation and by transformers' own loss.

    python -m benchmarks.whole_text wikitext2_test.txt

cuts the text, with the model's tokenizer, into windows that each begin anew. The network is the one that transformers
loads; that :func:`lqkd.models.causal_lm` gives the same logits, to the last bit, is seen on the first window. Of every
window transformers computes its loss, and :class:`lqkd.tasks.CausalLM` its metrics. Says what both are so far while it
runs, and ends with status 1 where they differ in the first three digits. In float32.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.smollm2 import PRETRAINED
from lqkd.data.tokenized import Tokenizer
from lqkd.models import causal_lm
from lqkd.models.hugging_face import located
from lqkd.tasks import CausalLM

EVERY = 60.0
"""Seconds between lines."""


def windows_of(text: Path, pretrained: str, context: int) -> Tensor:
    """(N, context) tokens of a text, the rest left out."""
    tokens = torch.from_numpy(np.concatenate([*Tokenizer(pretrained).numbers([text.read_bytes()])])).long()
    return tokens[: len(tokens) // context * context].view(-1, context)


@torch.no_grad()
def main() -> None:
    """Measure both, window by window."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--minutes", type=float, default=math.inf, help="windows are measured for so long")
    parser.add_argument("--pretrained", default=PRETRAINED)
    given = parser.parse_args()
    windows = windows_of(given.text, given.pretrained, given.context)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        **located(given.pretrained, "--pretrained"), dtype=torch.float32
    ).eval()
    task, losses = CausalLM(), list[float]()
    if not torch.equal(network(windows[:1]).logits, causal_lm(given.pretrained)(windows[:1]).logits):
        sys.exit("causal_lm has other logits than the network of transformers")
    metrics = task.metrics()
    begun = told = time.monotonic()
    for window in windows.split(1):
        answer = network(window, labels=window)
        losses.append(float(answer.loss))
        task.update(metrics, answer.logits, window)
        now = time.monotonic()
        if now - told > EVERY or len(losses) == len(windows) or now - begun > 60 * given.minutes:
            ours, theirs, told = float(metrics["loss"].compute()), math.fsum(losses) / len(losses), now
            count = f"{len(losses)} of {len(windows)} windows, {len(losses) * (given.context - 1):,} tokens"
            print(
                f"{count}: {ours:.6f} nats a token, perplexity {math.exp(ours):.4f}; "
                f"by transformers {theirs:.6f}, {math.exp(theirs):.4f}",
                flush=True,
            )
        if now - begun > 60 * given.minutes:
            break
    if f"{math.exp(ours):.3g}" != f"{math.exp(theirs):.3g}":
        sys.exit("they differ in the first three digits")


if __name__ == "__main__":
    main()
