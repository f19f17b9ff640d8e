"""Taking the student away: integer ONNX, QONNX and torch.export, with proof of parity.

Needs ``pip install 'lqkd[export]'``. Nothing here needs Lightning but :mod:`lqkd.export.command`.
"""

from __future__ import annotations

from importlib.util import find_spec

from lqkd.errors import UsageError

for _package in ("onnx", "onnxruntime"):
    if find_spec(_package) is None:
        raise UsageError(f"export needs {_package}: pip install 'lqkd[export]'")

from lqkd.export.api import ParityError, to_onnx  # noqa: E402
from lqkd.export.deploy import Deployed, deploy  # noqa: E402
from lqkd.export.formats import FORMATS  # noqa: E402
from lqkd.export.parity import Parity, check  # noqa: E402

__all__ = ["FORMATS", "Deployed", "Parity", "ParityError", "check", "deploy", "to_onnx"]
