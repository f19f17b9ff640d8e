"""Every configuration that ships parses and runs a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from lqkd.cli import main
from lqkd.models import CifarResNet

CONFIGS = Path(__file__).parents[2] / "configs"
ADDED = sorted(CONFIGS.glob("trainer/*.yaml"))
"""Configurations to be added to another one."""
WHOLE = sorted(set(CONFIGS.rglob("*.yaml")) - set(ADDED) - set(CONFIGS.glob("studies/*.yaml")))


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of ten images each, in class folders."""
    root = tmp_path_factory.mktemp("cifar")
    for split in ("train", "test"):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(10):
                Image.new("RGB", (32, 32), (25 * label, 20 * index, 100)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights under the names that the CIFAR-10 configurations expect."""
    root = tmp_path_factory.mktemp("data")
    (root / "weights").mkdir()
    for depth in (20, 56):
        save_file(CifarResNet(depth).state_dict(), root / "weights" / f"cifar10_resnet{depth}.safetensors")
    return root


@pytest.mark.parametrize("config", WHOLE, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_runs_one_step(
    config: Path, tiny_cifar: Path, random_weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LQKD_DATA", str(random_weights))
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path))
    arguments = ["fit", "--config", str(config), "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]
    if "CIFAR10" in config.read_text():
        arguments += ["--data.init_args.root", str(tiny_cifar), "--data.init_args.batch_size", "8"]
    assert main(arguments) == 0


@pytest.mark.parametrize("config", ADDED, ids=lambda path: path.stem)
def test_a_config_for_many_devices_can_be_added_to_another(config: Path, tmp_path: Path) -> None:
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(config)]
    one = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    assert main([*arguments, *one, "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path)]) == 0


@pytest.mark.parametrize("config", WHOLE + ADDED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_says_how_to_run_it(config: Path) -> None:
    assert f"--config configs/{config.relative_to(CONFIGS)}" in config.read_text()
