"""Taking the student away: integer ONNX, QONNX and torch.export, with proof of parity.

Needs ``pip install 'lqkd[export]'``. Nothing here needs Lightning but :mod:`lqkd.export.command`.
"""

from __future__ import annotations

from lqkd.errors import UsageError

try:
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
except ImportError as error:
    raise UsageError(f"export needs {error.name}: pip install 'lqkd[export]'") from None

from lqkd.export.api import ParityError, to_onnx
from lqkd.export.deploy import Deployed, deploy
from lqkd.export.formats import FORMATS
from lqkd.export.parity import Parity, check

__all__ = ["FORMATS", "Deployed", "Parity", "ParityError", "check", "deploy", "to_onnx"]
