"""Pure-torch rooms import nothing of Lightning, data sets or the rooms above; every module imports."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import lqkd

PURE = ("lqkd.quantization", "lqkd.balances", "lqkd.regularizers", "lqkd.losses", "lqkd.models")
MODULES = sorted(m.name for m in pkgutil.walk_packages(lqkd.__path__, "lqkd.") if m.name != "lqkd.__main__")

DOOR = re.compile(r"^def main\(|\bargparse\.ArgumentParser\(|argparse\.ArgumentParser\):", flags=re.MULTILINE)


def test_pure_torch_rooms_import_nothing_above_them() -> None:
    rooms = tuple(f"lqkd.{name}" for name in ("modules", "data", "callbacks", "runs"))
    above = ("lightning", "wandb", "torchvision.datasets", "torch._dynamo", *rooms)
    found = f"above = [m for m in sys.modules if m.startswith({above})]"
    code = f"import sys, {', '.join(PURE)}; {found}; assert not above, above"
    subprocess.run([sys.executable, "-c", code], check=True)


def optional_packages() -> list[str]:
    """Names under which the packages of all extras are imported."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    extras = re.sub(r"#.*", "", extras)  # python 3.10 has no tomllib
    names = re.findall(r'"([\w-]+)(?:\[[\w,-]+\])?(?:[>=<][^"]*)?"', extras)
    return sorted({name.replace("-", "_") for name in names} - {"lqkd"})


def test_the_optional_packages_are_known() -> None:
    assert {"onnx", "onnxruntime", "timm", "wandb", "wandb_workspaces", "optuna", "pytest"} <= set(optional_packages())


def test_every_module_imports_without_the_optional_packages() -> None:
    code = (
        "import importlib, sys, torchmetrics\n"  # which imports some of them where their metadata are there
        f"for name in {optional_packages()!r}: sys.modules[name] = None\n"
        f"for name in {[m for m in MODULES if not m.startswith('lqkd.export')]!r}: importlib.import_module(name)\n"
        "from lqkd.errors import UsageError\n"
        "try: from lqkd.export import to_onnx\n"
        "except UsageError as error: assert 'lqkd[export]' in str(error)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_export_needs_no_lightning_but_for_its_command() -> None:
    above = ("lightning", "lqkd.runs.lightning_cli")
    code = f"import sys, lqkd.export; assert not [m for m in sys.modules if m in {above} or m.startswith('lightning.')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_has_no_command_line_of_its_own() -> None:
    package = Path(lqkd.__file__).parent
    doors = {
        path.relative_to(package).parts[0] for path in package.rglob("*.py") if DOOR.search(path.read_text("utf-8"))
    }
    assert doors == {"cli", "__main__.py"}
