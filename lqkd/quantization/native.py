"""The learned step in C++: what a quantizer of the default family costs on a CPU, where a compiler is at hand.

``native.cpp`` is compiled once per machine, in about a second, with the compiler that ``torch.compile`` uses (``CXX``,
else ``g++``), and kept with what else can be made again (``$LQKD_CACHE``, else ``~/.cache/lqkd``). Beside a graph of
``torch.compile`` it takes a third of the instructions, and it is called without the checks of a graph, which take
longer than a small weight's quantization. Where it cannot be compiled, :mod:`lqkd.quantization.kernel` runs the same
functions by other means.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqkd.utils.files import atomic_path, default_cache_dir

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=off"]  # a fused product and sum would round once where the other ways round twice
VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2"],
}
"""Flags by what the processor is able to do; never ``-march=native``, since a home may be that of several machines."""


class LearnedStep:
    """:data:`lqkd.quantization.kernels.learned_step_quantize` for dense float32 tensors on a CPU.

    Tensors are seen as rows in the order of memory, one for each element of ``scale``.
    """

    def forward(self, x: Tensor, scale: Tensor, constants: Sequence[float]) -> Tensor:
        """``x_hat`` in the layout of ``x``, as the kernel's forward."""
        if torch.compiler.is_compiling():
            return _in_graph(x, scale, [*constants])
        return self._elementwise("learned_step", x, scale, constants)

    def slope(self, x: Tensor, scale: Tensor, constants: Sequence[float]) -> Tensor:
        """``d x_hat / d s`` of every element, in the layout of ``x``; not yet times the step gradient's factors."""
        return self._elementwise("learned_step_slope", x, scale, constants)

    def _elementwise(self, name: str, x: Tensor, scale: Tensor, constants: Sequence[float]) -> Tensor:
        result, rows = torch.empty_like(x), scale.numel()
        columns, threads = x.numel() // rows, torch.get_num_threads()
        pointers = x.data_ptr(), result.data_ptr(), scale.data_ptr()
        getattr(_library(), name)(*pointers, rows, columns, *constants[1:], threads)
        return result

    def backward(self, gradient: Tensor, x: Tensor, scale: Tensor, constants: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The gradients of ``x`` and ``scale``, as the kernel's backward; ``gradient`` in the layout of ``x``."""
        if torch.compiler.is_compiling():
            return _backward_in_graph(gradient, x, scale, [*constants])
        gradient_x, gradient_scale, rows = torch.empty_like(x), torch.empty_like(scale), scale.numel()
        columns, threads = x.numel() // rows, torch.get_num_threads()
        pointers = [tensor.data_ptr() for tensor in (gradient, x, gradient_x, scale, gradient_scale)]
        _library().learned_step_backward(*pointers, rows, columns, *constants, threads)
        return gradient_x, gradient_scale


_step = LearnedStep()


# What a graph of torch.compile has in their place, which leaves tensors in the layouts that it has captured. Where the
# graph fuses a quantizer with what is around it, it takes longer: it is computed once more for each of its readers.
@torch.library.custom_op("lqkd::learned_step", mutates_args=())
def _in_graph(x: Tensor, scale: Tensor, constants: Sequence[float]) -> Tensor:
    return _step.forward(x, scale, constants)


@_in_graph.register_fake
def _(x: Tensor, scale: Tensor, constants: Sequence[float]) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lqkd::learned_step_backward", mutates_args=())
def _backward_in_graph(gradient: Tensor, x: Tensor, scale: Tensor, constants: Sequence[float]) -> tuple[Tensor, Tensor]:
    if gradient.stride() != x.stride():
        gradient = torch.empty_like(x).copy_(gradient)
    return _step.backward(gradient, x, scale, constants)


@_backward_in_graph.register_fake
def _(gradient: Tensor, x: Tensor, scale: Tensor, constants: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def available() -> bool:
    """Whether the library is there; the first call of a process makes it where it is not."""
    return _library() is not None


# What torch.compiler.assume_constant_result does, without its second to import all of the compiler.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _library() -> Any:
    """The functions of ``native.cpp``; None where they cannot be had, for whatever reason: others do the same."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = _loaded()
        for name, pointers, numbers in (("", 3, 2), ("_slope", 3, 2), ("_backward", 5, 3)):
            function, sizes = getattr(library, f"learned_step{name}"), [ctypes.c_int64] * 2
            function.argtypes = [*[ctypes.c_void_p] * pointers, *sizes, *[ctypes.c_float] * numbers, ctypes.c_int]
            function.restype = None
    except Exception as error:
        reason = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).info("the learned step is not compiled from C++ in this process: %s", reason)
        return None
    return library


def _loaded() -> ctypes.CDLL:
    """The library that was kept, or a new one, which is kept where that is possible."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS]
    command += VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])
    made_of = SOURCE.read_bytes() + repr((command, platform.machine())).encode()
    name = f"learned_step_{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    kept = None
    with suppress(RuntimeError):  # of a user without a home
        kept = default_cache_dir() / "native" / name
    if kept is not None and kept.is_file():
        with suppress(OSError):  # cut off, or of a machine with other libraries
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="lqkd_") as folder:
        made = Path(folder) / name
        call = [*command, "-x", "c++", str(SOURCE), "-o", str(made)]
        subprocess.run(call, check=True, capture_output=True, text=True, errors="replace", timeout=120)
        library = ctypes.CDLL(str(made))  # stays when the file is gone
        if kept is not None:
            with suppress(OSError), atomic_path(kept) as temporary:  # a home that cannot be written to
                shutil.copyfile(made, temporary)
    return library
