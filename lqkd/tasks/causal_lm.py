"""Causal language modelling: the token that follows, for each token of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED, mean_of_labelled
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks.base import Rows, Task, example_input
from lqkd.tasks.metrics import Accuracy, BitsPerByte, CrossEntropy, Frequencies, Perplexity

_TOKENS = "input_ids"
_MASK = "attention_mask"
_LABELS = "labels"


class Text(NamedTuple):
    """A batch as a language model sees it."""

    tokens: Tensor
    """(B, T) int64."""
    labels: Tensor | None
    """(B, T) int64 tokens, each at its own place, negative where it is not to be predicted; None where all are."""


class CausalLM(Task):
    """The next token of a text, in batches of tokens (B, T).

    A batch is the tokens alone, ``(tokens, labels, ...)``, or a dict as Hugging Face's collators make it, with
    ``input_ids`` and, where there are, ``attention_mask``, ``labels`` and further inputs of the network. Labels are the
    tokens at their own places, negative (-100, say) where one is not to be predicted; the shift by one is made here, so
    that no loss knows of it. Without labels every token is predicted from those before it. The first of a text never
    is, nor is one that has an attention mask of 0, or follows such a one. Networks return logits (B, T, V), or a dict
    or dataclass with them as ``logits``.

    A row is a token that is predicted. Where labels or a mask choose, which rows there are is read from the device in
    every batch; packed texts without padding need neither.

    Logs ``loss`` (cross-entropy in nats a token), ``perplexity`` (its exponential), ``acc`` (the share of tokens that
    are put first), and ``bits_per_byte``, which networks with other tokenizers can be compared by. A distillation logs
    ``val/top1_agreement`` too, the share of tokens for which student and teacher put the same one first. The best
    checkpoint is that of the least ``val/loss``, whatever the losses of the distillation.

    Args:
        vocabulary: logits beyond this number are left out, as those that pad a vocabulary to a round number; null for
            none.
        inputs: keys of a dict that networks are called with beside ``input_ids``; null for all but the labels.
        bytes_per_token: of the text on average, for ``bits_per_byte``; 1 where tokens are bytes, null leaves the metric
            out.

    Raises:
        UsageError: when an argument is not possible.

    Examples:
        >>> import torch
        >>> task, tokens = CausalLM(), torch.tensor([[5, 6, 7, 8]])
        >>> task.rows(torch.zeros(1, 4, 10), tokens).labels
        tensor([6, 7, 8])
        >>> padded = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
        >>> task.rows(torch.zeros(1, 4, 10), padded).labels
        tensor([6, 7])
    """

    monitor = "val/loss"
    mode = "min"
    one_row_a_sample = False
    predicts_classes = True
    class_axis = -1
    top1_agreement = True
    answer = "next token"

    def __init__(
        self,
        vocabulary: int | None = None,
        bytes_per_token: float | None = None,
        inputs: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if vocabulary is not None and vocabulary < 2:
            raise UsageError(f"vocabulary={vocabulary!r} is not possible: it must be at least 2, or null")
        if bytes_per_token is not None and not 0 < bytes_per_token < math.inf:
            raise UsageError(f"bytes_per_token={bytes_per_token!r} is not possible: it must be above 0, or null")
        self.vocabulary, self.bytes_per_token = vocabulary, bytes_per_token
        self.keys = None if inputs is None else tuple(inputs)

    # ---- the path of a batch

    def inputs(self, batch: Any) -> Any:
        """The tokens; of a dict they and other tensors than the labels, as keyword arguments."""
        text = self._text(batch)
        if not isinstance(batch, Mapping):
            return text.tokens
        wanted = batch.keys() - {_TOKENS, _LABELS} if self.keys is None else self.keys
        given = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key in wanted}
        return {_TOKENS: text.tokens} | given

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """Logits (B, T, V), float32.

        Raises:
            UsageError: when the network returns anything else.
        """
        logits = main_tensor(returned, asked)
        if logits.ndim == 3 and len(logits) == asked.samples:
            return logits[..., : self.vocabulary].float()
        shape = "x".join(map(str, logits.shape)) or "()"
        raise UsageError(
            f"the {asked.network} returns a tensor of shape {shape} for {asked.samples} texts: logits of shape "
            "(B, T, V) are needed"
        )

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross-entropy, 0-dim: the mean over the tokens that are predicted, 0 where there is none."""
        logits, labels = self.rows(outputs, batch)
        assert labels is not None
        return mean_of_labelled(lambda known: F.cross_entropy(logits, known), labels, logits.shape[1])

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every token that is predicted: logits (N, V) and labels (N,), text by text.

        Where there is none, a single row of zeros without a label stands for them: its divergence is 0.
        """
        logits, labels = self._aligned(outputs, batch)
        logits, flat = logits.flatten(0, 1), labels.flatten()
        if not self._chooses(batch):
            return Rows(logits, flat)
        kept = (flat >= 0).nonzero().squeeze(1)
        if len(kept) == 0:  # zeros in the graph, whatever the network says of padding
            return Rows(logits[:1].masked_fill(torch.ones_like(logits[:1], dtype=torch.bool), 0.0), flat[:1])
        return Rows(logits[kept], flat[kept])

    def places(self, batch: Any) -> Tensor | None:
        """The tokens with an attention mask other than 0; None, for all, without one."""
        self._text(batch)  # which reads the mask
        mask = self._mask(batch)
        return None if mask is None else mask != 0

    def positions(self, batch: Any) -> Tensor:
        """Of each token that is predicted, how many are before it in its text: (N,) from 1 on."""
        flat = self._before(batch)[:, 1:].flatten()
        if not self._chooses(batch):
            return flat
        kept = flat[self._targets(batch).flatten() >= 0]
        return kept if len(kept) else flat[:1]

    def _before(self, batch: Any) -> Tensor:
        """(B, T) how many tokens, without padding, are before each place."""
        tokens, mask = self._text(batch).tokens, self._mask(batch)
        counted = torch.ones_like(tokens) if mask is None else (mask != 0).to(tokens.dtype)
        return counted.cumsum(1) - counted

    def part(self, batch: Any, samples: slice) -> Any:
        text = self._text(batch)
        if isinstance(batch, Mapping):
            count = len(text.tokens)
            return {
                key: value[samples] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
                for key, value in batch.items()
            }
        return text.tokens[samples] if text.labels is None else (text.tokens[samples], text.labels[samples])

    # ---- evaluation

    def metrics(self) -> MetricCollection:
        found: dict[str, Any] = {"loss": CrossEntropy(), "acc": Accuracy(), "perplexity": Perplexity()}
        if self.bytes_per_token is not None:
            found["bits_per_byte"] = BitsPerByte(self.bytes_per_token)
        return MetricCollection(found, compute_groups=False)

    def predictions(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean cross-entropy (B,) of each text, in nats a token; NaN where none of its tokens is predicted."""
        logits, labels = self._aligned(outputs, batch)
        known = labels.masked_fill((labels < 0) | (labels >= logits.shape[-1]), -100)
        losses = F.cross_entropy(logits.transpose(1, 2), known, reduction="none")
        return losses.sum(dim=1) / (known >= 0).sum(dim=1)

    def table(self, predictions: Any, batch: Any, names: Sequence[str]) -> list[dict[str, Any]]:
        """``loss`` and ``perplexity`` of each text."""
        pairs = zip(predictions.tolist(), predictions.double().exp().tolist(), strict=True)
        return [{"loss": float(f"{loss:.6g}"), "perplexity": float(f"{value:.6g}")} for loss, value in pairs]

    def agreement(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """The share of the tokens of each text (B,) for which both put the same one first."""
        return (ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean(dim=1)

    def chance(self, data: Any) -> float:
        """ln V, of all tokens alike; of data that do not tell V, whatever the network reaches."""
        size = self.vocabulary or getattr(data, "num_classes", None)
        return math.inf if size is None else math.log(size)

    def constant(self) -> Frequencies:
        return Frequencies()

    # ---- before the first batch

    def example(self, data: Any, device: torch.device) -> Tensor | None:
        return example_input(data, device)

    def check(self, outputs: Mapping[str, Tensor], data: Any) -> None:
        """Refuse networks of different vocabularies, and data with tokens that networks do not know."""
        sizes = {name: logits.shape[-1] for name, logits in outputs.items()}
        tokens = getattr(data, "num_classes", None)
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        if len(set(sizes.values())) > 1:
            raise UsageError(
                f"vocabularies differ ({told}): they must agree; where the larger is padded, vocabulary="
                f"{min(sizes.values())} of the task leaves the rest out"
            )
        if tokens is not None and sizes and min(sizes.values()) < tokens:
            raise UsageError(f"the data have {tokens} tokens, and logits are of fewer ({told})")

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse logits of another length, tokens beyond them, and labels that are no tokens at their own places."""
        text = self._text(batch)
        self._check_range(outputs, batch, int(self._targets(batch).max()))
        if text.labels is not None and bool(((text.labels >= 0) & (text.labels != text.tokens)).any()):
            shifted = bool((text.labels[:, :-1] == text.tokens[:, 1:]).all())
            raise UsageError(
                "the labels of a batch are the tokens that follow: give the tokens alone, the task shifts them itself"
                if shifted
                else "the labels of a batch are other tokens than the network sees: each must be the token at its own "
                "place, negative where it does not count"
            )

    def _check_range(self, outputs: Tensor, batch: Any, largest: int) -> None:
        """Refuse logits of another length than the texts, and fewer than a label needs.

        Raises:
            UsageError: then.
        """
        length = self._text(batch).tokens.shape[1]
        if outputs.shape[1] != length:
            raise UsageError(
                f"the network returns logits of {outputs.shape[1]} places for {length} tokens: give as many"
            )
        if largest >= outputs.shape[-1]:
            raise UsageError(
                f"label {largest} is out of range: the network knows {outputs.shape[-1]}, numbered from 0 on; a "
                "tokenizer must be that of the network"
            )

    def unlabelled(self, batch: Any) -> bool:
        return self._chooses(batch) and not bool((self._targets(batch) >= 0).any())

    # ---- parts

    def _text(self, batch: Any) -> Text:
        """Read a batch.

        Raises:
            UsageError: when it is none.
        """
        if isinstance(batch, Mapping):
            if _TOKENS not in batch:
                raise UsageError(f"a batch of the data has no {_TOKENS!r}, but {', '.join(map(repr, batch))}")
            tokens, labels = batch[_TOKENS], batch.get(_LABELS)
        else:
            parts = (batch,) if isinstance(batch, Tensor) else batch
            if not isinstance(parts, (tuple, list)) or not parts:
                raise UsageError(f"a batch of the data is a {type(batch).__name__}: tokens (B, T) are needed")
            tokens, labels = parts[0], parts[1] if len(parts) > 1 else None
        _check("tokens", tokens)
        if labels is not None:
            _check("labels", labels)
            if labels.shape != tokens.shape:
                raise UsageError(
                    f"the labels of a batch are of shape {tuple(labels.shape)}, its tokens of {tuple(tokens.shape)}: "
                    "each label is the token at its own place"
                )
            labels = labels.to(torch.int64)
        mask = batch.get(_MASK) if isinstance(batch, Mapping) else None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UsageError(
                f"the {_MASK} of a batch is {shape}: it must have the shape of the tokens, {tuple(tokens.shape)}"
            )
        return Text(tokens.to(torch.int64), labels)

    def _chooses(self, batch: Any) -> bool:
        """Whether labels or a mask say which tokens are predicted."""
        return self._text(batch).labels is not None or self._mask(batch) is not None

    def _targets(self, batch: Any) -> Tensor:
        """(B, T - 1) what follows each token but the last, negative where that is not predicted."""
        text = self._text(batch)
        labels = text.tokens if text.labels is None else text.labels
        labels, mask = labels[:, 1:], self._mask(batch)
        if mask is not None:
            labels = labels.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), UNLABELLED)
        return labels if text.labels is None else labels.masked_fill(labels < 0, UNLABELLED)

    @staticmethod
    def _mask(batch: Any) -> Tensor | None:
        return batch.get(_MASK) if isinstance(batch, Mapping) else None

    def _aligned(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (B, T - 1, V) and the tokens (B, T - 1) that they are for."""
        return outputs[:, :-1], self._targets(batch)


def _check(what: str, found: Any) -> None:
    if isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point() and found.shape[1] > 1:
        return
    told = (
        f"a tensor {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    )
    raise UsageError(f"the {what} of a batch are {told}: whole numbers of shape (B, T), T > 1, are needed")
