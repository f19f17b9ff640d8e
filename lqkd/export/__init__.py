"""Taking the student away: files of many formats, each with a proof, and asking a file.

All but asking a run needs ``pip install 'lqkd[export]'``. Nothing here needs Lightning but :mod:`lqkd.export.command`
and :mod:`lqkd.export.export_check`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lqkd.errors import ParityError, UsageError
from lqkd.export.deploy import Deployed, deploy
from lqkd.export.gguf_file import from_gguf, to_gguf
from lqkd.export.pack_quantized import from_compressed_tensors, to_compressed_tensors

MISSING = next((name for name in ("onnx", "onnxruntime") if find_spec(name) is None), None)
"""A package that exporting needs and that is not installed; None when all are."""

if MISSING is None:
    from lqkd.export.api import to_coreml, to_executorch, to_litert, to_ncnn, to_onnx
    from lqkd.export.formats import FORMATS
    from lqkd.export.nbits import to_nbits
    from lqkd.export.parity import Parity, check

__all__ = [
    "FORMATS",
    "Deployed",
    "Parity",
    "ParityError",
    "check",
    "deploy",
    "from_compressed_tensors",
    "from_gguf",
    "to_compressed_tensors",
    "to_coreml",
    "to_executorch",
    "to_gguf",
    "to_litert",
    "to_nbits",
    "to_ncnn",
    "to_onnx",
]


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    if MISSING is not None:
        raise UsageError(f"export needs {MISSING}: pip install 'lqkd[export]'")


def __getattr__(name: str) -> Any:
    if name in __all__:
        require()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
