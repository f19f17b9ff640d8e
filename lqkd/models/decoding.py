"""From what a detector says at every position to the objects that it has found."""

from __future__ import annotations

import torch
from torch import Tensor

_CANDIDATES = 1000
"""So many of an image's answers, the surest, are compared with each other."""


@torch.no_grad()
def detections(
    classes: Tensor,
    boxes: Tensor,
    centerness: Tensor,
    size: tuple[int, int],
    min_score: float = 0.05,
    overlap: float = 0.6,
    most: int = 100,
) -> list[dict[str, Tensor]]:
    """The objects of every image, the surest first, as torchvision's detectors tell them.

    The score of a class at a position is ``sqrt(sigmoid(class) * sigmoid(centerness))``: FCOS (arXiv 1904.01355,
    section 3.3) multiplies both, of which the root keeps the order. What overlaps a surer answer of its class by more
    than ``overlap`` is left out (non-maximum suppression). Nothing here is quantised, and no file holds it.

    Args:
        classes: (B, P, C) logits of every class at every position.
        boxes: (B, P, 4) boxes xyxy, in pixels.
        centerness: (B, P) logits.
        size: height and width of the images, to which boxes are cut.
        min_score: the least score that counts.
        overlap: the largest intersection over union of two answers of one class.
        most: of an image.

    Returns:
        For each image ``boxes`` (N, 4) float32 xyxy, ``scores`` (N,) float32 and ``labels`` (N,) int64.

    Examples:
        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [1, 0, 8, 8], [20, 20, 30, 28]]])
        >>> found = detections(torch.tensor([[[4.0], [2.0], [1.0]]]), boxes, torch.full((1, 3), 9.0), (32, 28))
        >>> found[0]["boxes"].tolist(), found[0]["labels"].tolist()
        ([[0.0, 0.0, 8.0, 8.0], [20.0, 20.0, 28.0, 28.0]], [0, 0])
    """
    from torchvision.ops import batched_nms, clip_boxes_to_image

    scores = (classes.float().sigmoid() * centerness.float().sigmoid().unsqueeze(-1)).sqrt()
    found = []
    for of_image, places in zip(scores, boxes.float(), strict=True):
        values, flat = of_image.flatten().topk(min(_CANDIDATES, of_image.numel()))
        flat = flat[values > min_score]
        at, labels = flat // of_image.shape[1], flat % of_image.shape[1]
        candidates, sure = clip_boxes_to_image(places[at], size), of_image.flatten()[flat]
        kept = batched_nms(candidates, sure, labels, overlap)[:most]
        found.append({"boxes": candidates[kept], "scores": sure[kept], "labels": labels[kept]})
    return found
