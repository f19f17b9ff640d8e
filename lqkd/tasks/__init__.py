"""What networks are trained for: everything that is true of one kind of task only.

Imported when first used: how values of a metric are written needs no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lqkd.utils.lazy import offers

if TYPE_CHECKING:  # what __getattr__ imports, for type checkers
    from lqkd.models.calls import Inputs as Inputs
    from lqkd.models.outputs import Asked as Asked
    from lqkd.models.outputs import main_tensor as main_tensor
    from lqkd.tasks.base import Rows as Rows
    from lqkd.tasks.base import Task as Task
    from lqkd.tasks.box_detection import BoxDetection as BoxDetection
    from lqkd.tasks.causal_lm import CausalLM as CausalLM
    from lqkd.tasks.classification import Classification as Classification
    from lqkd.tasks.detection import Detection as Detection
    from lqkd.tasks.keyed import KeyedClassification as KeyedClassification
    from lqkd.tasks.labels import Samples as Samples
    from lqkd.tasks.masked_lm import MaskedLM as MaskedLM
    from lqkd.tasks.multi_label import MultiLabel as MultiLabel
    from lqkd.tasks.segmentation import Segmentation as Segmentation
    from lqkd.tasks.torchvision_detection import TorchvisionDetection as TorchvisionDetection

_WHERE = {
    "Asked": "lqkd.models.outputs",
    "BoxDetection": "lqkd.tasks.box_detection",
    "CausalLM": "lqkd.tasks.causal_lm",
    "Classification": "lqkd.tasks.classification",
    "Detection": "lqkd.tasks.detection",
    "Inputs": "lqkd.models.calls",
    "KeyedClassification": "lqkd.tasks.keyed",
    "MaskedLM": "lqkd.tasks.masked_lm",
    "MultiLabel": "lqkd.tasks.multi_label",
    "Rows": "lqkd.tasks.base",
    "Samples": "lqkd.tasks.labels",
    "Segmentation": "lqkd.tasks.segmentation",
    "Task": "lqkd.tasks.base",
    "TorchvisionDetection": "lqkd.tasks.torchvision_detection",
    "main_tensor": "lqkd.models.outputs",
}

__all__ = [*_WHERE]  # noqa: PLE0604
__getattr__, __dir__ = offers(__name__, _WHERE)
