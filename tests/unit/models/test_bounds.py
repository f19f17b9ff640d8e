"""A network that a file describes is no larger than what the file holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.models import CifarResNet, build_model
from lqkd.models.bounds import no_larger_than

SHAPES = {key: value.shape for key, value in CifarResNet(20).state_dict().items()}


def test_the_network_of_the_file_is_built() -> None:
    with no_larger_than(SHAPES):
        CifarResNet(20)
    other = build_model("timm/mobilenetv3_small_050")
    with no_larger_than({key: value.shape for key, value in other.state_dict().items()}):
        build_model("timm/mobilenetv3_small_050")


@pytest.mark.parametrize(
    "build",
    [
        lambda: CifarResNet(60_000_008),
        lambda: CifarResNet(20, width=8000),
        lambda: nn.Sequential(*(nn.Sequential(nn.ReLU()) for _ in range(10**9))),
        lambda: nn.ParameterList(torch.empty(0) for _ in range(10**9)),
    ],
    ids=["deep", "wide", "without parameters", "without elements"],
)
def test_a_far_larger_one_is_stopped_while_it_is_built(build: object) -> None:
    with no_larger_than(SHAPES), pytest.raises(UsageError, match="far larger than the 116 tensors of the file"):
        build()  # type: ignore[operator]
    CifarResNet(20, width=64)  # the bound ends with its block
