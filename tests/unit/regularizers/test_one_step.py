"""Looking ahead exactly, against products of gradients that are computed one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.quantization import LSQ, Recipe, initialize_quantizers, quantize_model
from lqkd.regularizers.one_step import one_step_alignment

IMAGES = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEACHER = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def distill(logits: Tensor, weights: Tensor) -> Tensor:
    return (weights * (TEACHER - logits.double()).square()).mean()


def task(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, LABELS)


def aligned(model: nn.Module, step_size: float = 1e-4, weights: Tensor | None = None) -> Tensor:
    weights = torch.ones(4, 3, dtype=torch.float64) if weights is None else weights
    return one_step_alignment(model, distill, weights, IMAGES, (IMAGES, task), step_size)


def test_it_is_the_product_of_each_elements_gradient_with_the_tasks() -> None:
    model = network()
    parameters = list(model.parameters())
    logits = model(IMAGES)
    task = torch.autograd.grad(F.cross_entropy(logits, LABELS), parameters, retain_graph=True)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for c in range(3):
            own = torch.autograd.grad((TEACHER - logits).square()[i, c], parameters, retain_graph=True)
            expected[i, c] = sum((a * b).sum() for a, b in zip(own, task, strict=True))
    torch.testing.assert_close(aligned(network()), expected, rtol=1e-2, atol=1e-3)  # float32 logits, first order


def test_it_touches_neither_parameters_nor_statistics_nor_gradients() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    aligned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_larger_weight_on_what_is_aligned_lowers_the_task_after_the_step() -> None:
    model = network().eval()
    found = aligned(model)

    def task_after(weights: Tensor) -> float:
        parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        loss = distill(torch.func.functional_call(model, parameters, (IMAGES,)), weights)
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        moved = {name: p - 0.01 * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
        return float(F.cross_entropy(torch.func.functional_call(model, moved, (IMAGES,)), LABELS))

    uniform = torch.ones(4, 3, dtype=torch.float64)
    assert task_after(uniform + 0.5 * found.sign()) < task_after(uniform) < task_after(uniform - 0.5 * found.sign())


def test_it_sees_through_quantised_layers() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model, _ = quantize_model(model, Recipe(bits="w4a4"))
    images = IMAGES.float()
    initialize_quantizers(model, images)
    found = one_step_alignment(model, distill, torch.ones(4, 3, dtype=torch.float64), images, (images, task), 1e-4)
    assert found.isfinite().all()
    assert found.abs().min() > 0


@pytest.mark.parametrize("channels", [None, 3])
def test_a_quantizers_gradient_is_linear_in_the_incoming_one_and_can_be_differentiated_by_it(
    channels: int | None,
) -> None:
    quantizer = LSQ(4, signed=True, channels=channels)
    x = torch.randn(3, 50)
    quantizer.initialize(x)
    x.requires_grad_()
    incoming = torch.randn(3, 50, requires_grad=True)
    probe_x, probe_s = torch.randn(3, 50), torch.randn(quantizer.scale.shape)
    gradient_x, gradient_s = torch.autograd.grad(quantizer(x), (x, quantizer.scale), incoming, create_graph=True)
    ((gradient_x * probe_x).sum() + (gradient_s * probe_s).sum()).backward()

    def value(gradient: Tensor) -> Tensor:
        of_x, of_s = torch.autograd.grad(quantizer(x), (x, quantizer.scale), gradient)
        return (of_x * probe_x).sum() + (of_s * probe_s).sum()

    direction = torch.randn(3, 50)
    assert incoming.grad is not None
    slope = value(incoming.detach() + direction) - value(incoming.detach())
    torch.testing.assert_close((incoming.grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)
