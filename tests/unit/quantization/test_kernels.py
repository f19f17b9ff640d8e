"""Compiled and eager kernels: the same numbers, one compilation for all shapes, layouts kept, failures survived."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lqkd.quantization import LSQ, QUANTIZERS, Recipe, Rule, initialize_quantizers, kernel, native, quantize_model

LARGE = (4, 32, 32, 32)

pytestmark = pytest.mark.usefixtures("compiled_kernels")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By ``torch.compile`` alone."""
    monkeypatch.setattr(native, "available", lambda: False)
    torch._dynamo.reset()
    kernel._compiled.cache_clear()
    counters.clear()
    yield
    assert not kernel._compiler.failed


def lsq(bits: int, signed: bool, **arguments: object) -> LSQ:
    quantizer = LSQ(bits, signed=signed, **arguments)
    quantizer.initialize(torch.ones(quantizer.channels or 1, 4))
    quantizer.scale.data.fill_(0.3)
    return quantizer


def step(quantizer: LSQ, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    quantizer.scale.grad = None
    torch.manual_seed(1)
    x_hat = quantizer(x)
    x_hat.backward(torch.randn_like(x_hat))
    return x_hat.detach(), x.grad, quantizer.scale.grad


@pytest.mark.slow
def test_one_compilation_serves_every_shape_bit_width_and_layout(compiled: None) -> None:
    step(lsq(4, True), torch.randn(LARGE))
    step(lsq(4, True, channels=32), torch.randn(32, 64, 7, 7))
    step(lsq(4, True, channels=17), torch.randn(17, 5000))  # inductor splits sums over more than 4096 elements
    graphs = counters["stats"]["unique_graphs"]
    for shape in [(8, 16, 31, 33), (70000,), (3, 5, 5, 5, 500), (128, 1024)]:
        for bits, signed in [(2, True), (3, False), (8, True)]:
            step(lsq(bits, signed, batched=True), torch.randn(shape))
    for shape in [(64, 33, 7, 7), (256, 1024), (19, 5001)]:
        step(lsq(3, True, channels=shape[0]), torch.randn(shape))
    step(lsq(4, True), torch.randn(LARGE).to(memory_format=torch.channels_last))
    step(lsq(4, True), torch.randn(4, 64, 32, 32)[:, ::2, :, :])
    assert counters["stats"]["unique_graphs"] == graphs == 5


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "dtype"), [(None, torch.float32), (4, torch.float32), (None, torch.bfloat16)])
def test_compiled_and_eager_give_the_same_bits(
    compiled: None, monkeypatch: pytest.MonkeyPatch, channels: int | None, dtype: torch.dtype
) -> None:
    quantizer = lsq(3, True, channels=channels)
    x = torch.randn(LARGE)
    x.view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, float("nan")])
    x = x.to(dtype)
    fast = step(quantizer, x)
    monkeypatch.setenv("LQKD_COMPILE", "0")
    slow = step(quantizer, x)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(fast[0].view(integers)[~x.isnan()], slow[0].view(integers)[~x.isnan()])
    assert fast[0].isnan().nonzero().tolist() == [[0, 0, 0, 5]]
    torch.testing.assert_close(fast[1], slow[1], rtol=0, atol=0)
    assert fast[1].dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["apot", "lsq_plus"])
