"""What the process from which runs fork imports, once for all of them. It must not compute anything with PyTorch."""

from __future__ import annotations

import sklearn.datasets  # noqa: F401

import lqkd.callbacks
import lqkd.data
import lqkd.losses
import lqkd.models
import lqkd.modules
import lqkd.regularizers
import lqkd.runs.lightning_cli
import lqkd.teachers  # noqa: F401
