"""Operations that stay in floating point between integer parts: each is written, and the file is proven."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from lqkd.errors import ParityError, UsageError
from lqkd.export import check, deploy, portable, to_onnx
from lqkd.export.island_writers import IslandWriters
from lqkd.export.reference import Reference
from lqkd.export.runtimes import Runner, kernels
from tests.unit.export.networks import images, quantised


class Transformer(nn.Module):
    """Patches, a class token, positions, one block of PyTorch's attention and an MLP, and a classifier of the token."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)
        self.batch_first = batch_first

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        y = self.norm1(x)
        if not self.batch_first:
            y = y.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + (y if self.batch_first else y.transpose(0, 1))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Windows(nn.Module):
    """Attention as timm and Swin write it: shifted positions, one projection taken apart, a bias on the scores."""

    def __init__(self, fused: bool, causal: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16))
        self.scale = nn.Parameter(torch.ones(1, 2, 1, 1))
        self.head = nn.Linear(8, 5)
        self.fused, self.causal = fused, causal

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.stem(x), (-1, 2), (2, 3)).permute(0, 2, 3, 1).contiguous().view(-1, 16, 8)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mask = {"is_causal": True} if self.causal else {"attn_mask": self.bias, "scale": 0.3}
            y = F.scaled_dot_product_attention(q, k, v, **mask)
        else:
            scores = torch.einsum("B H I D, B H J D -> B H I J", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
            scores = scores * self.scale.exp().expand_as(scores)
            y = (scores + self.bias).softmax(-1) @ v
        y = self.out(y.swapaxes(1, 2).reshape(-1, 16, 8))
        y = torch.stack([y, 1.0 - y / 2], dim=1).sub(y.unsqueeze(1)).sum(1) - y.amax(-1, keepdim=True)
        return self.head(stochastic_depth(y, 0.5, "row", self.training).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "PyTorch's attention": Transformer,
    "with the batch behind": lambda: Transformer(batch_first=False),
    "windows, fused": lambda: Windows(fused=True),
    "windows, causal": lambda: Windows(fused=True, causal=True),
    "windows, written out": lambda: Windows(fused=False),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_transformer_passes_with_every_layer_on_integers_and_the_logits_of_any_batch(name: str) -> None:
    student = quantised(NETWORKS[name](), bits="w8a8")
    model = to_onnx(student, images(4), calibration=[images(32)])
    found = kernels(model)
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in student.modules())
    attention = sum(isinstance(module, nn.MultiheadAttention) for module in student.modules())
    assert not found.float_products or set(found.float_products) <= products_of_attention(found.float_products)
    assert found.integer["QGemm"] + found.integer["QLinearConv"] == layers + attention
    deployed = deploy(student, images(4), [images(32)]).network
    for count in (1, 3):
        x = images(count, seed=3)
        theirs = Runner(model, optimised=True)(x.numpy())["logits"]
        np.testing.assert_allclose(theirs, deployed(x).detach().numpy(), atol=0.03 * np.abs(theirs).max())


def products_of_attention(names: tuple[str, ...]) -> set[str]:
    """Those names that are of the two products between activations."""
    return {name for name in names if "attention" in name or "matmul" in name}


def test_a_softmax_between_two_layers_on_integers_passes() -> None:
    """ONNX Runtime's kernel for a softmax of codes has another table of exponentials."""
    gate = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Softmax(dim=1), nn.Linear(16, 8), nn.Linear(8, 5))
    nn.init.normal_(gate[1].weight, std=0.2)
    model = to_onnx(quantised(gate, bits="w8a8"), images(32), calibration=[images(32)])
    assert kernels(model).integer["QGemm"] == 3


