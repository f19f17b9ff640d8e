"""What attention multiplies is on grids, in whoever's attention, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from lqkd.errors import UsageError
from lqkd.models import GPT
from lqkd.quantization import (
    LSQ,
    CoverageReport,
    Recipe,
    Rule,
    coverage,
    float_mode,
    initialize_quantizers,
    quantize_model,
    quantizers,
)
from lqkd.quantization.products import OPERANDS, AttentionProducts


def products(fitted: bool = True) -> AttentionProducts:
    torch.manual_seed(0)
    made = AttentionProducts(*(LSQ(4, signed=True, batched=True) for _ in range(3)), LSQ(4, signed=False, batched=True))
    if fitted:
        made(*operands())
    return made.double().eval()


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries (2, 4, 5, 8), keys and values (2, 4, 6, 8)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 4, length, 8, generator=generator).to(dtype).requires_grad_() for length in (5, 6, 6)]


MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "a mask of what is seen, and a query that sees nothing": {"attn_mask": torch.arange(30).view(5, 6) % 4 > 1},
    "numbers to add": {"attn_mask": torch.linspace(-2, 2, 30, dtype=torch.float64).view(5, 6)},
    "later keys unseen": {"is_causal": True},
    "a scale": {"scale": 0.7},
}
MASKS["a mask of what is seen, and a query that sees nothing"]["attn_mask"][2] = False


@pytest.mark.parametrize("name", MASKS)
def test_in_floating_point_they_are_pytorchs_attention(name: str) -> None:
    given = operands(torch.float64)
    found, weights = products(fitted=False)(*given, **MASKS[name])
    expected = F.scaled_dot_product_attention(*given, **MASKS[name])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(weights @ given[2], expected, rtol=1e-10, atol=1e-10)


def test_heads_may_share_keys_and_values() -> None:
    query, key, value = operands(torch.float64)
    key, value = key[:, :2], value[:, :2]
    found, _ = products(fitted=False)(query, key, value, enable_gqa=True)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


def test_the_products_are_of_the_levels_of_each_operand_by_the_definition() -> None:
    made, given = products(), operands(torch.float64)
    query, key, value = (
        getattr(made, name).dequantize(getattr(made, name).codes(x)) for name, x in zip(OPERANDS, given, strict=False)
    )
    scores = torch.einsum("bhld,bhsd->bhls", query, key) / 8**0.5
    softmax = scores.exp() / scores.exp().sum(-1, keepdim=True)
    on_grid = cast(LSQ, made.weights_quantizer)
    weights = on_grid.dequantize(on_grid.codes(softmax))
    found, own = made(*given)
    torch.testing.assert_close(own, weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, torch.einsum("bhls,bhsd->bhld", weights, value), rtol=1e-12, atol=1e-12)
    assert own.min() >= 0
    assert own.unique().numel() <= 16


def test_gradients_reach_every_operand_and_every_step() -> None:
    made, given = products(), operands(torch.float64)
    found, _ = made.train()(*given)
    found.square().sum().backward()
    assert all(cast(Tensor, x.grad).abs().sum() > 0 for x in (*given, *made.parameters()))
    assert len([*made.parameters()]) == 4


def test_a_coarse_straight_through_gradient_is_that_of_attention_on_the_levels() -> None:
    """What is inside the range of a grid gets the gradient that the level would get."""
    made, given = products(), operands(torch.float64)
    wide = [(x.detach() / 4).requires_grad_() for x in given]  # nothing is clipped
    grids = [cast(LSQ, getattr(made, name)) for name in OPERANDS]
    levels = [grid(x).detach().requires_grad_() for grid, x in zip(grids, wide, strict=False)]
    made(*wide)[0].sum().backward()
    made(*levels)[0].sum().backward()
    for x, level in zip(wide, levels, strict=True):
        torch.testing.assert_close(x.grad, level.grad)


def timm_attention(fused: bool = True) -> nn.Module:
    attention = pytest.importorskip("timm").layers.Attention(16, num_heads=2)
    attention.fused_attn = fused
    return cast(nn.Module, attention)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    return cast(nn.Module, transformers.ViTForImageClassification(config))


class Own(nn.Module):
    """An attention of somebody who calls PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def tokens() -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "PyTorch's": (lambda: nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), tokens, 1),
    "torchvision's ViT": (lambda: VisionTransformer(8, 4, 2, 2, 16, 16, num_classes=3), images, 2),
    "torchvision's Swin": (lambda: SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3), images, 2),
    "timm's": (timm_attention, tokens, 1),
    "timm's, written out": (lambda: timm_attention(fused=False), tokens, 1),
    "transformers'": (bert, images, 1),
    "lqkd's GPT": (lambda: GPT(32, 8, 16, 2, 2), lambda: torch.arange(24).view(3, 8), 2),
    "anybody's": (Own, tokens, 1),
}


