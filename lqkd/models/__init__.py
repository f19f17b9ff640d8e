"""Networks for teachers and students, and their weights. Pure torch."""

from __future__ import annotations

from lqkd.models.build import build_model
from lqkd.models.cifar_resnet import CifarResNet
from lqkd.models.decoding import detections
from lqkd.models.gpt import GPT
from lqkd.models.hugging_face import causal_lm
from lqkd.models.position_grid import boxes_at, positions
from lqkd.models.recomputing import recompute_activations
from lqkd.models.small_fcos import SmallFCOS
from lqkd.models.torchvision_detector import TorchvisionDetector
from lqkd.models.training_size import LlamaSize, TrainingSize, training_size
from lqkd.models.weight_files import builtin_weights
from lqkd.models.weights import load_weights

__all__ = [
    "GPT",
    "CifarResNet",
    "LlamaSize",
    "SmallFCOS",
    "TorchvisionDetector",
    "TrainingSize",
    "boxes_at",
    "build_model",
    "builtin_weights",
    "causal_lm",
    "detections",
    "load_weights",
    "positions",
    "recompute_activations",
    "training_size",
]
