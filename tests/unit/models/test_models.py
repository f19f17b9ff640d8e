"""Networks and their weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lqkd.errors import UsageError
from lqkd.models import CifarResNet, build_model, builtin_weights, load_weights

DATA = Path(os.environ.get("LQKD_DATA", "missing"))


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_cifar_resnets_have_the_papers_number_of_parameters(depth: int, parameters: int) -> None:
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == parameters


def test_a_depth_that_is_not_six_n_plus_two_is_refused() -> None:
    with pytest.raises(UsageError, match="depth=18 is not possible"):
        CifarResNet(18)


@pytest.mark.skipif(not DATA.is_dir(), reason="LQKD_DATA is not set")
@pytest.mark.parametrize("depth", [20, 56])
def test_published_cifar_weights_fit_the_network(depth: int) -> None:
    network = CifarResNet(depth)
    path = DATA / "weights" / f"cifar10_resnet{depth}.safetensors"
    load_weights(network, str(path))
    assert torch.equal(network.state_dict()["linear.weight"], load_file(path)["linear.weight"])


LARGEST = {"scenes_detector": 400_000, "topics_gpt": 1_000_000}
"""Bytes of what is no network for digits."""


@pytest.mark.parametrize("name", builtin_weights())
def test_built_in_weights_are_small(name: str) -> None:
    import lqkd

    assert (Path(lqkd.__file__).parent / "weights" / f"{name}.safetensors").stat().st_size < LARGEST.get(name, 300_000)


def test_weights_load_from_safetensors_and_from_torch(tmp_path: Path) -> None:
    source = CifarResNet(8, width=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        network = CifarResNet(8, width=2)
        load_weights(network, str(tmp_path / name))
        assert torch.equal(network.conv1.weight, source.conv1.weight)


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path: Path) -> None:
    save_file(CifarResNet(8, width=4).state_dict(), tmp_path / "w.safetensors")
    network = CifarResNet(8, width=2)
    before = network.conv1.weight.clone()
    with pytest.raises(UsageError, match=r"are of another network than CifarResNet: they have another shape") as caught:
        load_weights(network, str(tmp_path / "w.safetensors"))
    assert str(caught.value).count("w.safetensors") == 1
    assert str(caught.value).endswith("(depth, width, num_classes) must be those of the run that wrote the file")
    assert torch.equal(network.conv1.weight, before)


def test_weights_for_other_classes_are_refused_by_the_setting_that_accepts_them(tmp_path: Path) -> None:
    source = CifarResNet(8, num_classes=1000, width=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = CifarResNet(8, num_classes=2, width=2)
    head = network.linear.weight.clone()
    for replace_head, remedy in (
        (False, "give the model replace_head: true"),
        (None, "a teacher must know its classes"),
    ):
        with pytest.raises(UsageError, match=f"are for 1000 classes and the network has 2: {remedy}"):
            load_weights(network, str(tmp_path / "w.safetensors"), replace_head)
    told = load_weights(network, str(tmp_path / "w.safetensors"), replace_head=True)
    assert told is not None
    assert told.endswith("are for 1000 classes and the network has 2: its last layer 'linear' starts anew")
    assert torch.equal(network.conv1.weight, source.conv1.weight)
    assert torch.equal(network.linear.weight, head)


def test_a_new_last_layer_is_no_way_around_another_network(tmp_path: Path) -> None:
    save_file(CifarResNet(8, num_classes=7, width=4).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="are of another network than CifarResNet"):
        load_weights(CifarResNet(8, num_classes=2, width=2), str(tmp_path / "w.safetensors"), replace_head=True)


def test_missing_and_damaged_weight_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    for source, message in (
        ("nowhere.pt", "do not exist"),
        ("builtin:nothing", "do not exist: built in are"),
        (str(tmp_path / "w.safetensors"), "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            load_weights(CifarResNet(8), source)


def test_networks_come_from_torchvision_and_timm_by_name() -> None:
    assert build_model("torchvision/resnet18", num_classes=7).fc.out_features == 7
    assert build_model("timm/resnet18", num_classes=7).fc.out_features == 7


def test_a_network_for_segmentation_fetches_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*arguments: object, **keywords: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched)
    network = build_model("torchvision/lraspp_mobilenet_v3_large", num_classes=7)
    assert network.eval()(torch.zeros(1, 3, 32, 32))["out"].shape == (1, 7, 32, 32)


@pytest.mark.parametrize("name", ["torchvision/resnet19", "timm/resnet19", "resnet18"])
def test_unknown_network_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"name='{name}'"):
        build_model(name)
