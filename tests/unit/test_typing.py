"""The public interface is typed: a user's file is checked against it, strictly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api

import lqkd

ROOT = Path(__file__).parents[2]
GOOD = """
import torch
from torch import Tensor, nn

from lqkd import DistillModule, FrozenTeacher, Recipe, quantize_model
from lqkd.losses import DistillationLoss
from lqkd.models import CifarResNet
from lqkd.quantization import CoverageReport
from lqkd.regularizers import ElementwiseMLP, FixedBalance, Regularizer


class Mine(Regularizer):
    def response(self, teacher: Tensor, student: Tensor, labels: Tensor | None) -> Tensor:
        return torch.ones_like(teacher)


class Absolute(DistillationLoss):
    def forward(self, teacher: Tensor, student: Tensor, labels: Tensor | None = None) -> Tensor:
        return (teacher - student).abs()


student: nn.Module
report: CoverageReport
student, report = quantize_model(CifarResNet(8, width=8), Recipe(bits="w4a4"))
module: DistillModule = DistillModule(
    FrozenTeacher(CifarResNet(14)), student, regularizer=ElementwiseMLP(guard="barrier"), balance=FixedBalance()
)
regularizer: Regularizer | None = module.regularizer
"""
BAD = """
from lqkd import Recipe
from lqkd.models import CifarResNet

Recipe(bitz="w4a4")
CifarResNet(8).no_such_thing_here()
CifarResNet(8, depht=3)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy finds in two files of a user, read at once, since what they import is most of the work.

    With the package's own settings, so that CI's check finds the cache warm.
    """
    folder = tmp_path_factory.mktemp("mine")
    for name, text in (("good.py", GOOD), ("bad.py", BAD)):
        (folder / name).write_text(text, encoding="utf-8")
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        out, err, _ = api.run([*settings, str(folder / "good.py"), str(folder / "bad.py")])
    assert not err
    errors = [line for line in out.splitlines() if ": error:" in line]
    assert all(re.match(r"\S*(good|bad)\.py:", line) for line in errors), errors
    return {name: [line for line in errors if f"{name}:" in line] for name in ("good.py", "bad.py")}


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "lqkd" / "py.typed").is_file()


@pytest.mark.slow
def test_a_file_that_uses_the_package_rightly_is_accepted(found: dict[str, list[str]]) -> None:
    assert found["good.py"] == []


def test_the_public_names_are_known_to_type_checkers() -> None:
    text = (ROOT / "lqkd" / "__init__.py").read_text(encoding="utf-8")
    assert {name for name in lqkd.__all__ if f"import {name} as {name}" in text} == {*lqkd.__all__} - {"__version__"}


@pytest.mark.slow
def test_a_mistake_in_a_call_is_found(found: dict[str, list[str]]) -> None:
    assert [line.split(":")[1] for line in found["bad.py"]] == ["5", "6", "7"]
