"""How networks are called, and which tensor of what they return matters."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, main_tensor

A, B = torch.arange(6.0).view(3, 2), torch.arange(3)
STUDENT = Asked("student", 3)


@pytest.mark.parametrize(
    "given", [{"x": A, "scale": 2}, (A, 2), Inputs((A,), {"scale": 2})], ids=["keywords", "arguments", "both"]
)
def test_a_network_is_called_with_what_the_task_gives(given: Any) -> None:
    assert torch.equal(Inputs.of(given).call(lambda x, scale: x * scale), 2 * A)


def test_a_part_cuts_what_has_the_batch_axis_only() -> None:
    part = Inputs((A, torch.ones(5)), {"ids": B, "flag": True}).part(slice(2))
    assert (len(part), part.args[1].shape, part.keywords["flag"]) == (2, (5,), True)
    assert torch.equal(part.keywords["ids"], B[:2])


def test_float64_becomes_what_the_network_computes_in_and_whole_numbers_stay() -> None:
    fitted = Inputs((A.double(),), {"ids": B}).fit(nn.Linear(2, 2))
    assert [tensor.dtype for tensor in fitted.tensors()] == [torch.float32, torch.int64]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "returns a int"),
        ({}, "no tensor"),
        (torch.zeros(0, 3), "at least one sample"),
        (torch.zeros(()), "no tensor"),
    ],
)
def test_what_no_network_can_be_called_with_is_told(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Inputs.of(given)


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor


Named = namedtuple("Named", ["hidden", "out"])


@pytest.mark.parametrize(
    "returned",
    [A, {"aux": B, "out": A}, {"scores": A}, (A, B), [A], Answer(B, A), Named(B, A)],
    ids=["tensor", "out", "only", "tuple", "list", "dataclass", "namedtuple"],
)
def test_the_main_tensor_is_found(returned: Any) -> None:
    assert main_tensor(returned, STUDENT) is A


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("text", "the student returns a str: a tensor is needed"),
        ({"a": A, "b": B}, "returns a dict with 'a', 'b': one called 'out'"),
        ((), "returns a tuple with no tensor"),
    ],
)
def test_where_there_is_none_the_network_is_named(returned: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main_tensor(returned, STUDENT)
