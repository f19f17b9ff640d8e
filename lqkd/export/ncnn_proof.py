"""Proof that ncnn computes what the student computes: number by number, layer by layer, and by whole answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lqkd.errors import UsageError
from lqkd.export.deploy import OUTPUT, Deployed, as_float32
from lqkd.export.differences import Forced
from lqkd.export.grids import ActivationGrid
from lqkd.export.ncnn import PARAM, WEIGHTS, require
from lqkd.export.ncnn_file import Layer, read
from lqkd.export.ncnn_writer import Written, numbers
from lqkd.export.parity import (
    UNOPTIMISED_FRACTION,
    Parity,
    agree_whole,
    compared_numbers,
    differences,
    judge_layers,
    judge_outputs,
)
from lqkd.export.runtimes import Runner
from lqkd.models.calls import Inputs
from lqkd.models.outputs import heads
from lqkd.tasks import Task

_HALVES = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage")


class NcnnRunner(Runner):
    """Runs the files in ncnn, on one thread.

    Args:
        written: the files.
        deployed: the network that they were made of.
        watched: whether the blobs with the codes of grids are wanted, too.

    Raises:
        UsageError: when ncnn is not installed, or does not take the files.
    """

    reproduced = False

    def __init__(self, written: Written, deployed: Deployed, *, watched: bool = False) -> None:
        require()
        import ncnn

        self._deployed = deployed
        self.outputs = list(deployed.outputs)
        self._blobs = {name: name for name in deployed.outputs}
        self._blobs |= written.grids if watched else {}
        self._watched = watched
        self._net: Any = ncnn.Net()
        self._net.opt.num_threads = 1
        self._net.opt.use_vulkan_compute = False
        for option in _HALVES:
            setattr(self._net.opt, option, False)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / PARAM).write_text(written.param, encoding="utf-8")
            (Path(folder) / WEIGHTS).write_bytes(written.content)
            loaded = (self._net.load_param(f"{folder}/{PARAM}"), self._net.load_model(f"{folder}/{WEIGHTS}"))
        if any(loaded):
            raise UsageError(f"ncnn {ncnn.__version__} does not take the files")

    def __call__(self, given: Inputs | np.ndarray) -> dict[str, np.ndarray]:
        assert isinstance(given, Inputs)
        arrays = [tensor.numpy() for tensor in self._deployed.in_order(given)]
        parts = [self._run([array[index] for array in arrays]) for index in range(len(given))]
        return {name: np.stack([part[name] for part in parts]) for name in self._blobs}

    def _run(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        import ncnn

        extractor = self._net.create_extractor()
        extractor.set_light_mode(not self._watched)
        for name, array in zip(self._deployed.inputs, arrays, strict=True):
            extractor.input(name, ncnn.Mat(np.ascontiguousarray(array)).clone())
        return {name: np.array(extractor.extract(blob)[1]) for name, blob in self._blobs.items()}


def check_ncnn(
    written: Written,
    deployed: Deployed,
    example: Any,
    test: Iterable[Any] = (),
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Parity:
    """Compare ncnn's files with the network that they were made of; arguments as of :func:`lqkd.export.parity.check`.

    ``optimised`` of what is returned is empty: ncnn has one way to run them.
    """
    parity = compared_numbers(altered_number(written))
    if parity.problem is not None:
        return parity
    inputs = as_float32(example, "an example")
    found = NcnnRunner(written, deployed, watched=True)(inputs)
    scales = {node.name: _grid_of(deployed, node).scale for node in deployed.network.graph.nodes if node.name in found}
    values = {name: found[name] * scales[name].numpy() for name in written.grids}
    forced = Forced(deployed.network, values)
    ours = heads(forced.run(*deployed.in_order(inputs)), OUTPUT)
    parity.unoptimised = forced.rows
    parity.outputs = differences(ours, {name: torch.from_numpy(found[name]) for name in ours})
    judge_layers(parity, parity.unoptimised, "in ncnn", UNOPTIMISED_FRACTION)
    judge_outputs(parity, ", after layers that agree")
    whole = NcnnRunner(written, deployed)
    agree_whole(parity, whole, deployed.network, deployed, test, student, task)
    return parity


def _grid_of(deployed: Deployed, node: Any) -> ActivationGrid:
    grid = deployed.network.get_submodule(str(node.target))
    assert isinstance(grid, ActivationGrid)
    return grid


def altered_number(written: Written) -> str | None:
    """The first layer of the files with another code, bias or scale than the student; None for none.

    Few images may never tell: the codes behind a layer are rounded.
    """
    try:
        layers = {layer.name: layer for layer in read(written.param, written.content)}
    except ValueError as error:
        return f"the number of weights ({error})"
    return next((name for name, origin in written.layers.items() if not _is_of(layers[name], *origin)), None)


def _is_of(layer: Layer, module: Any, grid: ActivationGrid | None) -> bool:
    if isinstance(module, ActivationGrid):  # a division by its step, or a multiplication
        return bool(np.float32(float(layer.parameters["2"])) == module.scale.numpy())
    wanted = numbers(module, grid)
    ours = (wanted["weight"], wanted["bias"], *(wanted["scales"] or (None, None)))
    theirs = (layer.weight, layer.bias, *(layer.scales or (None, None)))
    return all(_same(one, other) for one, other in zip(ours, theirs, strict=True))


def _same(ours: np.ndarray | None, theirs: np.ndarray | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
