"""What llama.cpp itself, as the package ``xllamacpp`` brings it, says of a file beside the student in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked, main_tensor

RUNTIME = "xllamacpp"
COMPARED = 64
"""Tokens that are asked for, each of which takes llama.cpp some milliseconds."""


@dataclass(frozen=True)
class Comparison:
    """What llama.cpp and PyTorch say of the same tokens.

    Attributes:
        tokens: how many.
        divergence: the mean KL divergence of the student's prediction from llama.cpp's, nats a token.
        largest: the largest difference of a log-probability above one in a thousand.
        same: for how many both put the same token first.
        pytorch, llama_cpp: the cross-entropy of both, nats a token.
    """

    tokens: int
    divergence: float
    largest: float
    same: int
    pytorch: float
    llama_cpp: float

    def __str__(self) -> str:
        return (
            f"{self.llama_cpp:.4f} nats a token against {self.pytorch:.4f} in PyTorch, on {self.tokens} tokens: KL "
            f"divergence {self.divergence:.2g}, log-probabilities at most {self.largest:.2g} apart, the same token "
            f"first {self.same} times"
        )


def available() -> bool:
    """Whether the runtime is installed."""
    return find_spec(RUNTIME) is not None


def log_probabilities(path: str | Path, texts: Sequence[Sequence[int] | str], threads: int = 1) -> Iterator[Tensor]:
    """The log-probabilities (V,) of the token after each text by llama.cpp on the CPU, float32.

    Args:
        path: a GGUF file of :func:`~lqkd.export.to_gguf` with a tokenizer.
        texts: tokens, at least one and fewer than the context of the network; a string goes through the tokenizer that
            the file has.
        threads: of the CPU.

    Raises:
        UsageError: when the runtime is missing, or refuses the file or a text, or the file has no token that is text.
    """
    if not available():
        raise UsageError(f"asking llama.cpp needs {RUNTIME}: pip install {RUNTIME}")
    import gguf
    import xllamacpp

    fields = gguf.GGUFReader(path).fields
    tokens = fields[gguf.Keys.Tokenizer.LIST].contents()
    kinds = fields.get(gguf.Keys.Tokenizer.TOKEN_TYPE)  # without them all are text
    answered = _answered(path, tokens, [gguf.TokenType.NORMAL] * len(tokens) if kinds is None else kinds.contents())
    settings = xllamacpp.CommonParams()
    prompts = [text if isinstance(text, str) else list(text) for text in texts]
    longest = max(len(text.encode() if isinstance(text, str) else text) for text in prompts)
    settings.model.path, settings.n_ctx = str(path), 1 + longest
    settings.n_parallel, settings.verbosity, settings.warmup = 1, -1, False
    settings.cpuparams.n_threads = threads
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise UsageError(f"llama.cpp does not load {str(path)!r} ({error})") from error
    for prompt in prompts:
        asked: dict[str, Any] = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": len(tokens)}
        asked["logit_bias"] = [[answered, 1e3]]
        answer: dict[str, Any] = server.handle_completions(asked)
        if "error" in answer:
            raise UsageError(
                f"llama.cpp refuses a text of {len(prompt)} for {str(path)!r} ({answer['error']['message']})"
            )
        found = torch.full((len(tokens),), -torch.inf)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        yield found


def _answered(path: str | Path, tokens: Sequence[str], kinds: Sequence[int]) -> int:
    """The token that is answered, whatever the probabilities, which are told as they are.

    None are told of an answer that ends the text or is a part of a character.
    """
    import gguf

    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == gguf.TokenType.NORMAL and token.isascii() and token.isalnum():
            return number
    raise UsageError(f"{str(path)!r} has no token of letters or digits, which llama.cpp could answer")


@torch.no_grad()
def compare(path: str | Path, student: nn.Module, tokens: Tensor, most: int = COMPARED) -> Comparison:
    """Ask llama.cpp and PyTorch for tokens of texts, each from those before it.

    Args:
        path: the file.
        student: what it was made of, (B, T) tokens to logits (B, T, V), in eval mode and on the CPU.
        tokens: (B, T) int64 texts.
        most: so many tokens, spread over the texts.

    Raises:
        UsageError: as :func:`log_probabilities`.
    """
    places = [(row, place) for row in range(tokens.shape[0]) for place in range(1, tokens.shape[1])]
    places = places[:: max(1, len(places) // most)][:most]
    theirs = torch.stack([*log_probabilities(path, [tokens[row, :place].tolist() for row, place in places])])
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    logits = main_tensor(student(tokens), Asked("student", len(tokens)))
    ours = logits.float().log_softmax(dim=-1)[rows, columns - 1]
    known, p = tokens[rows, columns].unsqueeze(1), ours.exp()
    apart = torch.where(p > 0, p * (ours - theirs), 0.0)
    return Comparison(
        tokens=len(places),
        divergence=float(apart.sum(dim=1).mean()),
        largest=float((ours - theirs).abs()[p > 1e-3].max()),
        same=int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()),
        pytorch=float(-ours.gather(1, known).mean()),
        llama_cpp=float(-theirs.gather(1, known).mean()),
    )
