"""lqkd distils large networks into low-bit ones through a learnable regularizer between teacher and student."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from lqkd.utils import renames
from lqkd.utils.lazy import offers

if TYPE_CHECKING:  # what __getattr__ below imports, for type checkers
    from lqkd.errors import UsageError as UsageError
    from lqkd.modules import ClassifierModule as ClassifierModule
    from lqkd.modules import DistillModule as DistillModule
    from lqkd.pipelines import Distilled as Distilled
    from lqkd.pipelines import distill as distill
    from lqkd.quantization import Recipe as Recipe
    from lqkd.quantization import Rule as Rule
    from lqkd.quantization import quantize_model as quantize_model
    from lqkd.runs import from_pretrained as from_pretrained
    from lqkd.runs import load_student as load_student
    from lqkd.teachers import FrozenTeacher as FrozenTeacher

__version__ = metadata.version("lqkd")

_PUBLIC = {
    "ClassifierModule": "lqkd.modules",
    "DistillModule": "lqkd.modules",
    "Distilled": "lqkd.pipelines",
    "FrozenTeacher": "lqkd.teachers",
    "Recipe": "lqkd.quantization",
    "Rule": "lqkd.quantization",
    "UsageError": "lqkd.errors",
    "distill": "lqkd.pipelines",
    "from_pretrained": "lqkd.runs",
    "load_student": "lqkd.runs",
    "quantize_model": "lqkd.quantization",
}
"""Public names and where they live; imported when first used, so that ``import lqkd`` is quick."""

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604
__getattr__, __dir__ = offers(__name__, _PUBLIC)

renames.install()