def without_zeros(network: nn.Module) -> nn.Module:
    """The network with numbers in weights that begin at zero, as torchvision's classifiers do."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def quantised(name: str, **recipe: Any) -> tuple[nn.Module, CoverageReport, Tensor]:
    torch.manual_seed(0)
    build, example, _ = NETWORKS[name]
    network, report = quantize_model(without_zeros(build()), Recipe("w8a8", **recipe))
    initialize_quantizers(network, example())
    return network.eval(), report, example()


def run(network: nn.Module, x: Tensor) -> Tensor:
    returned = network(x)
    return cast(Tensor, returned if isinstance(returned, Tensor) else returned.logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_operand_of_every_attention_gets_a_grid_and_the_report_says_so(name: str) -> None:
    network, report, x = quantised(name, attention_bits=4)
    count = NETWORKS[name][2]
    own = {key: q for key, q in quantizers(network).items() if ".products." in f".{key}"}
    assert len(own) == 4 * count
    assert all(q.is_ready and q.bits == 4 for q in own.values())
    assert [q.signed for q in own.values()] == [True, True, True, False] * count
    assert [products.bits for products in report.products] == [4] * count
    assert f"products of {count} attentions with 4 bits" in report.summary()
    assert str(report).count("quantised: products of attention at") == count
    assert coverage(network) == report
    assert not torch.equal(run(network, x), run(quantised(name)[0], x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_the_setting_or_with_a_rule_against_it_is_as_it_was(name: str) -> None:
    network, report, x = quantised(name, attention_bits=8, rules=[Rule("*", attention_bits=32)])
    plain, expected, _ = quantised(name)
    assert report == expected
    assert not report.products
    torch.testing.assert_close(run(network, x), run(plain, x), rtol=0, atol=0)
    assert network.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_pickles_and_checkpoints_compute_the_same(name: str) -> None:
    network, _, x = quantised(name, attention_bits=8)
    expected = run(network, x)
    fresh, _ = quantize_model(NETWORKS[name][0](), Recipe("w8a8", attention_bits=8))
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), fresh.eval()):
        torch.testing.assert_close(run(other, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_quantization_it_is_the_float_network(name: str) -> None:
    network, _, x = quantised(name, attention_bits=2)
    torch.manual_seed(0)
    plain = without_zeros(NETWORKS[name][0]()).eval()
    quantize_model(plain, Recipe("w32a32", rules=[]))
    with float_mode(network):
        torch.testing.assert_close(run(network, x), run(plain, x), rtol=1e-4, atol=1e-5)


def test_quantising_twice_changes_nothing() -> None:
    network, report, x = quantised("anybody's", attention_bits=8)
    expected = run(network, x)
    _, again = quantize_model(network, Recipe("w8a8", attention_bits=4))
    assert again.products == report.products
    torch.testing.assert_close(run(network, x), expected, rtol=0, atol=0)


def test_rules_choose_attentions_by_name_and_class_and_leave_layers_alone() -> None:
    network, report, _ = quantised(
        "lqkd's GPT", rules=[Rule("CausalSelfAttention", attention_bits=8), Rule("blocks.1.*", attention_bits=4)]
    )
    assert [str(each) for each in report.products] == [
        "products of attention at blocks.0.attention with 8 bits",
        "products of attention at blocks.1.attention with 4 bits",
    ]
    layer = cast(Any, network).blocks[1].attention.qkv
    assert layer.weight_quantizer.bits == layer.input_quantizer.bits == 8


def test_a_compiled_attention_computes_the_same() -> None:
    network, _, x = quantised("anybody's", attention_bits=8)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))


def test_a_target_makes_the_grids_its_own() -> None:
    network, _ = quantize_model(Own(), Recipe("w8a8", target="tensorrt", attention_bits=8))
    own = cast(AttentionProducts, network.products)
    assert all(cast(LSQ, getattr(own, name)).signed for name in OPERANDS)
    with pytest.raises(UsageError, match="4 bits of the queries of attention '' are not possible with target"):
        quantize_model(Own(), Recipe("w8a8", target="tensorrt", attention_bits=4))


MISTAKES: dict[str, tuple[Callable[[], nn.Module], Recipe, str]] = {
    "no attention": (
        lambda: nn.Sequential(nn.Linear(4, 2)),
        Recipe(attention_bits=8),
        "attention_bits=8 has no effect: no part of the network calls scaled_dot_product_attention",
    ),
    "keys of another width": (
        lambda: nn.ModuleList([nn.Linear(4, 2), nn.MultiheadAttention(4, 2, kdim=2)]),
        Recipe(attention_bits=8),
        "nor is one an nn.MultiheadAttention that can be quantised",
    ),
    "a rule for a layer": (
        Own,
        Recipe(rules=[Rule("qkv", attention_bits=8)]),
        "match='qkv' matches no attention: the attentions are ",
    ),
    "too many bits": (Own, Recipe(attention_bits=9), "quantization.attention_bits=9 is not possible: bits are 1 to 8"),
    "one bit": (
        Own,
        Recipe(attention_bits=1),
        "attention_bits=1 of the queries of attention '': bits=1 is not",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str) -> None:
    build, recipe, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message):
        quantize_model(build(), recipe)


def test_an_attention_that_transformers_writes_out_is_refused() -> None:
    network = bert()
    cast(Any, network).set_attn_implementation("eager")
    with pytest.raises(UsageError, match="computes it by 'eager'; load the network with attn_implementation='sdpa'"):
        quantize_model(network, Recipe(attention_bits=8))


class Idle(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.qkv(x)[..., :16])


def test_an_attention_that_does_not_call_the_function_is_named() -> None:
    network, _ = quantize_model(nn.Sequential(Idle()), Recipe(attention_bits=8))
    with pytest.raises(UsageError, match="attention '0' has attention_bits but does not call scaled_dot_product"):
        initialize_quantizers(network, tokens())
