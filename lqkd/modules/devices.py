"""The devices that a Trainer asks for, checked before a process is started for each of them."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

import torch
from lightning.pytorch.accelerators import MPSAccelerator

from lqkd.errors import UsageError


def check_devices(settings: Any) -> None:
    """Refuse devices that are not there, and what processes on them would fail or wait for ever at.

    Args:
        settings: of a Trainer.

    Raises:
        UsageError: naming the setting and what this machine has.
    """
    if not isinstance(settings.accelerator, str):  # a class, which knows its devices itself
        return
    gpus = torch.cuda.device_count() or int(MPSAccelerator.is_available())
    wanted = settings.accelerator.lower()
    if wanted in ("gpu", "cuda") and not gpus:
        raise UsageError(
            f"trainer.accelerator={wanted} is not possible: PyTorch finds no GPU on this machine; give cpu or auto"
        )
    if wanted not in ("auto", "cpu", "gpu", "cuda"):
        return
    on_cpu = wanted == "cpu" or not gpus
    processes = _on_cpu(settings.devices) if on_cpu else _on_gpus(settings.devices, gpus)
    if processes * settings.num_nodes == 1:
        return
    if settings.sync_batchnorm and on_cpu:
        raise UsageError(
            f"trainer.sync_batchnorm=true is not possible with {processes} processes on the CPU: PyTorch has it for "
            "GPUs only"
        )
    _check_port()


def _on_cpu(devices: Any) -> int:
    """The number of processes."""
    number = _number(devices)
    cores = os.cpu_count() or 1
    most = max(2, cores)  # two are how one tries several, on any machine
    if devices == "auto":
        return 1
    if number is None or not 1 <= number <= most:
        raise UsageError(
            f"trainer.devices={devices!r} is not possible: on the CPU it is a number of processes, from 1 to {most} on "
            f"this machine, which has {cores} cores"
        )
    return number


def _on_gpus(devices: Any, there: int) -> int:
    number = _number(devices)
    if devices == "auto" or number == -1:
        return there
    if isinstance(devices, str) and re.fullmatch(r"\d+(, *\d+)*,?", devices) and number is None:
        devices = [int(text) for text in devices.split(",") if text]
    chosen = devices if isinstance(devices, list | tuple) else range(-1 if number is None else number)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(range(there)):
        raise UsageError(
            f"trainer.devices={devices!r} is not possible: this machine has {there} GPU{'s' * (there > 1)}; give a "
            f"number from 1 to {there}, auto for all, or a list of different ones, counted from 0"
        )
    return len(chosen)


def _number(devices: Any) -> int | None:
    text = str(devices).strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _check_port() -> None:
    """See that the port at which the processes are to meet is free, where this process is the one to open it."""
    port = os.environ.get("MASTER_PORT")
    others = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "LOCAL_RANK")  # who started this process has opened it
    if port is None or any(name in os.environ for name in others) or int(os.environ.get("NODE_RANK", "0")):
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(
            f"MASTER_PORT={port} is not possible ({error}): give the number of a free port, or leave it unset"
        ) from error
