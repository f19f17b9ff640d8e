"""What networks are trained for: everything that is true of one kind of task only."""

from __future__ import annotations

from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks.base import Rows, Task
from lqkd.tasks.classification import Classification
from lqkd.tasks.labels import Samples
from lqkd.tasks.multi_label import MultiLabel
from lqkd.tasks.segmentation import Segmentation

__all__ = ["Asked", "Classification", "Inputs", "MultiLabel", "Rows", "Samples", "Segmentation", "Task", "main_tensor"]
