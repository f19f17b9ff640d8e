"""Networks with several inputs, and with several results, each of which is proven."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import check, deploy, metadata, to_onnx, torch_program
from lqkd.export.formats import BUILDERS
from lqkd.export.program import check_program, load_program, save_program
from lqkd.export.runtimes import Runner
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.tasks import Segmentation


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, image: Tensor, *, table: Tensor, unused: Tensor | None = None) -> dict[str, Tensor | None]:
        hidden = torch.relu(self.left(image) + self.right(table))
        return {"hidden": hidden, "logits": self.head(hidden), "loss": None}


def given(samples: int, seed: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        (torch.randn(samples, 6, generator=generator),), {"table": torch.randn(samples, 4, generator=generator)}
    )


@pytest.fixture(scope="module")
def pair() -> nn.Module:
    torch.manual_seed(0)
    network, _ = quantize_model(Pair(), Recipe(bits="w4a4"))
    inputs = given(64)
    initialize_quantizers(network, *inputs.args, keywords=inputs.keywords)
    return network.eval()


@pytest.mark.parametrize("format_name", ["portable", "packed4"])
def test_a_file_has_the_names_of_the_inputs_and_results_and_every_result_is_that_of_the_network(
    pair: nn.Module, format_name: str
) -> None:
    model = to_onnx(pair, given(8), format=format_name, calibration=[given(64)])
    assert [(entry.name, entry.type.tensor_type.shape.dim[0].dim_param) for entry in model.graph.input] == [
        ("image", "batch"),
        ("table", "batch"),
    ]
    assert [entry.name for entry in model.graph.output] == ["hidden", "logits"]
    parity = metadata.read(model)["parity"]
    assert list(parity["outputs"]) == ["hidden", "logits"]
    assert parity["batches"] == [1, 7, 32]
    inputs = given(5, seed=3)
    found, expected = Runner(model, optimised=True)(inputs), inputs.call(deploy(pair, given(8), [given(64)]).network)
    assert all(torch.allclose(torch.from_numpy(found[name]), expected[name], atol=1e-5) for name in found)


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_a_difference_in_any_result_is_told_with_its_name(pair: nn.Module, name: str) -> None:
    deployed = deploy(pair, given(8), [given(64)])
    exported = BUILDERS["portable"](deployed)
    nodes = exported.model.graph.node
    node = next(node for node in nodes if name in node.output)
    node.output[0] = "inner"
    nodes.append(onnx.helper.make_node("Add", ["inner", "inner"], [name], "wrong"))
    assert f"{name} differ by" in str(check(exported, deployed, given(8)).problem)


def test_a_result_in_another_shape_fails_and_is_named(pair: nn.Module) -> None:
    deployed = deploy(pair, given(8), [given(64)])
    exported = BUILDERS["portable"](deployed)
    nodes = exported.model.graph.node
    next(node for node in nodes if "logits" in node.output).output[0] = "inner"
    nodes.append(onnx.helper.make_node("Concat", ["inner", "inner"], ["logits"], "wrong", axis=1))
    with pytest.raises(ParityError, match=r"logits have the shape \(8, 6\) in the file and \(8, 3\) in PyTorch"):
        check(exported, deployed, given(8))


class OneAxis(nn.Module):
    """Products and sums of one number a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.relu(self.first(x)))
        return x[:, 0] * x[:, 1] + x[:, 2]


def test_numbers_without_any_axis_but_the_batch_pass() -> None:
    network, _ = quantize_model(OneAxis(), Recipe(bits="w8a8", residual_bits=8))
    x = given(64).args[0]
    initialize_quantizers(network, x)
    deployed = deploy(network.eval(), x, [x])
    exported = BUILDERS["portable"](deployed)
    assert any(
        node.meta["tensor_meta"].shape == (64,) for node in deployed.network.graph.nodes if node.name in exported.grids
    )
    assert check(exported, deployed, x).problem is None


