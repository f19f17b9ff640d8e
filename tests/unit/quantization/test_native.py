"""The learned step in C++: the bits of the eager functions, sums as of float64, and a machine without compiler."""

from __future__ import annotations

import copy
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lqkd.quantization import LSQ, Recipe, initialize_quantizers, native, quantize_model
from lqkd.quantization.kernels import learned_step_quantize

pytestmark = [
    pytest.mark.usefixtures("compiled_kernels"),
    pytest.mark.skipif(not native.available(), reason="no C++ compiler"),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def values(*shape: int) -> Tensor:
    """Ties, both zeros, both bounds, both infinities, a NaN, values that a float cannot divide, and ordinary ones."""
    x = torch.randn(*shape) * 2
    special = [0.0, -0.0, 0.15, -0.15, 0.45, -0.1, -2.4, 2.1, 1e-45, -1e-45, 3e38, -3e38, float("inf"), -float("inf")]
    x.view(-1)[: len(special)] = torch.tensor(special)
    return x


def step(x: Tensor, scale: Tensor, upstream: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    leaf, scale = x.clone(memory_format=torch.preserve_format).requires_grad_(), scale.clone().requires_grad_()
    quantizer = LSQ(bits, signed=signed)
    x_hat = learned_step_quantize(leaf, scale, constants=(0.01, *quantizer.code_range()), channel_axis=0)
    x_hat.backward(upstream)
    return x_hat.detach(), leaf.grad, scale.grad


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) and a.stride() == b.stride()


@pytest.mark.parametrize(("bits", "signed"), [(1, False), (2, True), (4, False), (8, True)])
@pytest.mark.parametrize("shape", [(17, 33), (3, 20011), (4, 16, 32, 32)])
def test_values_and_gradients_are_those_of_the_eager_functions_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, threads: int, shape: tuple[int, ...], bits: int, signed: bool
) -> None:
    x, upstream = values(*shape), torch.randn(shape)
    per_channel = torch.rand(shape[0]) + 0.2
    per_channel[:3] = torch.tensor([0.3, -0.3, 0.0])
    for scale in (torch.tensor(0.3), torch.tensor(-0.3), per_channel):
        fast = step(x, scale, upstream, bits, signed)
        monkeypatch.setenv("LQKD_COMPILE", "0")
        slow = step(x, scale, upstream, bits, signed)
        monkeypatch.setenv("LQKD_COMPILE", "1")
        assert same_bits(fast[0], slow[0])
        assert same_bits(fast[1], slow[1])


def test_a_nan_stays_where_it_is_and_reaches_the_step() -> None:
    x = torch.randn(5000)
    x[7] = float("nan")
    x_hat, gradient, of_scale = step(x, torch.tensor(0.3), torch.ones(5000), 4, True)
    assert x_hat.isnan().nonzero().tolist() == [[7]]
    assert gradient.isfinite().all()
    assert of_scale.isnan()


@pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3, 0.1, 0.7])])
def test_the_gradient_of_the_step_is_summed_as_in_float64_and_the_same_for_any_number_of_threads(scale: Tensor) -> None:
    x, upstream = torch.randn(3, 200_003), torch.randn(3, 200_003)
    ratio = x / scale.view(-1, 1)
    slope = ratio.clamp(-8, 7).round() - torch.where((ratio > -8) & (ratio < 7), ratio, 0.0)
    terms = (upstream * slope).double() * 0.01
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(step(x, scale, upstream, 4, True)[2])
    torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    axes = (0, 1) if scale.ndim == 0 else 1
    assert ((found[0].double() - terms.sum(axes)).abs() < 1e-6 * terms.abs().sum(axes)).all()


def test_another_layout_gives_the_same_numbers_and_keeps_it() -> None:
    x, upstream = torch.randn(4, 16, 9, 9), torch.randn(4, 16, 9, 9)
    plain = step(x, torch.tensor(0.3), upstream, 4, True)
    last = step(x.to(memory_format=torch.channels_last), torch.tensor(0.3), upstream, 4, True)
    assert torch.equal(plain[0], last[0])
    assert torch.equal(plain[1], last[1])
    assert last[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain[2], last[2])


def test_operands_that_are_not_what_memory_says_run_in_another_form() -> None:
    """Elsewhere, of another number of channels, of a trace, of the other sign: all that a pointer does not tell."""
    scale, constants = torch.tensor(0.3), (0.01, -8, 7)
    with pytest.raises(RuntimeError, match="device"):
        learned_step_quantize(torch.randn(100), scale.to("meta"), constants=constants)
    for channels, axis in ((4, 0), (6, 0), (2, 0)):
        with pytest.raises(RuntimeError, match="size"):
            learned_step_quantize(
                torch.randn(channels, 5), torch.full((3,), 0.3), constants=constants, channel_axis=axis
            )
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(learned_step_quantize(torch.randn(100), scale, constants=constants), FakeTensor)
    x = torch.randn(100)
    recorded = make_fx(lambda x: learned_step_quantize(x, scale, constants=constants))(torch.randn(100))
    expected = learned_step_quantize(x, scale, constants=constants)
    assert torch.equal(recorded(x), expected)
    assert torch.equal(learned_step_quantize(torch._neg_view(-x), scale, constants=constants), expected)


def test_a_library_that_is_broken_or_cannot_be_kept_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "cache"))
    try:
        for _ in range(2):
            native._library.cache_clear()
            assert native.available()
            (kept,) = (tmp_path / "cache").rglob("*.so")
            kept.unlink()  # not changed: it is mapped
            kept.write_bytes(b"cut off")
        monkeypatch.setattr(native, "default_cache_dir", _no_home)
        native._library.cache_clear()
        assert native.available()
        assert not list(folder.iterdir())
    finally:
        native._library.cache_clear()


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_working_compiler_the_other_forms_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert not native.available()
        assert "no-such-compiler" in caplog.text
        assert step(torch.randn(100), torch.tensor(0.3), torch.randn(100), 4, True)[2].isfinite()
    finally:
        native._library.cache_clear()


def test_a_machine_compiles_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path))
    native._library.cache_clear()
    try:
        assert native.available()
        (made,) = tmp_path.rglob("*.so")
        monkeypatch.setattr(subprocess, "run", None)  # nothing else may be called
        native._library.cache_clear()
        assert native.available()
        assert list(tmp_path.rglob("*")) == [made.parent, made]
    finally:
        native._library.cache_clear()


def test_a_compiled_network_runs_it_too_and_an_exported_one_does_not() -> None:
    eager, _ = quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), Recipe())
    x = torch.randn(8, 3, 12, 12).to(memory_format=torch.channels_last)
    initialize_quantizers(eager, x)
    x = torch.randn(8, 3, 12, 12).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(eager)
    graphs: list[str] = []

    def capture(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.extend(str(part.graph) for part in graph.modules() if isinstance(part, fx.GraphModule))
        return graph

    compiled.compile(backend=capture, fullgraph=True)
    for network in (eager, compiled):
        network(x).square().sum().backward()
    assert ["lqkd.learned_step" in "".join(graphs), "lqkd.learned_step_backward" in "".join(graphs)] == [True] * 2
    for theirs, ours in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert "lqkd.learned_step" not in str(torch.export.export(eager.eval(), (x,), strict=True).graph)
