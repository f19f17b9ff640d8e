"""Networks are timed against the same network in float32."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from benchmarks import onnx_latency
from benchmarks.runtimes import RESULTS
from lqkd.export import Deployed, deploy, floating, portable
from lqkd.export.latency import measure, peak_memory, slowest_nodes
from lqkd.export.runtimes import kernels, session
from lqkd.models import CifarResNet
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, float_mode, initialize_quantizers, quantize_model

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    network, _ = quantize_model(CifarResNet(8, width=8), Recipe(bits="w8a8"))
    initialize_quantizers(network, IMAGES, batch_statistics=True)
    return network.eval()


@pytest.fixture(scope="module")
def deployed(network: nn.Module) -> Deployed:
    return deploy(network, IMAGES, [IMAGES])


@pytest.fixture(scope="module")
def model(deployed: Deployed) -> onnx.ModelProto:
    return portable.build(deployed).model


def test_the_float_network_computes_what_the_student_does_without_quantizers(
    network: nn.Module, deployed: Deployed
) -> None:
    plain = floating.build(deployed).model
    kinds = {node.op_type for node in plain.graph.node}
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}
    assert not kernels(plain).integer
    (logits,) = session(plain, optimised=True).run(None, {"images": IMAGES.numpy()})
    with torch.no_grad(), float_mode(network):
        expected = network(IMAGES).numpy()
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()  # weights are rounded to 8 bits


def test_contestants_take_turns_and_ratios_are_to_the_first() -> None:
    order: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            for _ in range(1 if self.name == "fast" else 400):
                x = x + 1
            return x

    told: list[tuple[int, int]] = []
    found = measure(
        {"fast": Noted("fast"), "slow": Noted("slow")},
        Inputs.of(IMAGES[:1]),
        rounds=4,
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert order[-8:] == ["fast", "slow", "slow", "fast"] * 2
    assert found.ratios["fast"] == 1.0
    assert found.ratios["slow"] > 2
    assert found.milliseconds["slow"] > found.milliseconds["fast"] > 0
    assert (found.rounds, found.threads, found.batch) == (4, 1, 1)


def test_timing_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    measure({"one": nn.Identity()}, Inputs.of(IMAGES[:1]), threads=before + 1, rounds=1)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process")
def test_peak_memory_is_of_a_process_of_its_own(model: onnx.ModelProto) -> None:
    ballast = np.ones(400_000_000, np.uint8)  # of this process, in which the network is not run
    peak = peak_memory(model, Inputs.of(IMAGES[:1]))
    assert peak is not None
    assert 10e6 < peak < ballast.nbytes


def test_the_profile_names_the_nodes_of_the_optimised_graph(model: onnx.ModelProto) -> None:
    nodes = slowest_nodes(model, Inputs.of(IMAGES[:1]), runs=3)
    assert {kind for _, kind, _ in nodes} >= {"QLinearConv", "QLinearAdd"}
    times = [milliseconds for _, _, milliseconds in nodes]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("setting", "measured"), [("2", False), ("1", True)])
def test_a_network_that_was_measured_with_other_settings_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, measured: bool
) -> None:
    def reached(*arguments: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(onnx_latency, "contestants", reached)
    for name in ("onnx_latency_xeon_cpu_ort1.32.0.csv", "onnx_latency_xeon_operators_cpu_ort1.32.0.csv"):
        kept = "a.operators.csv" if "operators" in name else "a.csv"
        (tmp_path / kept).write_bytes((RESULTS / name).read_bytes())
    given = ["--csv", str(tmp_path / "a.csv"), "--rounds", "200", "--busy", "--threads", setting]
    monkeypatch.setattr(sys, "argv", ["onnx_latency", *given])
    with nullcontext() if measured else pytest.raises(InterruptedError):
        onnx_latency.main()


def test_a_single_round_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["onnx_latency", "--csv", "a.csv", "--rounds", "1"])
    with pytest.raises(SystemExit):
        onnx_latency.main()
    assert "--rounds 1 is too few for quartiles: give 2 or more" in capsys.readouterr().err
