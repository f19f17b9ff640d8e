"""Meta-Weight-Net as a regularizer, against the published update that is differentiated as a whole in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lqkd.errors import UsageError
from lqkd.losses import HintonKL, LogitResidual
from lqkd.modules.term import DistillationTerm
from lqkd.modules.terms import Term
from lqkd.regularizers import LookAhead, MetaWeightNet
from lqkd.tasks import Rows


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES, TEACHER, OTHER = drawn(0, 8, 5), 2 * drawn(1, 8, 3), drawn(2, 6, 5)
LABELS = torch.arange(6) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def term_of(regularizer: MetaWeightNet) -> DistillationTerm:
    nn.init.normal_(regularizer.network[2].weight)  # so that it tells samples apart
    term = DistillationTerm(Term(HintonKL(temperature=2.0), "teacher", regularizer=regularizer))
    term.connect([(8, 3)], [(8, 3)])
    return term


def test_phi_descends_the_held_out_loss_after_a_step_along_the_weighted_one() -> None:
    step, student = 0.5, network()
    regularizer = MetaWeightNet(hidden=7, step_size=step)
    term = term_of(regularizer)
    divergences = term([TEACHER], Rows(student(IMAGES), None), ({}, {}))
    others = OTHER, lambda logits: F.cross_entropy(logits, LABELS)
    term.look_ahead_exactly(divergences.maps, student, [TEACHER], IMAGES, None, lambda *_: torch.zeros(()), others)
    phi = list(regularizer.parameters())
    objective = term.objective(divergences.maps)
    assert objective is not None
    found = torch.autograd.grad(objective, phi)

    wide, weigh = network().double(), copy.deepcopy(regularizer.network).double()
    theta = dict(wide.named_parameters())
    p = (TEACHER.double() / 2).softmax(1)
    own = 4 * (p * (p.log() - (wide(IMAGES.double()) / 2).log_softmax(1))).sum(1)  # (8,), eq. 3's losses
    weighted = (weigh(own.detach()[:, None]).squeeze(1) * own).mean()
    slopes = torch.autograd.grad(weighted, list(theta.values()), create_graph=True)
    moved = {name: old - step * slope for (name, old), slope in zip(theta.items(), slopes, strict=True)}
    held_out = F.cross_entropy(functional_call(wide, moved, (OTHER.double(),)), LABELS)
    expected = torch.autograd.grad(held_out, list(weigh.parameters()))

    one, other = (torch.cat([g.flatten().double() for g in both]) for both in (found, expected))
    assert other.norm() > 1e-4
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-3, atol=1e-5)


def test_a_weight_depends_on_nothing_but_the_samples_own_loss() -> None:
    loss, regularizer = LogitResidual(), MetaWeightNet(hidden=7)
    term = DistillationTerm(Term(loss, "teacher", regularizer=regularizer))
    nn.init.normal_(regularizer.network[2].weight)
    term.connect([(8, 3)], [(8, 3)])
    student = drawn(5, 8, 3)
    student[1] = TEACHER[1] - (TEACHER[0] - student[0]).flip(0)  # as far from the teacher as the first, elsewhere
    (found,) = term([TEACHER], Rows(student, None), ({}, {})).maps
    assert found.weights is not None
    weights = found.weights.detach().flatten()
    assert weights[0] == pytest.approx(float(weights[1]), abs=1e-6)
    assert weights[2:].sub(weights[0]).abs().min() > 1e-5
    expected = regularizer.network((TEACHER - student).square().mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(weights, expected.detach())


def test_what_looks_ahead_to_no_rows_or_to_two_kinds_of_them_is_refused() -> None:
    with pytest.raises(UsageError, match="rows=0 of MetaWeightNet is not possible"):
        MetaWeightNet(rows=0)
    with pytest.raises(UsageError, match=r"player rows=-1 is not possible: it must be a whole number >= 0"):
        LookAhead(exact=True, rows=-1)
    for arguments in ({}, {"exact": True, "held_out": True}):
        with pytest.raises(UsageError, match="player rows=8 is not possible with exact="):
            LookAhead(rows=8, **arguments)
