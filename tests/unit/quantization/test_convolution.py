"""What a quantised layer keeps for its backward pass, and how the step of a first layer's grid gets its gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lqkd.quantization import LSQ, Recipe, convolution, initialize_quantizers, native, quantize_model

pytestmark = pytest.mark.usefixtures("compiled_kernels", "every_size")

compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small inputs are quantised once more too."""
    monkeypatch.setattr(convolution, "ONCE_MORE_FROM", 1)


def quantised(*modules: nn.Module, inputs: Tensor, **recipe: Any) -> nn.Module:
    model, _ = quantize_model(nn.Sequential(*modules), Recipe(first_layer_bits=None, last_layer_bits=None, **recipe))
    initialize_quantizers(model, inputs)
    return model.train()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(x)
    (output * output.detach().sin()).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


LAYERS = [
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (2, 4, 9, 9)),
    (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    (nn.Linear(6, 3), (7, 6)),
    (nn.Linear(6, 3), (2, 5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])
def test_a_quantised_input_is_freed_once_its_layer_has_run(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = quantised(nn.Tanh(), layer, bits="w4a4", inputs=torch.randn(shape))
    seen = []

    def note(_: nn.Module, __: Any, x_hat: Tensor) -> None:
        seen.append(StorageWeakRef(x_hat.untyped_storage()))

    model[1].input_quantizer.register_forward_hook(note)
    output = model(torch.randn(shape, requires_grad=True))
    padded = getattr(layer, "padding_mode", "zeros") != "zeros"  # a copy, which the layer keeps
    assert (output.requires_grad and seen[0].expired()) or padded


@pytest.mark.parametrize("bits", [{"bits": "w4a4"}, {"bits": "w1a1"}, {"bits": "w3a3", "activation_quantizer": "pact"}])
def test_what_is_quantised_once_more_gives_the_same_gradients_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, bits: dict[str, Any]
) -> None:
    x = torch.rand(3, 4, 9, 9, requires_grad=True)
    modules = nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.ReLU()
    model = quantised(*modules, nn.Flatten(2), nn.Linear(25, 3), inputs=x.detach(), **bits)
    saving = gradients(model, x)
    monkeypatch.setattr(convolution, "_recomputed", lambda *_: nullcontext())
    plain = gradients(model, x)
    assert all(torch.equal(saving[name], plain[name]) for name in plain)


def test_a_checkpointed_block_keeps_nothing_but_its_input() -> None:
    x = torch.randn(3, 4, 9, 9)
    block = quantised(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), bits="w4a4", inputs=x)
    of_block, seen = gradients(block, x), []
    block[2].register_forward_pre_hook(lambda _, inputs: seen.append(StorageWeakRef(inputs[0].untyped_storage())))
    output = checkpoint(block, x, use_reentrant=False)
    assert seen[0].expired()
    block.zero_grad()
    (output * output.detach().sin()).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, of_block[name], rtol=1e-5, atol=1e-6)


GEOMETRIES: list[dict[str, Any]] = [{}, {"stride": 2, "padding": 1}, {"dilation": (2, 1)}, {"groups": 3}]


@compiler
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_step_of_a_first_layer_gets_the_gradient_that_goes_through_the_images(
    geometry: dict[str, Any], sign: float
) -> None:
    x = torch.randn(5, 3, 12, 12).to(memory_format=torch.channels_last if sign < 0 else torch.contiguous_format)
    model = quantised(nn.Conv2d(3, 6, 3, **geometry), nn.ReLU(inplace=True), bits="w4a4", inputs=x)
    model[0].input_quantizer.scale.data *= sign
    assert type(model[0](x).grad_fn).__name__ == "_FirstConvolutionBackward"
    short, through = gradients(model, x), gradients(model, x.clone().requires_grad_())
    step = "0.input_quantizer.scale"
    assert all(torch.equal(short[name], through[name]) for name in through if name != step)
    assert through[step] != 0
    torch.testing.assert_close(short[step], through[step], rtol=1e-5, atol=1e-6)


