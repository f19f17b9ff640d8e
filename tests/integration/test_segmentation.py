"""Segmentation from folders of photographs and masks, with torchvision's networks, through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lqkd.cli import main
from lqkd.models import build_model
from lqkd.runs import RunReader  # noqa
from tests.photographs import CLASSES, write_photographs
