"""What networks are trained for: everything that is true of one kind of task only."""

from __future__ import annotations

from lqkd.models.calls import Inputs
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks.base import Rows, Task
from lqkd.tasks.classification import Classification

__all__ = ["Asked", "Classification", "Inputs", "Rows", "Task", "main_tensor"]