@compiler
@pytest.mark.parametrize(
    ("first", "second"), [("scale", "weight"), ("weight", "scale"), ("weight", "weight"), ("scale", "scale")]
)
def test_the_gradient_of_a_first_layer_has_a_gradient_itself(first: str, second: str) -> None:
    x, found = torch.randn(5, 3, 8, 8), []
    model = quantised(nn.Conv2d(3, 6, 3), nn.Tanh(), bits="w4a4", inputs=x)
    parameters = {"scale": model[0].input_quantizer.scale, "weight": model[0].weight}
    for inputs in (x, x.clone().requires_grad_()):
        model.zero_grad()
        once = torch.autograd.grad(model(inputs).square().sum(), parameters[first], create_graph=True)
        once[0].square().sum().backward()
        found.append(parameters[second].grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@compiler
def test_a_quantised_tensor_that_others_read_keeps_all_of_its_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.conv = nn.AvgPool2d(2), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.pool(x)
            return self.conv(pooled) + pooled

    x = torch.randn(5, 3, 8, 8)
    recipe = Recipe(bits="w4a32", first_layer_bits=None, last_layer_bits=None, residual_bits=8)
    model, _ = quantize_model(Net(), recipe)
    initialize_quantizers(model, x)
    short, through = gradients(model.train(), x), gradients(model, x.clone().requires_grad_())
    assert all(torch.equal(short[name], through[name]) for name in through)


@compiler
def test_a_single_image_without_a_batch_has_gradients() -> None:
    model = quantised(nn.Conv2d(3, 6, 3), bits="w4a4", inputs=torch.randn(5, 3, 8, 8))
    assert gradients(model, torch.randn(3, 8, 8))["0.input_quantizer.scale"].isfinite()


@pytest.mark.parametrize("changed", ["weight", "scale"])
def test_a_parameter_that_is_changed_before_the_backward_pass_is_an_error_as_everywhere(changed: str) -> None:
    x = torch.randn(5, 6, requires_grad=True)
    model = quantised(nn.Tanh(), nn.Linear(6, 3), bits="w32a4", inputs=x.detach())
    output = model(x).sum()
    with torch.no_grad():
        {"weight": model[1].weight, "scale": model[1].input_quantizer.scale}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_fault_that_is_put_into_a_quantised_input_stays_in_it() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    model = quantised(nn.Tanh(), nn.Linear(6, 3), bits="w32a4", inputs=x.detach())

    def fault(_: nn.Module, __: Any, x_hat: Tensor) -> None:
        with torch.no_grad():
            x_hat.fill_(1.0)

    model[1].input_quantizer.register_forward_hook(fault)
    of_weight = gradients(model, x)["1.weight"]
    assert torch.equal(of_weight, of_weight[:, :1].expand(3, 6))


def test_parts_of_a_graph_are_differentiated_one_after_the_other() -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    x_hat = LSQ(4, batched=True)(x)
    with convolution.not_keeping(x_hat):
        first, second = (nn.functional.linear(x_hat, weight).sum() for _ in range(2))
    first.backward()
    second.backward(inputs=[weight])
    assert torch.equal(weight.grad[0], 2 * x_hat.detach().sum(0))


@compiler
def test_who_watches_a_first_layers_quantised_input_gets_its_gradient() -> None:
    x, seen = torch.randn(5, 3, 8, 8), []
    model = quantised(nn.Conv2d(3, 6, 3), bits="w4a4", inputs=x)

    def watch(_: nn.Module, __: Any, x_hat: Tensor) -> None:
        x_hat.retain_grad()
        seen.append(x_hat)

    model[0].input_quantizer.register_forward_hook(watch)
    gradients(model, x)
    assert seen[0].grad.abs().max() > 0


@compiler
@pytest.mark.parametrize("watched", ["by a hook on all modules", "by itself"])
def test_who_watches_it_otherwise_gets_it_too(watched: str) -> None:
    x, seen = torch.randn(5, 3, 8, 8), []
    model = quantised(nn.Conv2d(3, 6, 3), bits="w4a4", inputs=x)

    def watch(module: nn.Module, _: Any, output: Tensor) -> None:
        if module is model[0].input_quantizer:
            seen.append(output)  # of which somebody may ask for the gradient

    if watched == "by itself":
        seen.append(model[0].input_quantizer(x))
        seen[0].retain_grad()
        convolution.convolve(model[0], seen[0], model[0].quantized_weight()).sum().backward()
        assert seen[0].grad.abs().max() > 0
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(watch)
        loss = model(x).sum()
        handle.remove()
        assert torch.autograd.grad(loss, seen[0])[0].abs().max() > 0


def test_images_whose_memory_is_used_again_leave_the_gradient_as_it_was() -> None:
    x = torch.randn(5, 6)
    model = quantised(nn.Linear(6, 3), bits="w32a4", inputs=x)
    expected = gradients(model, x)["0.weight"]
    model.zero_grad()
    output = model(x)
    x.numpy().fill(0)  # as a loader does, behind PyTorch's back
    (output * output.detach().sin()).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


def test_where_hooks_on_what_is_kept_are_forbidden_it_is_kept() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    model = quantised(nn.Tanh(), nn.Linear(6, 3), bits="w4a4", inputs=x.detach())
    expected = gradients(model, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        found = gradients(model, x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_is_left_to_a_layer_that_was_not_asked_for_gradients() -> None:
    x = torch.randn(5, 3, 8, 8)
    model = quantised(nn.Conv2d(3, 6, 3), bits="w4a4", inputs=x)
    expected = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    model.requires_grad_(False)
    assert torch.equal(model(x), expected)
    assert not model(x).requires_grad
