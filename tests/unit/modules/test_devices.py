"""Devices that are refused before a process is started for each of them."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lqkd.errors import UsageError
from lqkd.modules.devices import check_devices


def trainer(**settings: Any) -> SimpleNamespace:
    defaults = {"accelerator": "cpu", "devices": "auto", "num_nodes": 1, "sync_batchnorm": False}
    return SimpleNamespace(**defaults | settings)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as anyone can see who does not use them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("devices", [99_999, "99999", 0, -1, "0,1", [0], "all"])
def test_on_the_cpu_devices_are_at_most_its_cores_and_the_message_counts_them(devices: Any) -> None:
    with pytest.raises(UsageError, match=rf"from 1 to \d+ on this machine, which has {os.cpu_count()} cores"):
        check_devices(trainer(devices=devices))


@pytest.mark.parametrize("devices", ["auto", 1, "1", 2])
def test_one_process_and_two_are_possible_on_any_machine(devices: Any) -> None:
    check_devices(trainer(devices=devices))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("devices", [3, "3", 0, -2, [0, 2], "0,2", [0, 0], [], "all"])
def test_gpus_that_are_not_there_are_refused_with_their_number(devices: Any) -> None:
    with pytest.raises(UsageError, match="this machine has 2 GPUs"):
        check_devices(trainer(accelerator="gpu", devices=devices))


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("devices", ["auto", -1, "-1", 1, 2, "2", [1], "0,1", "0,"])
def test_every_way_to_name_gpus_that_are_there_is_accepted(devices: Any) -> None:
    check_devices(trainer(accelerator="auto", devices=devices))


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_a_gpu_is_not_asked_for_where_there_is_none(name: str) -> None:
    with pytest.raises(UsageError, match=rf"trainer\.accelerator={name} is not possible: PyTorch finds no GPU"):
        check_devices(trainer(accelerator=name))


def test_sync_batchnorm_is_refused_for_processes_on_the_cpu_and_harmless_for_one() -> None:
    check_devices(trainer(sync_batchnorm=True))
    with pytest.raises(UsageError, match=r"trainer\.sync_batchnorm=true is not possible with 2 processes"):
        check_devices(trainer(sync_batchnorm=True, devices=2))


def test_a_port_that_is_in_use_is_told_before_the_processes_wait_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UsageError, match=f"MASTER_PORT={port} is not possible .*in use"):
            check_devices(trainer(devices=2))
        check_devices(trainer(devices=1))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")  # it is torchrun itself that listens there
        check_devices(trainer(devices=2))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    check_devices(trainer(devices=2))
