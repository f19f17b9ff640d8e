"""Pure-torch rooms import nothing of Lightning, data sets or the rooms above; every module imports."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import lqkd

PURE = ("lqkd.quantization", "lqkd.regularizers", "lqkd.losses", "lqkd.models")
MODULES = sorted(m.name for m in pkgutil.walk_packages(lqkd.__path__, "lqkd.") if m.name != "lqkd.__main__")


@pytest.mark.parametrize("room", PURE)
def test_a_pure_torch_room_imports_nothing_above_it(room: str) -> None:
    above = "('lightning', 'wandb', 'torchvision.datasets', 'lqkd.modules', 'lqkd.data', 'lqkd.callbacks', 'lqkd.cli')"
    code = f"import sys, {room}; above = [m for m in sys.modules if m.startswith({above})]; assert not above, above"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_imports_without_the_optional_packages() -> None:
    code = (
        "import importlib, sys\n"
        "absent = ('wandb', 'tensorboard', 'timm', 'webdataset', 'onnx', 'onnxruntime', 'optuna', 'submitit')\n"
        "for name in absent: sys.modules[name] = None\n"
        f"for name in {[m for m in MODULES if not m.startswith('lqkd.export')]!r}: importlib.import_module(name)\n"
        "from lqkd.errors import UsageError\n"
        "try: import lqkd.export\n"
        "except UsageError as error: assert 'lqkd[export]' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_needs_no_lightning_but_for_its_command() -> None:
    code = "import sys, lqkd.export; assert not [m for m in sys.modules if m.startswith(('lightning', 'lqkd.cli'))]"
    subprocess.run([sys.executable, "-c", code], check=True)
