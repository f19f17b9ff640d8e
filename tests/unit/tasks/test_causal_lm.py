"""Causal language modelling: which tokens are predicted, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked
from lqkd.tasks import CausalLM

V = 7


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 5, V, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, V, (3, 5), generator=torch.Generator().manual_seed(1))


def mask(tokens: Tensor) -> Tensor:
    kept = torch.ones_like(tokens)
    kept[1, 3:], kept[2, 1:] = 0, 0
    return kept


def reference(logits: Tensor, labels: np.ndarray) -> list[float]:
    """Cross-entropy of every label that is not negative with what was said one place before, text by text."""
    log_p = log_softmax(logits.detach().double().numpy(), axis=-1)
    return [
        -log_p[b, t - 1, labels[b, t]]
        for b in range(labels.shape[0])
        for t in range(1, labels.shape[1])
        if labels[b, t] >= 0
    ]


def hidden(tokens: Tensor, kept: Tensor) -> np.ndarray:
    """Labels, of which those are negative that are padding or the first of a text."""
    labels = torch.where(kept == 1, tokens, -1)
    labels[:, 1:][kept[:, :-1] == 0] = -1
    return labels.numpy()


def batches(tokens: Tensor) -> dict[str, tuple[Any, np.ndarray]]:
    """Batches of every form, and the labels that they mean."""
    labels = tokens.clone()
    labels[0, :3], labels[2, 4] = -100, -1
    right, left = mask(tokens), mask(tokens).flip(1)
    return {
        "tokens alone": (tokens, tokens.numpy()),
        "tokens and labels": ((tokens.int(), labels), labels.numpy()),
        "a mask": ({"input_ids": tokens, "attention_mask": right}, hidden(tokens, right)),
        "a mask from the left": ({"input_ids": tokens, "attention_mask": left}, hidden(tokens, left)),
        "labels in a dict": ({"input_ids": tokens, "labels": labels, "id": ["a", "b", "c"]}, labels.numpy()),
        "a mask and labels": (
            {"input_ids": tokens, "attention_mask": right, "labels": labels},
            np.minimum(hidden(tokens, right), labels.numpy()),
        ),
    }


FORMS = ("tokens alone", "tokens and labels", "a mask", "a mask from the left", "labels in a dict", "a mask and labels")


@pytest.mark.parametrize("form", FORMS)
def test_loss_rows_and_metrics_are_those_of_the_tokens_that_follow(logits: Tensor, tokens: Tensor, form: str) -> None:
    batch, labels = batches(tokens)[form]
    task, expected = CausalLM(bytes_per_token=2.5), reference(logits, labels)
    assert float(task.loss(logits, batch).detach()) == pytest.approx(np.mean(expected), rel=1e-6)
    rows = task.rows(logits, batch)
    assert rows.labels is not None
    assert rows.logits.shape == (len(expected), V)
    assert rows.labels.tolist() == [label for text in labels for label in text[1:] if label >= 0]
    assert int(task.counted(rows, batch)) == len(expected)
    mask = batch["attention_mask"] if isinstance(batch, dict) and "attention_mask" in batch else torch.ones_like(tokens)
    before = (mask.cumsum(1) - mask).tolist()
    places = [
        before[text][place] for text, of in enumerate(labels) for place, label in enumerate(of) if place and label >= 0
    ]
    assert task.positions(batch).tolist() == places
    own = torch.nn.functional.cross_entropy(rows.logits.double(), rows.labels, reduction="none")
    assert own.tolist() == pytest.approx(expected, rel=1e-6)
    metrics = task.metrics()
    task.update(metrics, logits.detach(), batch)
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(expected)), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(np.mean(expected) / np.log(2) / 2.5, rel=1e-6)


def test_perplexity_is_of_all_tokens_and_no_mean_over_batches(logits: Tensor, tokens: Tensor) -> None:
    task = CausalLM()
    metrics, expected = task.metrics(), []
    for batch, labels in (batches(tokens)["a mask"], batches(tokens)["tokens and labels"]):
        task.update(metrics, logits.detach(), batch)
        expected += reference(logits, labels)
    assert float(metrics.compute()["perplexity"]) == pytest.approx(np.exp(np.mean(expected)), rel=1e-6)
    assert "bits_per_byte" not in metrics


def test_a_batch_of_which_nothing_is_predicted_has_no_loss_and_a_gradient_of_zero(
    logits: Tensor, tokens: Tensor
) -> None:
    task, batch = CausalLM(), (tokens, torch.full_like(tokens, -100))
    rows = task.rows(logits, batch)
    (task.loss(logits, batch) + rows.logits.sum()).backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    assert task.unlabelled(batch)
    assert not task.rows(logits.detach() / 0, batch).logits.any()  # whatever the network says of padding
    assert not task.unlabelled(tokens)


def test_always_the_frequencies_of_tokens_is_their_entropy(logits: Tensor, tokens: Tensor) -> None:
    task = CausalLM()
    constant = task.constant()
    task.update(constant, logits.detach(), tokens)  # type: ignore[arg-type]
    shares = np.bincount(tokens[:, 1:].flatten(), minlength=V) / 12
    assert float(constant.compute()) == pytest.approx(-sum(p * np.log(p) for p in shares if p), rel=1e-9)
    assert task.chance(SimpleNamespace(num_classes=V)) == pytest.approx(np.log(V))


def test_a_network_is_called_with_all_of_a_dict_but_the_labels(tokens: Tensor) -> None:
    batch = {"input_ids": tokens, "attention_mask": mask(tokens), "labels": tokens, "id": ["a", "b", "c"]}
    assert list(CausalLM().inputs(batch)) == ["input_ids", "attention_mask"]
    assert list(CausalLM(inputs=[]).inputs(batch)) == ["input_ids"]
    assert CausalLM().part(batch, slice(1, 2))["labels"].shape == (1, 5)


def test_logits_of_a_dataclass_are_cut_to_the_vocabulary(logits: Tensor) -> None:
    @dataclass
    class Output:
        logits: Tensor
        past: None = None

    assert CausalLM(vocabulary=4).outputs(Output(logits), Asked("student", 3)).shape == (3, 5, 4)


def test_agreement_is_the_share_of_tokens_and_predictions_are_of_each_text(logits: Tensor, tokens: Tensor) -> None:
    task = CausalLM()
    other = logits.detach().clone()
    other[1, 2] = -other[1, 2]
    assert task.agreement(logits, other).tolist() == pytest.approx([1.0, 0.8, 1.0])
    batch, labels = batches(tokens)["a mask"]
    found = task.predictions(logits.detach(), batch)
    assert float(found[0]) == pytest.approx(np.mean(reference(logits[:1], labels[:1])), rel=1e-6)
    assert torch.isnan(found[2])
    assert task.table(found[:1], batch, [])[0]["perplexity"] == pytest.approx(float(found[0].exp()), rel=1e-5)
    assert task.table(torch.tensor([800.0]), batch, [])[0]["perplexity"] == float("inf")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": torch.zeros(2, 4).long()}, "has no 'input_ids', but 'tokens'"),
        (torch.zeros(2, 4), "the tokens of a batch are a tensor (2, 4) of torch.float32"),
        (torch.zeros(2, 1).long(), "T > 1"),
        ((torch.zeros(2, 4).long(), torch.zeros(2, 3).long()), "each label is the token at its own place"),
        (3, "a batch of the data is a int"),
        (
            {"input_ids": torch.zeros(2, 4).long(), "attention_mask": torch.ones(2, 1, 4, 4)},
            "it must have the shape of",
        ),
    ],
)
def test_a_batch_of_another_form_is_refused_in_a_sentence(batch: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        CausalLM().inputs(batch)
    assert message in str(error.value)


def test_what_does_not_fit_is_refused_in_a_sentence(logits: Tensor, tokens: Tensor) -> None:
    task = CausalLM()
    with pytest.raises(UsageError, match=r"vocabularies differ \(teacher 9, student 7\).*vocabulary=7 of the task"):
        task.check({"teacher": torch.zeros(1, 5, 9), "student": logits}, None)
    with pytest.raises(UsageError, match="the data have 256 tokens, and logits are of fewer"):
        task.check({"student": logits}, SimpleNamespace(num_classes=256))
    with pytest.raises(UsageError, match="label 7 is out of range: the network knows 7"):
        task.check_batch(logits, tokens.index_fill(0, torch.tensor([0]), V))
    with pytest.raises(UsageError, match="logits of 4 places for 5 tokens"):
        task.check_batch(logits[:, 1:], tokens)
    with pytest.raises(UsageError, match="are the tokens that follow: give the tokens alone"):
        task.check_batch(logits[:, 1:], (tokens[:, :-1], tokens[:, 1:]))
    with pytest.raises(UsageError, match="are other tokens than the network sees"):
        task.check_batch(logits, (tokens, (tokens + 1) % V))
    with pytest.raises(UsageError, match=r"the student returns a tensor of shape 3x7 for 3 texts"):
        task.outputs(logits[:, 0], Asked("student", 3))
    for arguments in ({"vocabulary": 1}, {"bytes_per_token": 0.0}):
        with pytest.raises(UsageError, match="is not possible"):
            CausalLM(**arguments)


def test_padding_is_not_before_a_token() -> None:
    batch = {
        "input_ids": torch.ones(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]),
    }
    rows = CausalLM().rows(torch.zeros(2, 5, 7), batch)
    positions = CausalLM().positions(batch)
    assert positions.tolist() == [1, 2, 1, 2, 3]
    assert len(rows.logits) == len(positions)
