"""Masked language modelling: the tokens that a text hides, each at its own place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lqkd.errors import UsageError
from lqkd.losses.task import UNLABELLED
from lqkd.tasks.causal_lm import CausalLM


class MaskedLM(CausalLM):
    """What stands at some places of a text, for networks that read it from both sides.

    As :class:`CausalLM`, but a label is what the logits of its own place are for: a dict with ``input_ids``, in which
    tokens are hidden, and ``labels``, negative wherever nothing is to be found, as
    ``DataCollatorForLanguageModeling`` of transformers makes it; or ``(tokens, labels)``. Labels may be of another kind
    than tokens, as names of things are. A row is a place with a label and an attention mask other than 0.
    It takes the arguments of :class:`CausalLM`.

    Examples:
        >>> task, hidden = MaskedLM(), torch.tensor([[5, 1, 7, 1]])
        >>> task.rows(torch.zeros(1, 4, 10), (hidden, torch.tensor([[-100, 6, -100, 8]]))).labels
        tensor([6, 8])
    """

    top1_agreement = False  # other tokens may be hidden in every validation: teachers would be asked each time
    answer = "hidden token"

    def positions(self, batch: Any) -> Tensor:
        """Of each row, how many tokens are before it in its text: (N,)."""
        kept = self._before(batch)[self._targets(batch) >= 0]
        return kept if len(kept) else kept.new_zeros(1)

    def check_batch(self, outputs: Tensor, batch: Any) -> None:
        """Refuse logits of another length, and labels beyond them."""
        targets = self._targets(batch)
        self._check_range(outputs, batch, int(targets.max()))

    def _targets(self, batch: Any) -> Tensor:
        """(B, T) labels, negative where there is nothing to be found.

        Raises:
            UsageError: when there are none.
        """
        labels, mask = self._text(batch).labels, self._mask(batch)
        if labels is None:
            raise UsageError("a batch of the data has no 'labels', which say what is hidden where: negative elsewhere")
        return labels.masked_fill((labels < 0) if mask is None else (labels < 0) | (mask == 0), UNLABELLED)

    def _aligned(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs, self._targets(batch)
