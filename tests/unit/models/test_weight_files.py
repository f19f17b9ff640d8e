"""Weights as other programs save them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lqkd import Recipe, quantize_model
from lqkd.errors import UsageError
from lqkd.models import CifarResNet, load_weights


def network() -> CifarResNet:
    return CifarResNet(8, width=2)


def state(prefix: str = "") -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {prefix + key: value for key, value in network().state_dict().items()}


def loaded(path: Path) -> str | None:
    """What is told of loading ``path``, whose first weight must be that of :func:`state`."""
    taken = network()
    told = load_weights(taken, str(path))
    assert torch.equal(taken.conv1.weight, state()["conv1.weight"])
    return told


@pytest.mark.parametrize(
    ("prefix", "left_out"),
    [
        ("module.", "'module.'"),
        ("model.", "'model.'"),
        ("net.", "'net.'"),
        ("module._orig_mod.", "'module.'"),
        ("_orig_mod.module.model.", "'module.model.'"),
    ],
)
def test_what_a_wrapper_puts_before_all_names_is_left_out_and_told(tmp_path: Path, prefix: str, left_out: str) -> None:
    torch.save(state(prefix), tmp_path / "w.pth")
    told = loaded(tmp_path / "w.pth")
    assert told is not None
    assert f"are read without {left_out} before their names" in told


@pytest.mark.parametrize("holder", ["state_dict", "model_state_dict", "model", "net", "ema"])
def test_the_state_dict_is_found_within_a_checkpoint_and_told(tmp_path: Path, holder: str) -> None:
    optimizer = torch.optim.Adam(network().parameters())
    torch.save({"epoch": 3, holder: state("module."), "optimizer": optimizer.state_dict()}, tmp_path / "w.pth")
    told = loaded(tmp_path / "w.pth")
    assert told is not None
    assert f"are taken from its entry {holder!r}, are read without 'module.'" in told


def test_of_a_network_and_its_average_the_network_is_taken_and_told(tmp_path: Path) -> None:
    torch.save({"ema": {key: value * 0 for key, value in state().items()}, "model": state()}, tmp_path / "w.pth")
    assert "entry 'model', not from 'ema'" in str(loaded(tmp_path / "w.pth"))


def test_an_average_of_torch_is_read_without_its_counter(tmp_path: Path) -> None:
    average = network()
    average.load_state_dict(state())
    torch.save(AveragedModel(average).state_dict(), tmp_path / "w.pth")
    assert "beside it" not in str(loaded(tmp_path / "w.pth"))


def test_the_network_is_taken_out_of_a_lightning_checkpoint_with_other_tensors(tmp_path: Path) -> None:
    held = state("network.") | {"criterion.weight": torch.ones(10)}
    torch.save({"state_dict": held, "pytorch-lightning_version": "2.6.6"}, tmp_path / "w.ckpt")
    assert "without 'network.' before their names and 1 tensors beside it" in str(loaded(tmp_path / "w.ckpt"))


def test_two_networks_that_fit_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": state("student.") | state("teacher.")}, tmp_path / "w.ckpt")
    with pytest.raises(UsageError, match=r"hold this network more than once, as 'student\.' and 'teacher\.'"):
        load_weights(network(), str(tmp_path / "w.ckpt"))


def test_other_classes_below_a_prefix_are_still_told_as_such(tmp_path: Path) -> None:
    torch.save(state("module."), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="are for 10 classes and the network has 3: give the model replace_head"):
        load_weights(CifarResNet(8, width=2, num_classes=3), str(tmp_path / "w.pth"))


def test_a_quantised_student_is_refused_by_what_takes_it(tmp_path: Path) -> None:
    quantised, _ = quantize_model(network(), Recipe())
    torch.save({"state_dict": {f"student.{k}": v for k, v in quantised.state_dict().items()}}, tmp_path / "best.ckpt")
    save_file(quantised.state_dict(), tmp_path / "student.safetensors")
    for name in ("best.ckpt", "student.safetensors"):
        with pytest.raises(UsageError, match=r"quantised student .* fit --ckpt_path .* lqkd\.load_student"):
            load_weights(network(), str(tmp_path / name))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (network(), r"it holds lqkd\.models\.cifar_resnet\.CifarResNet, code"),
        ({"model": state(), "args": argparse.Namespace(depth=8)}, r"it holds argparse\.Namespace, code"),
        ([1, 2], "hold a list"),
        ({"epoch": 1}, "hold no tensors"),
        ({"a": state(), "b": state()}, r"hold more than one state dict \('a', 'b'\)"),
        ({k: v.to(torch.int8) for k, v in state().items()}, "hold int8 numbers for 'conv1.weight'"),
        (state() | {"conv1.weight": torch.full((2, 3, 3, 3), torch.nan)}, "diverged: 'conv1.weight' is not finite"),
        (state() | {"conv1.weight": torch.full((2, 3, 3, 3), torch.inf)}, "diverged: 'conv1.weight' is not finite"),
    ],
)
def test_what_holds_no_weights_is_refused_in_one_clean_sentence(tmp_path: Path, held: Any, said: str) -> None:
    torch.save(held, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=said) as caught:
        load_weights(network(), str(tmp_path / "w.pth"))
    assert str(caught.value).isprintable()  # neither lines nor codes of a terminal
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_dtypes_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}, tmp_path / "w.safetensors")
    taken = network()
    assert load_weights(taken, str(tmp_path / "w.safetensors")) is None
    assert torch.equal(taken.conv1.weight, state()["conv1.weight"].to(dtype).float())


def test_the_index_of_several_files_names_them_all(tmp_path: Path) -> None:
    places = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(state())}
    for file in set(places.values()):
        save_file({key: value for key, value in state().items() if places[key] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert loaded(index) is None
    index.write_text(json.dumps({"weight_map": {"conv1.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(UsageError, match="it names files in other folders"):
        loaded(index)


def test_a_folder_and_an_exported_file_are_refused_by_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "s.ncnn").mkdir()
    for name in ("s.onnx", "s.ncnn/s.param", "s.ncnn/s.bin"):
        (tmp_path / name).touch()
    exported = ("s.onnx", "s.ncnn", "s.ncnn/s.param", "s.ncnn/s.bin")
    cases = {".": "are a folder: give", **dict.fromkeys(exported, "are an exported network")}
    for source, said in cases.items():
        with pytest.raises(UsageError, match=said):
            load_weights(network(), str(tmp_path / source))
