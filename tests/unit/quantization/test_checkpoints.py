"""State of quantised networks: saved and loaded at any time, by name, shared layers and float weights included."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lqkd.errors import UsageError
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, quantizers

UNIFORM = {"first_layer_bits": None, "last_layer_bits": None}


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantised(seed: int = 0, **recipe: object) -> nn.Module:
    torch.manual_seed(seed)
    model, _ = quantize_model(CifarResNet(8, width=4), Recipe(**{"bits": "w4a4", **recipe}))
    return model


def test_a_network_saved_before_any_forward_loads_strictly_and_is_fitted_later() -> None:
    model = quantised(1)
    result = model.load_state_dict(quantised().state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert not any(bool(q.initialized) for q in quantizers(model).values())
    initialize_quantizers(model, images())
    assert all(bool(q.initialized) for q in quantizers(model).values())


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_fitted_network_loads_strictly_into_a_fresh_one_before_any_forward(per_channel: bool) -> None:
    model, fresh = quantised(per_channel=per_channel), quantised(1, per_channel=per_channel)
    initialize_quantizers(model, images())
    fresh.load_state_dict(model.state_dict(), strict=True)
    saved = {key: value.clone() for key, value in fresh.state_dict().items()}
    fresh.train()(images() * 50)  # would be fitted to other data if it were fitted again
    for name, quantizer in quantizers(fresh).items():
        assert torch.equal(quantizer.scale, saved[f"{name}.scale"])


def test_a_float_checkpoint_lacks_only_quantizers_and_strict_loading_says_so() -> None:
    floats = CifarResNet(8, width=4).state_dict()
    model = quantised()
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        model.load_state_dict(floats, strict=True)
    assert "Unexpected key" not in str(caught.value)
    result = model.load_state_dict(floats, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {key for key in model.state_dict() if "quantizer" in key}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in floats.items())
    assert not any(bool(q.initialized) for q in quantizers(model).values())


def test_a_layer_used_twice_has_one_set_of_keys_and_survives_a_copy() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.conv(x).mean((2, 3)) - self.conv(y).mean((2, 3)))

    model, _ = quantize_model(Siamese(), Recipe(**UNIFORM))
    x, y = images(), images().flip(0)
    initialize_quantizers(model, x, y)
    other = copy.deepcopy(model)
    assert len(list(model.state_dict())) == len(set(model.state_dict()))
    assert [key for key in model.state_dict() if key.endswith("scale")] == [
        f"{layer}.{part}_quantizer.scale" for layer in ("conv", "head") for part in ("weight", "input")
    ]
    assert torch.equal(other.eval()(x, y), model.eval()(x, y))
    other.conv.weight_quantizer.scale.data.mul_(2)
    assert not torch.equal(other.conv.weight_quantizer.scale, model.conv.weight_quantizer.scale)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
        (nn.Linear(3, 4), (2, 3)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 5, 5)),
    ],
)
def test_layers_take_their_input_by_name_as_the_float_ones_do(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model, _ = quantize_model(layer, Recipe(**UNIFORM))
    initialize_quantizers(model, x)
    assert torch.equal(model.eval()(input=x), model(x))


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_compiling_a_network_in_place_changes_no_name() -> None:
    model = quantised()
    before = list(model.state_dict())
    model.compile(backend="eager")
    model.layer1[0].compile(backend="eager")
    assert list(model.state_dict()) == before
    initialize_quantizers(model, images())
    assert all(bool(q.initialized) for q in quantizers(model).values())


def test_fitting_compiles_nothing_and_succeeds_at_a_second_attempt_when_the_first_saw_zeros() -> None:
    counters.clear()
    model, _ = quantize_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), Recipe(**UNIFORM))
    model.compile(backend="eager")
    for x in (torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3, 4)):
        initialize_quantizers(model, x)
        assert bool(model[0].input_quantizer.initialized) == bool(x.any())
    assert counters["stats"]["unique_graphs"] == 0
    model.eval()(x)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("part", [None, "1"])
def test_a_wrapper_of_torch_compile_is_refused_since_it_renames_every_layer(part: str | None) -> None:
    inner = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
    network = inner if part is None else nn.Sequential(nn.ReLU(), inner)
    with pytest.raises(UsageError, match=r"made by torch.compile .* call its compile\(\) method afterwards") as caught:
        quantize_model(network, Recipe())
    assert (f"part {part!r}" in str(caught.value)) == (part is not None)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_saved_from_inside_a_wrapper_of_torch_compile_load(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    network = CifarResNet(8, width=4)
    state = torch.compile(network, backend="eager").state_dict()
    assert all(key.startswith("_orig_mod.") for key in state)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    other = CifarResNet(8, width=4)
    load_weights(other, str(path))
    assert torch.equal(other.conv1.weight, network.conv1.weight)
