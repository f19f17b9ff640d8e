"""Hidden tokens, each at its own place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from lqkd.errors import UsageError
from lqkd.tasks import MaskedLM

LABELS = torch.tensor([[-100, 3, -100, 6], [2, -100, -100, -100], [-100, -100, 1, 1]])
HIDDEN = torch.full((3, 4), 5)
ATTENTION = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])


def test_loss_rows_and_metrics_are_those_of_the_places_with_a_label() -> None:
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": HIDDEN, "attention_mask": ATTENTION, "labels": LABELS}
    places = [(0, 1, 3), (0, 3, 6), (1, 0, 2), (2, 2, 1)]
    logs = log_softmax(logits.double().numpy(), axis=-1)
    expected = [-logs[place] for place in places]
    task = MaskedLM()
    task.check_batch(logits, batch)
    assert float(task.loss(logits, batch)) == pytest.approx(np.mean(expected), rel=1e-6)
    rows = task.rows(logits, batch)
    assert rows.labels is not None
    assert rows.labels.tolist() == [label for *_, label in places]
    assert torch.equal(rows.logits, torch.stack([logits[text, place] for text, place, _ in places]))
    assert task.positions(batch).tolist() == [place for _, place, _ in places]
    metrics = task.metrics()
    task.update(metrics, logits, batch)
    assert float(metrics.compute()["perplexity"]) == pytest.approx(np.exp(np.mean(expected)), rel=1e-6)
    found = task.predictions(logits, batch).tolist()
    assert found == pytest.approx([np.mean(expected[:2]), expected[2], expected[3]], rel=1e-6)


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    task = MaskedLM()
    with pytest.raises(UsageError, match="has no 'labels', which say what is hidden where"):
        task.check_batch(torch.zeros(3, 4, 7), {"input_ids": HIDDEN})
    with pytest.raises(UsageError, match="label 6 is out of range: the network knows 6"):
        task.check_batch(torch.zeros(3, 4, 6), (HIDDEN, LABELS))
    with pytest.raises(UsageError, match="logits of 3 places for 4 tokens"):
        task.check_batch(torch.zeros(3, 3, 7), (HIDDEN, LABELS))
