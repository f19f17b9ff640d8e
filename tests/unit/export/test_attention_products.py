"""Products of attention on integers: what the file computes there is whole-number arithmetic to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from lqkd.errors import UsageError
from lqkd.export import Deployed, check, deploy, portable, to_litert, to_onnx
from lqkd.export.differences import Compared
from lqkd.export.runtimes import Runner, kernels
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from tests.unit.export.networks import alter, images
from tests.unit.export.test_islands import Transformer


class Decoder(nn.Module):
    """Rows of an image, each of which sees those above it, by the function that PyTorch has."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(24, 48), nn.Linear(16, 16), nn.Linear(16, 5)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        x = self.qkv(x.transpose(1, 2).flatten(2))
        q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.head(self.out(F.scaled_dot_product_attention(q, k, v, **self.attention).transpose(1, 2).flatten(2)))


def timm_vit() -> nn.Module:
    vision_transformer = pytest.importorskip("timm").models.vision_transformer
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return cast(nn.Module, vision_transformer.VisionTransformer(**sizes, init_values=1.0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "PyTorch's attention": (Transformer, 1),
    "timm's": (timm_vit, 2),
    "windows": (lambda: SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5), 2),
    "causal": (lambda: Decoder(is_causal=True), 1),
    "masked": (lambda: Decoder(attn_mask=torch.arange(64).view(8, 8) % 3 > 0), 1),
}


def student(name: str, bits: int = 8) -> nn.Module:
    torch.manual_seed(0)
    network, _ = quantize_model(NETWORKS[name][0](), Recipe("w8a8", attention_bits=bits))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    initialize_quantizers(network, images(32))
    return network.eval()


def of_products(names: Any) -> set[str]:
    return {name for name in names if "products." in name}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bits", [8, 4])
def test_both_products_are_integer_kernels_whose_codes_are_the_references_to_the_last_bit(name: str, bits: int) -> None:
    network, count = student(name, bits), NETWORKS[name][1]
    deployed = deploy(network, images(4), [images(32)], gates=True)
    exported = portable.build(deployed)
    assert check(exported, deployed, images(4)).problem is None
    found = kernels(exported.model)
    assert found.integer["MatMulIntegerToFloat"] == found.integer["QLinearMatMul"] == count
    assert not found.float_products
    assert len(of_products(exported.grids.values())) == 4 * count
    x = images(16, seed=5)
    run = Runner(exported.model, optimised=True, tensors=list(exported.grids.values()))(x.numpy())
    reference = Compared(deployed.network, exported.codes(run), forced=True)
    reference(x)
    by_name = {row.name: row for row in reference.rows}
    assert sum("out" in key or "proj" in key for key in by_name) >= count
    for key, row in by_name.items():
        if "norm" not in key and "weights_quantizer" not in key:
            assert row.fraction == 0 or not behind_product(deployed, key), key
        assert row.steps <= 1, key


def behind_product(deployed: Deployed, grid: str) -> bool:
    """Whether the codes of a grid are those of a product of attention, or are moved from it."""
    node = next(node for node in deployed.network.graph.nodes if node.target == grid)
    return "matmul" in str(node.args[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_no_grid_but_its_own_is_between_the_projection_and_an_operand(name: str) -> None:
    deployed = deploy(student(name), images(4), [images(32)])
    found = (*deployed.calibrated, *deployed.rerouted)
    assert not [place for place in found if any(part in place for part in ("qkv", "in_proj", "products"))]


@pytest.mark.parametrize("operand", ["query", "key", "value", "weights"])
def test_one_altered_scale_fails(operand: str) -> None:
    deployed = deploy(student("PyTorch's attention"), images(4), [images(32)])
    exported = portable.build(deployed)
    names = [tensor.name for tensor in exported.model.graph.initializer]
    alter(exported.model, next(name for name in names if f"{operand}_quantizer.scale" in name), 1e-4)
    assert check(exported, deployed, images(4)).problem == "a scale in the file differs from the student's"


def test_one_altered_zero_point_fails_layer_by_layer() -> None:
    """Of queries: another of keys adds the same to all scores of a query, which a softmax leaves as they are."""
    deployed = deploy(student("PyTorch's attention"), images(4), [images(32)])
    exported = portable.build(deployed)
    scores = next(node for node in exported.model.graph.node if node.op_type == "MatMul")
    queries = next(node for node in exported.model.graph.node if scores.input[0] in node.output)
    exported.model.graph.initializer.append(numpy_helper.from_array(np.uint8(126), "moved"))
    queries.input[2] = "moved"
    problem = check(exported, deployed, images(4)).problem
    assert problem is not None
    assert "the first difference arises at" in problem
    assert "weights_quantizer" in problem


@pytest.mark.parametrize("format_name", ["openvino", "packed4", "qonnx"])
def test_other_formats_have_the_grids_and_the_same_answers(format_name: str) -> None:
    if format_name != "packed4":
        pytest.importorskip(format_name)
    torch.manual_seed(0)
    network, _ = quantize_model(Decoder(), Recipe("w4a8", attention_bits=8))
    initialize_quantizers(network, images(32))
    model = to_onnx(network.eval(), images(4), format=format_name, calibration=[images(32)])
    assert any("weights_quantizer" in tensor.name for tensor in model.graph.initializer)


def test_a_format_without_a_softmax_refuses_it_in_one_sentence() -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(UsageError, match="--format litert cannot have"):
        to_litert(student("causal"), images(4), calibration=[images(32)])
