"""How long a network takes on this CPU, in several forms, timed in alternation."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from lqkd.export.large_files import save
from lqkd.export.runtimes import NO_FUSION, feeds, has_two_bits, session
from lqkd.models.calls import Inputs

WARM_UP = 3
LEAST_ROUNDS, MOST_ROUNDS = 10, 200
SECONDS = 3.0
"""Time for all rounds together, within the limits of their number."""


@dataclass(frozen=True)
class Latency:
    """What was timed.

    Attributes:
        milliseconds: name of each contestant to the median over the rounds.
        ratios: name to the median of its time over that of the first contestant in the same round.
        peak_bytes: name to the peak resident memory of a fresh process that loads the file with ONNX Runtime and runs
            it; only of ONNX files, and on Linux.
        rounds: how often each ran.
        threads: of each contestant.
        batch: samples in a run.
        machine: processor, and whether it has integer dot products.
        versions: of what ran.
    """

    milliseconds: dict[str, float]
    ratios: dict[str, float]
    peak_bytes: dict[str, int]
    rounds: int
    threads: int
    batch: int
    machine: str
    versions: dict[str, str]


def measure(
    models: Mapping[str, onnx.ModelProto | nn.Module],
    inputs: Inputs,
    *,
    threads: int = 1,
    rounds: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Time networks in alternation, each round in another order.

    Args:
        models: name to an ONNX model or a module in eval mode; ratios are to the first.
        inputs: what all are called with, float32.
        threads: of each.
        rounds: how many; ``None`` for as many as take three seconds, from 10 to 200.
        progress: called before each round with the number of rounds that are done and that of all.
    """
    times = alternate(models, inputs, threads=threads, rounds=rounds, progress=progress)
    first = next(iter(times.values()))
    return Latency(
        milliseconds={name: statistics.median(values) for name, values in times.items()},
        ratios={
            name: statistics.median(own / base for own, base in zip(values, first, strict=True))
            for name, values in times.items()
        },
        peak_bytes={
            name: peak
            for name, model in models.items()
            if isinstance(model, onnx.ModelProto) and (peak := peak_memory(model, inputs, threads)) is not None
        },
        rounds=len(first),
        threads=threads,
        batch=len(inputs),
        machine=machine(),
        versions={name: metadata.version(name) for name in ("onnxruntime", "torch")},
    )


def alternate(
    models: Mapping[str, onnx.ModelProto | nn.Module],
    inputs: Inputs,
    *,
    threads: int = 1,
    rounds: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The milliseconds of each round by name; arguments as of :func:`measure`.

    Args:
        clock: seconds. :func:`time.process_time` leaves out what other processes take of a busy processor; its
            caches and frequency they share all the same.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lqkd.export.latency import alternate
        >>> from lqkd.models.calls import Inputs
        >>> times = alternate({"one": nn.Identity(), "other": nn.ReLU()}, Inputs.of(torch.randn(1, 3)), rounds=10)
        >>> {name: len(of_each_round) for name, of_each_round in times.items()}
        {'one': 10, 'other': 10}
    """
    with _torch_threads(threads):
        runs = {name: _run(model, inputs, threads) for name, model in models.items()}
        once = sum(_seconds(run, time.perf_counter) for _ in range(WARM_UP) for run in runs.values()) / WARM_UP
        rounds = rounds or int(min(max(SECONDS / max(once, 1e-9), LEAST_ROUNDS), MOST_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(rounds):
            if progress is not None:
                progress(turn, rounds)
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                times[name].append(1000 * _seconds(runs[name], clock))
    return times


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(model: onnx.ModelProto | nn.Module, inputs: Inputs, threads: int) -> Callable[[], Any]:
    if isinstance(model, onnx.ModelProto):
        runner, arrays = session(model, optimised=True, threads=threads), feeds(model, inputs)
        return lambda: runner.run(None, arrays)
    module = model

    def run() -> Any:
        with torch.no_grad():
            return inputs.call(module)

    return run


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def machine() -> str:
    """The processor and its integer dot products, where Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    lines = [line.partition(":") for line in text.splitlines()]
    described = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = described.get("flags", described.get("Features", "")).split()
    dots = [name for name in ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp") if name in flags]
    return f"{described.get('model name', platform.machine())} ({', '.join(dots) or 'no integer dot products'})"


_MEMORY = """
import sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, int(sys.argv[3])
if sys.argv[4:]:
    options.add_session_config_entry(sys.argv[4], sys.argv[5])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
arrays = dict(numpy.load(sys.argv[2]))
for _ in range(3):
    session.run(None, arrays)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print(1024 * int(line.split()[1]))
"""
"""A process without PyTorch. Its peak is of the runtime and the network, from the import to the third run; getrusage
would tell at least the size of the process that started it."""


def peak_memory(model: onnx.ModelProto, inputs: Inputs, threads: int = 1) -> int | None:
    """The most bytes of resident memory of a process that runs ``model``; ``None`` where the system is not Linux."""
    if not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        file, arrays = Path(folder) / "model.onnx", Path(folder) / "inputs.npz"
        save(model, file)
        np.savez(arrays, **feeds(model, inputs))  # type: ignore[arg-type]
        options = NO_FUSION if has_two_bits(model) else ()
        command = [sys.executable, "-c", _MEMORY, str(file), str(arrays), str(threads), *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"ONNX Runtime cannot run the file in a process of its own: {result.stderr.strip()}")
    return int(result.stdout)


def slowest_nodes(
    model: onnx.ModelProto, inputs: Inputs, threads: int = 1, runs: int = 20
) -> list[tuple[str, str, float]]:
    """Name, operator and least milliseconds of each node of the optimised graph, by ONNX Runtime's profiler.

    The slowest comes first.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = session(model, optimised=True, threads=threads, profile=Path(folder) / "profile")
        arrays = feeds(model, inputs)
        for _ in range(runs):
            runner.run(None, arrays)
        events = json.loads(Path(runner.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"] / 1000)
    return sorted(((*key, min(values)) for key, values in times.items()), key=lambda row: -row[2])
