"""How the learned parameters of quantizers train: found by the optimizer, moved, positive, independent of grouping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models import CifarResNet
from lqkd.quantization import LSQ, QUANTIZERS, Recipe, initialize_quantizers, quantize_model, quantizers
from lqkd.quantization.quantizers import Quantizer

LEARNED = ["apot", "lsq", "lsq_ewgs", "lsq_plus", "lsq_power_of_two", "n2uq", "pact", "react", "seq", "tq2_0", "ttq"]
OF_WEIGHTS = ("seq", "tq2_0", "ttq")


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def student(bits: str = "w4a4") -> nn.Module:
    torch.manual_seed(0)
    model, _ = quantize_model(CifarResNet(8, width=4), Recipe(bits=bits))
    initialize_quantizers(model, images())
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    loss = F.cross_entropy(model(images()), torch.arange(8))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_an_optimizer_made_before_the_first_batch_moves_the_step_of_every_layer() -> None:
    torch.manual_seed(0)
    model, _ = quantize_model(CifarResNet(8, width=4), Recipe(bits="w4a4"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    initialize_quantizers(model, images())
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    steps = {name: q.scale for name, q in quantizers(model).items()}
    before = {name: scale.detach().clone() for name, scale in steps.items()}
    step(model, optimizer)
    for name, scale in steps.items():
        assert id(scale) in known, name
        assert not torch.equal(scale, before[name]), name


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a2"])
def test_steps_stay_positive_and_the_loss_finite_under_a_learning_rate_of_ten(bits: str) -> None:
    model = student(bits)
    scales = [p for q in quantizers(model).values() for p in q.parameters()]
    optimizer = torch.optim.SGD(scales, lr=10.0)
    for _ in range(50):
        assert step(model, optimizer).isfinite()
        for quantizer in quantizers(model).values():
            assert (quantizer.step() > 0).all()
            assert quantizer.levels().isfinite().all()


def test_step_gradients_without_their_factor_sum_over_channels_to_that_of_one_step() -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    upstream = torch.randn_like(weight)
    gradients = {}
    for channels in (None, 6):
        quantizer = LSQ(4, signed=True, channels=channels, bound_gradient=False)
        quantizer.initialize(torch.ones(6, 4, 3, 3))
        quantizer.scale.data.fill_(0.3)
        quantizer.double()(weight).backward(upstream)
        elements_per_step = weight.numel() / (channels or 1)
        gradients[channels] = quantizer.scale.grad * math.sqrt(elements_per_step * 7)  # Q_P is 7
    torch.testing.assert_close(gradients[6].sum(), gradients[None])


def grid(name: str) -> tuple[Quantizer, Tensor]:
    bits = 2 if name in OF_WEIGHTS else {"react": 1}.get(name, 3)
    quantizer = QUANTIZERS[name](bits, batched=name not in OF_WEIGHTS)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))  # a block of tq2_0 is 256 wide
    return quantizer, x.abs() if name == "pact" else x


def test_the_families_that_learn_are_these() -> None:
    def learns(name: str) -> bool:
        for bits in (1, 2, 3):
            for batched in (False, True):
                try:
                    if list(QUANTIZERS[name](bits, batched=batched).parameters()):
                        return True
                except UsageError:
                    continue
        return False

    assert [name for name in sorted(QUANTIZERS) if learns(name)] == LEARNED


@pytest.mark.parametrize("name", LEARNED)
def test_whatever_a_quantizer_calls_a_parameter_gets_a_gradient_and_moves(name: str) -> None:
    quantizer, x = grid(name)
    quantizer(x)
    before = {key: p.detach().clone() for key, p in quantizer.named_parameters()}
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    (quantizer(x) * torch.linspace(-1, 2, x.numel()).view_as(x)).sum().backward()
    optimizer.step()
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, key
        assert not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", ["lsq", "lsq_ewgs", "lsq_plus", "pact", "minmax"])
def test_range_learning_keeps_no_intermediate_for_the_backward_pass(name: str) -> None:
    quantizer = QUANTIZERS[name](4, batched=True)
    x = torch.rand(64, 100, requires_grad=True)
    quantizer(x)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantizer(x)
    assert sum(size for size in kept if size > 1) == x.numel()  # the input itself


def test_weights_that_decay_leave_the_steps_alone() -> None:
    from lqkd.modules.optimizers import student_groups

    model = student()
    optimizer = torch.optim.AdamW(student_groups(model, torch.nn.ModuleList()), lr=0.1, weight_decay=0.5)
    before = {name: q.scale.detach().clone() for name, q in quantizers(model).items()}
    weight = model.conv1.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.conv1.weight.norm() < 0.96 * weight.norm()
    assert all(torch.equal(q.scale, before[name]) for name, q in quantizers(model).items())


# --- data that say nothing ------------------------------------------------------------------------------------------


def run(model: nn.Module, batches: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def small() -> Any:
    torch.manual_seed(3)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model, _ = quantize_model(layers, Recipe(bits="w4a4", first_layer_bits=None, last_layer_bits=None))
    return model.train()


def test_a_batch_of_zeros_first_is_survived_and_the_next_data_are_fitted() -> None:
    model, data = small(), torch.randn(32, 6)
    initialize_quantizers(model, torch.zeros(32, 6))
    assert not model[0].input_quantizer.initialized
    run(model, [torch.zeros(32, 6), data], torch.optim.SGD(model.parameters(), lr=0.01))
    fresh = LSQ(4, batched=True)
    fresh.initialize(data)
    quantizer = model[0].input_quantizer
    assert quantizer.initialized
    assert quantizer.signed
    assert quantizer.scale.item() == pytest.approx(fresh.scale.item(), rel=0.1)  # one step of training on


def test_a_training_resumed_before_the_quantizers_were_fitted_ends_like_an_uninterrupted_one() -> None:
    zeros = [torch.zeros(32, 6)] * 2
    data = [torch.randn(32, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole, first = small(), small()
    run(whole, zeros + data, torch.optim.SGD(whole.parameters(), lr=0.01))
    run(first, zeros, torch.optim.SGD(first.parameters(), lr=0.01))
    assert not first[0].input_quantizer.initialized
    resumed = small()
    resumed.load_state_dict(first.state_dict())
    run(resumed, data, torch.optim.SGD(resumed.parameters(), lr=0.01))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


# --- fewer bits in the middle of a training ---------------------------------------------------------------------------


def loss_at_a_switch(refit: bool) -> tuple[float, float, float]:
    """The loss without training, after training at 8 bits, and just after the switch to 4."""
    model = student("w8a8")
    untrained = step(model, torch.optim.SGD(model.parameters(), lr=0.0)).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        before = step(model, optimizer).item()
    for quantizer in quantizers(model).values():
        quantizer.set_bits(4)
        if refit:
            quantizer.forget()
    return untrained, before, step(model, torch.optim.SGD(model.parameters(), lr=0.0)).item()


def test_steps_fitted_anew_at_a_switch_to_fewer_bits_keep_most_of_what_was_learned() -> None:
    untrained, before, after = loss_at_a_switch(refit=True)
    assert before < 0.1 * untrained
    assert after - before < 0.5 * (untrained - before)


def test_rescaled_steps_are_finite_at_a_switch_though_the_range_of_eight_bits_is_too_wide_for_four() -> None:
    _, _, rescaled = loss_at_a_switch(refit=False)
    _, _, fitted = loss_at_a_switch(refit=True)
    assert math.isfinite(rescaled)
    assert fitted < rescaled
