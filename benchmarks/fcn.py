"""A small network for segmentation."""

from __future__ import annotations

from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from lqkd.models import CifarResNet


class CifarFCN(FCN):  # type: ignore[misc]  # torchvision is not typed
    """torchvision's fully convolutional network on the stages of :class:`~lqkd.models.CifarResNet`.

    Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (arXiv 1411.4038), with a
    stride of 4. Images (B, 3, H, W) float, output a dict with logits (B, classes, H, W) under ``out``.

    Args:
        depth: of the backbone, 6n + 2.
        width: channels of its first stage.
        classes: number of classes.
    """

    def __init__(self, depth: int = 8, width: int = 8, classes: int = 2) -> None:
        backbone = IntermediateLayerGetter(CifarResNet(depth, width=width), {"layer3": "out"})
        super().__init__(backbone, FCNHead(4 * width, classes))