def test_other_families_compile_to_the_same_bits(compiled: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    quantizer, x = QUANTIZERS[name](3, batched=True), torch.randn(16, 5000)
    quantizer.initialize(x)
    results = []
    for wanted in ("1", "0"):
        monkeypatch.setenv("LQKD_COMPILE", wanted)
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        x_hat = quantizer(leaf)
        x_hat.backward(x.sin())
        results.append((x_hat.detach(), leaf.grad, [p.grad.clone() for p in quantizer.parameters()]))
    assert counters["stats"]["unique_graphs"] == 2
    assert torch.equal(results[0][0].view(torch.int32), results[1][0].view(torch.int32))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_forms_of_a_function_than_pytorch_allows_are_compiled(compiled: None) -> None:
    """Which would end compilation in the whole process."""
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        lsq(4, True)(torch.randn(LARGE))
        lsq(4, True, channels=32)(torch.randn(32, 100))
    assert counters["stats"]["unique_graphs"] == 2  # and none has failed


@pytest.mark.parametrize("channels", [None, 8])
def test_memory_layout_of_the_input_is_kept(channels: int | None) -> None:
    quantizer = lsq(4, True, channels=channels, channel_axis=1)
    plain = torch.randn(2, 8, 5, 3)
    expected = step(quantizer, plain)
    for x in (plain.to(memory_format=torch.channels_last), plain.transpose(0, 3).contiguous().transpose(0, 3)):
        got = step(quantizer, x)
        assert channels is not None or got[0].stride() == x.stride()
        for a, b in zip(got[:1], expected[:1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    wide = torch.randn(2, 8, 5, 6)
    assert torch.equal(quantizer(wide[..., ::2]), quantizer(wide[..., ::2].contiguous()))
    expanded = torch.randn(1, 8, 1, 1).expand(2, 8, 5, 3)
    assert torch.equal(quantizer(expanded), quantizer(expanded.contiguous()))


def test_gradient_follows_the_element_and_not_the_position_in_memory() -> None:
    quantizer = lsq(2, True)
    x, upstream = torch.randn(2, 8, 5, 3), torch.randn(2, 8, 5, 3)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=layout).requires_grad_()
        quantizer.scale.grad = None
        quantizer(leaf).backward(upstream)
        gradients.append((leaf.grad.clone(), quantizer.scale.grad.clone()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


def test_without_a_working_compiler_one_warning_and_eager_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: no compiler\nand much more")

    monkeypatch.setattr(kernel, "_compiler", kernel._Compiler())
    monkeypatch.setattr(kernel, "_compiled", broken)
    monkeypatch.setattr(native, "available", lambda: False)
    quantizer, x = lsq(4, True), torch.randn(LARGE)
    with pytest.warns(UserWarning, match=r"without torch.compile .*: InvalidCxxCompiler: no compiler\. Set LQKD"):
        first = quantizer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first, quantizer(x))
    assert torch.equal(first, quantizer.dequantize(quantizer.codes(x)))


def test_inference_mode_before_training_does_not_disturb_it() -> None:
    quantizer = lsq(5, True)
    with torch.inference_mode():
        quantizer(torch.randn(9))
    assert step(quantizer, torch.randn(9))[2] is not None


def test_an_export_leaves_later_passes_with_real_numbers() -> None:
    """Constants that are made under a trace stand for nothing once it is over."""
    model, _ = quantize_model(nn.Sequential(nn.Linear(6, 4)), Recipe(first_layer_bits=None, last_layer_bits=None))
    x = torch.randn(5, 6)
    initialize_quantizers(model, x)
    model.eval()
    kernel._constant.cache_clear()
    with contextlib.suppress(RuntimeError):  # whether it can be exported is another question
        torch.export.export(model, (x,), strict=False)
    assert type(model(x)) is Tensor
    assert torch.equal(model(x), model(x))


FAMILIES = [("w4a4", None, None), ("w1a1", None, None), ("ternary", None, None), ("w2a4", "ttq", "pact")]
FAMILIES += [("w3a3", name, name) for name in ("apot", "dorefa", "lsq_ewgs", "lsq_plus", "minmax", "n2uq")]


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="PyTorch 2.6")
@pytest.mark.parametrize(("bits", "weights", "inputs"), FAMILIES)
def test_a_program_of_torch_export_gives_the_same_bits(bits: str, weights: str | None, inputs: str | None) -> None:
    recipe = Recipe(
        bits, weight_quantizer=weights, activation_quantizer=inputs, first_layer_bits=None, last_layer_bits=None
    )
    model, _ = quantize_model(nn.Sequential(nn.Linear(6, 4)), recipe)
    x = torch.rand(5, 6)
    initialize_quantizers(model, x)
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("bits", "weights", "inputs"), FAMILIES)
def test_a_network_that_torch_jit_has_traced_gives_the_same_bits(
    bits: str, weights: str | None, inputs: str | None
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    recipe = Recipe(
        bits, weight_quantizer=weights, activation_quantizer=inputs, first_layer_bits=32, last_layer_bits=None
    )
    quantised, _ = quantize_model(network, recipe)
    initialize_quantizers(quantised, torch.randn(4, 3, 8, 8))
    kernel._constant.cache_clear()  # as in a process that has loaded a student and traces it before anything else
    traced = torch.jit.trace(quantised.eval(), torch.randn(2, 3, 8, 8))
    others = torch.randn(7, 3, 9, 8).to(memory_format=torch.channels_last)
    assert torch.equal(traced(others), quantised(others))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_layers_of_all_families_train_in_one_graph() -> None:
    """But for IR-Net's, whose estimator would be compiled anew in every step. Sums may run in another order."""
    pairs = [(4, "lsq_plus", 8, "lsq_plus"), (2, "twn", 4, "pact"), (2, "ttq", 4, "mse"), (1, "react", 1, "react")]
    pairs += [(3, "dorefa", 3, "dorefa"), (2, "n2uq", 2, "n2uq"), (4, "apot", 4, "apot"), (4, "minmax", 4, "lsq_ewgs")]
    layers = [layer for _ in pairs for layer in (nn.Linear(8, 8), nn.ReLU())]
    rules = [Rule(str(2 * place), w, a, of_w, of_a) for place, (w, of_w, a, of_a) in enumerate(pairs)]
    eager, _ = quantize_model(nn.Sequential(*layers), Recipe(rules=rules))
    x = torch.randn(64, 8)
    initialize_quantizers(eager, x)
    traced = copy.deepcopy(eager)
    traced.compile(backend="eager", fullgraph=True)
    for network in (eager.train(), traced.train()):
        network(x).square().sum().backward()
    for (name, theirs), ours in zip(eager.named_parameters(), traced.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert sum(bool(p.grad is not None and p.grad.any()) for p in eager.parameters()) > 20