class Rows(nn.Sequential):
    """Linear layers on three axes, with nothing in floating point but their results."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(64, 16), nn.Linear(16, 5))


def test_a_linear_layer_on_three_axes_gives_the_sums_of_the_reference_to_the_last_bit() -> None:
    student = quantised(Rows(), bits="w8a8")
    deployed = deploy(student, images(4), [images(32)])
    x = images(16, seed=5)
    theirs = Runner(portable.build(deployed).model, optimised=True)(x.numpy())["logits"]
    reference = Reference(deployed.network)
    np.testing.assert_array_equal(theirs, reference(x).numpy())
    assert reference.exact


def test_an_altered_code_of_attentions_projection_fails() -> None:
    student = quantised(Transformer(), bits="w8a8")
    deployed = deploy(student, images(4), [images(32)])
    exported = portable.build(deployed)
    assert check(exported, deployed, images(4)).problem is None
    codes = next(x for x in exported.model.graph.initializer if x.name == "attention.in_proj.weight_codes")
    values = numpy_helper.to_array(codes).copy()
    values[0, 0] += 9 if values[0, 0] < 100 else -9
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    assert check(exported, deployed, images(4)).problem is not None


class Masked(Transformer):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.zeros(5, 5))


class Crossed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.other = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        return self.attention(x, self.other(x), x, need_weights=False)[0]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return F.scaled_dot_product_attention(y, y, y, enable_gqa=True)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (Masked, "'attention' cannot be exported: it is given a mask"),
        (Crossed, "'attention' cannot be exported: keys or values are not what queries are of"),
        (Grouped, "scaled_dot_product_attention in the network's forward cannot be exported"),
    ],
)
def test_attention_that_a_file_does_not_have_is_refused_by_its_place(
    network: Callable[[], nn.Module], told: str
) -> None:
    student = quantised(network(), bits="w8a8")
    with pytest.raises(UsageError, match=told):
        deploy(student, images(4), [images(32)])


def test_attention_at_another_temperature_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    write = IslandWriters._island_attention
    monkeypatch.setattr(
        IslandWriters,
        "_island_attention",
        lambda self, x, label, s: write(self, x, label, s | {"scale": s["scale"] * 1.05}),
    )
    with pytest.raises(ParityError):
        to_onnx(quantised(Windows(fused=True), bits="w8a8"), images(4), calibration=[images(32)])


class InPlace(nn.Module):
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.stem, self.head, self.change = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), change

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.change(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.__setitem__((slice(None), 0), 0.0),
        lambda x: x[:, 0].add_(5.0),
        lambda x: x.mul_(2.0),
        lambda x: F.relu(x, inplace=True),
        nn.ReLU(inplace=True),
    ],
)
def test_a_tensor_that_is_changed_in_place_and_read_again_is_refused(change: Callable[[Tensor], object]) -> None:
    student = quantised(InPlace(change), bits="w8a8")
    with pytest.raises(UsageError, match=r"cannot be exported: .*it changes a tensor in place"):
        deploy(student, images(4), [images(32)])


def test_a_tensor_that_is_read_beside_what_changed_it_is_refused() -> None:
    class Beside(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + F.relu(x, inplace=True)).mean((2, 3)))

    student = quantised(Beside(lambda x: x), bits="w8a8")
    with pytest.raises(UsageError, match=r"cannot be exported: .*it changes a tensor in place"):
        deploy(student, images(4), [images(32)])


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.flatten(1, 2)
        attended, weights = self.attention(x, x, x)
        return {"attended": attended, "weights": weights}


def test_weights_of_attention_that_a_network_returns_are_in_the_file() -> None:
    student = quantised(Weights(), bits="w8a8")
    model = to_onnx(student, images(4), calibration=[images(32)])
    found = Runner(model, optimised=True)(images(4).numpy())
    np.testing.assert_allclose(found["weights"], student(images(4))["weights"].detach().numpy(), atol=0.02)


class Seen(nn.Module):
    """Attention that is told by truth values what it sees, and tokens that are repeated for each of several windows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token, self.head = nn.Linear(8, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1, 2).reshape(-1, 8, 8))  # three windows a sample
        token = self.token.expand(x.shape[0], -1, -1).expand(-1, 2, 8)
        x = torch.cat([token, x], 1)
        seen = torch.ones(10, 10, dtype=torch.bool).tril(3)
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=seen)
        return self.head(y.mean(1)).reshape(-1, 15)


def test_masks_of_truth_values_and_tokens_for_each_window_are_written() -> None:
    student = quantised(Seen(), bits="w8a8")
    to_onnx(student, images(4), calibration=[images(32)])


def test_an_encoder_layer_is_refused_by_its_name() -> None:
    network = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    student = quantised(network, bits="w8a8")
    with pytest.raises(UsageError, match="operator TransformerEncoderLayer in 1 cannot be exported"):
        deploy(student, images(4), [images(32)])
