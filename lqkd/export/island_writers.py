"""How operations without an integer form are written, in the operators of ONNX's opset 21."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import fx

from lqkd.export.grids import ActivationGrid
from lqkd.export.nodes import Operation


class IslandWriters(ABC):
    """The part of an emitter that writes :mod:`lqkd.export.islands`; each method returns the name of the result."""

    inputs: dict[fx.Node, str]
    floats: dict[fx.Node, str]
    codes: dict[fx.Node, tuple[str, ActivationGrid]]

    @abstractmethod
    def add(self, kind: str, inputs: list[str], wanted: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the output's name."""

    @abstractmethod
    def constant(self, value: Any, wanted: str, dtype: Any = None) -> str:
        """Keep a tensor or array in the file and return its name."""

    @abstractmethod
    def floating(self, node: fx.Node) -> str:
        """The name of the real numbers of ``node``."""

    @abstractmethod
    def label(self, node: fx.Node) -> str:
        """A name that says where ``node`` comes from."""

    def _write_island(self, node: fx.Node, found: Operation) -> None:
        operands = [self.floating(x) for x in found.inputs]
        name, label = found.settings["name"], self.label(node)
        if name == "Softmax" and found.inputs[0] in self.codes:
            name = "SoftmaxOfCodes"
        writer = getattr(self, f"_island_{name.lower()}", None)
        if writer is not None:
            self.floats[node] = writer(operands, label, found.settings)
            return
        if "number" in found.settings:
            number = self.constant(found.settings["number"], f"{label}.number", np.float32)
            operands.insert(0 if found.settings["first"] else 1, number)
        self.floats[node] = self.add(name, operands, label)

    def _island_layernorm(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        x, *given = operands
        held = dict(zip(settings.get("given", ()), given, strict=True))
        for name in ("weight", "bias"):
            if settings.get(name) is not None:
                held[name] = self.constant(settings[name], f"{label}.{name}")
        if "weight" not in held:
            held["weight"] = self.constant(torch.ones(settings["shape"]), f"{label}.weight")
        operands = [x, held["weight"], *([held["bias"]] if "bias" in held else [])]
        return self.add("LayerNormalization", operands, label, axis=-len(settings["shape"]), epsilon=settings["eps"])

    def _island_softmax(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        return self.add("Softmax", operands, label, axis=settings["axis"])

    def _island_softmaxofcodes(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        """In parts, lest ONNX Runtime makes a kernel of it whose table of exponentials is another function."""
        axes = self.constant([settings["axis"]], f"{label}.axes", np.int64)
        largest = self.add("ReduceMax", [*operands, axes], f"{label}.largest", keepdims=1)
        powers = self.add("Exp", [self.add("Sub", [*operands, largest], f"{label}.shifted")], f"{label}.powers")
        return self.add("Div", [powers, self.add("ReduceSum", [powers, axes], f"{label}.sum", keepdims=1)], label)

    def _island_rsqrt(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        return self.add("Reciprocal", [self.add("Sqrt", operands, f"{label}.sqrt")], label)

    def _island_normalize(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        axes = self.constant([settings["axis"]], f"{label}.axes", np.int64)
        length = self.add("ReduceL2", [*operands, axes], f"{label}.length", keepdims=1)
        least = self.constant(settings["eps"], f"{label}.eps", np.float32)
        return self.add("Div", [*operands, self.add("Max", [length, least], f"{label}.divisor")], label)

    def _island_attention(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        query, key, value, *mask = operands
        scale = self.constant(float(settings["scale"]), f"{label}.scale", np.float32)
        scaled = self.add("Mul", [query, scale], f"{label}.scaled")
        rank = settings["rank"]
        turned = self.add("Transpose", [key], f"{label}.keys", perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = self.add("MatMul", [scaled, turned], f"{label}.scores")
        if settings["causal"]:  # no query sees a later key
            later = np.triu(np.full(settings["causal"], -np.inf, np.float32), 1)
            mask.append(self.constant(later, f"{label}.later"))
        if settings["boolean"]:  # where it is true, keys are seen
            zero, least = (self.constant(np.float32(v), f"{label}.{n}") for v, n in ((0, "seen"), (-np.inf, "unseen")))
            mask[0] = self.add("Where", [mask[0], zero, least], f"{label}.mask")
        for name in mask:
            scores = self.add("Add", [scores, name], f"{label}.masked")
        weights = self.add("Softmax", [scores], f"{label}.weights", axis=-1)
        return self.add("MatMul", [weights, value], label)

    def _island_expand(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        sizes = self.constant(settings["sizes"], f"{label}.sizes", np.int64)
        if settings["times"]:
            count = self.add("Shape", [next(iter(self.inputs.values()))], f"{label}.batch", start=0, end=1)
            if settings["times"] > 1:
                count = self.add(
                    "Mul", [count, self.constant([settings["times"]], f"{label}.times", np.int64)], f"{label}.rows"
                )
            sizes = self.add("Concat", [count, sizes], f"{label}.shape", axis=0)
        return self.add("Expand", [*operands, sizes], label)

    def _island_expandas(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        x, other = operands
        return self.add("Expand", [x, self.add("Shape", [other], f"{label}.shape")], label)

    def _island_einsum(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        return self.add("Einsum", operands, label, equation=settings["equation"].replace(" ", ""))

    def _island_reduce(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        axes = self.constant(settings["axes"], f"{label}.axes", np.int64)
        return self.add(settings["operator"], [*operands, axes], label, keepdims=int(settings["keepdim"]))

    def _island_roll(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        (x,) = operands
        for axis, shift, size in settings["turns"]:
            halves = [
                self._cut(x, axis, start, end, f"{label}.{name}")
                for start, end, name in ((size - shift, size, "end"), (0, size - shift, "start"))
            ]
            x = self.add("Concat", halves, label, axis=axis)
        return x

    def _cut(self, x: str, axis: int, start: int, end: int, label: str) -> str:
        bounds = ((start, "starts"), (end, "ends"), (axis, "axes"))
        return self.add("Slice", [x, *(self.constant([v], f"{label}.{n}", np.int64) for v, n in bounds)], label)

    def _island_stack(self, operands: list[str], label: str, settings: dict[str, Any]) -> str:
        axis = self.constant([settings["axis"]], f"{label}.axis", np.int64)
        parts = [self.add("Unsqueeze", [x, axis], f"{label}.{i}") for i, x in enumerate(operands)]
        return self.add("Concat", parts, label, axis=settings["axis"])