def test_a_program_is_called_as_the_network_is(pair: nn.Module, tmp_path: object) -> None:
    deployed = deploy(pair, given(8), [given(64)])
    program = torch_program.build(deployed, given(8))
    parity = check_program(program, deployed, given(8))
    assert (parity.problem, parity.outputs) == (None, {"hidden": 0.0, "logits": 0.0})
    save_program(program, f"{tmp_path}/s.pt2", {})  # type: ignore[arg-type]
    assert set(given(3).call(load_program(f"{tmp_path}/s.pt2")[0].module())) >= {"hidden", "logits"}


class Unfit(Pair):
    def forward(self, image: Tensor, table: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(torch.relu(self.left(image) + self.right(table)) * scale)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (
            (*given(2).args, given(2).keywords["table"], torch.ones(())),
            r"input 'scale' of shape \(\) has no batch axis",
        ),
        ((*given(2).args, given(2).keywords["table"], 2.0), "input 'scale' is a float: export takes tensors"),
    ],
)
def test_inputs_that_a_file_cannot_have_are_refused(inputs: tuple, told: str) -> None:
    network, _ = quantize_model(Unfit(), Recipe(bits="w4a4"))
    initialize_quantizers(network, *inputs)
    with pytest.raises(UsageError, match=told):
        to_onnx(network.eval(), inputs)


@dataclass
class Answer:
    logits: Tensor


class Boxed(nn.Sequential):
    def forward(self, image: Tensor) -> Answer:  # type: ignore[override]
        return Answer(super().forward(image))


def test_an_object_of_the_networks_own_is_refused_by_name() -> None:
    network, _ = quantize_model(Boxed(nn.Linear(6, 3)), Recipe(bits="w4a4"))
    initialize_quantizers(network, torch.randn(2, 6))
    with pytest.raises(UsageError, match="returns Answer, which is no tensor: export takes networks that return"):
        to_onnx(network.eval(), torch.randn(2, 6))


# ---- segmentation


class Segmenter(nn.Module):
    """Logits of the size of the images, by bilinear and by nearest neighbour, in torchvision's dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.wide, self.head = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        half = torch.relu(self.body(images))
        whole = torch.relu(self.wide(F.interpolate(half, scale_factor=2)))
        out = F.interpolate(self.head(whole), size=images.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": out, "aux": self.head(half)}


@pytest.fixture(scope="module")
def segmenter() -> nn.Module:
    torch.manual_seed(0)
    network, _ = quantize_model(Segmenter(), Recipe(bits="w4a4"))
    initialize_quantizers(network, torch.randn(16, 1, 15, 15))
    return network.eval()


@pytest.mark.parametrize("format_name", ["portable", "packed4"])
def test_a_segmenter_is_exported_with_both_heads_and_judged_by_its_pixels(
    segmenter: nn.Module, format_name: str
) -> None:
    images, masks = torch.randn(16, 1, 15, 15), torch.randint(3, (16, 15, 15))
    model = to_onnx(
        segmenter,
        images,
        format=format_name,
        calibration=[images],
        test=[(images, masks)],
        task=Segmentation(3),
    )
    parity = metadata.read(model)["parity"]
    assert set(parity["outputs"]) == {"out", "aux"}
    assert max(parity["outputs"].values()) < 1e-4
    assert (parity["answer"], parity["metric"], parity["samples"]) == ("class of a pixel", "miou", 16)
    assert parity["agreement"] > 0.999
    assert parity["exported"] == pytest.approx(parity["pytorch"], abs=1e-3)


def test_pixels_of_another_class_fail(segmenter: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(16, 1, 15, 15)
    call = Runner.__call__
    monkeypatch.setattr("lqkd.export.parity._compare", lambda *_, **__: ([], {}))
    monkeypatch.setattr("lqkd.export.parity._compare_end_to_end", lambda *_: None)
    monkeypatch.setattr(Runner, "__call__", lambda self, x: {name: -value for name, value in call(self, x).items()})
    with pytest.raises(ParityError, match=r"the class of a pixel differs on 1\d\.?\d* of 16 samples"):
        to_onnx(segmenter, images, calibration=[images], test=[images], task=Segmentation(3))
