"""The losses of a detector without anchors, and which object a position is to find."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lqkd.losses.task import UNLABELLED
from lqkd.models.position_grid import Positions


class Assigned(NamedTuple):
    """What each of the P positions of an image is to say."""

    labels: Tensor
    """(P,) int64: the class of its object, -1 for the background."""
    boxes: Tensor
    """(P, 4) float32: the box of its object xyxy, zeros for the background."""
    centerness: Tensor
    """(P,) float32, from 0 to 1; 0 for the background."""


@torch.no_grad()
def assign(boxes: Tensor, labels: Tensor, at: Positions, radius: float = 1.5, reach: float = 8.0) -> Assigned:
    """The object of every position: FCOS (arXiv 1904.01355), section 3.1 and 3.2, with centre sampling.

    A position is of an object where it lies inside of its box and within ``radius`` strides of its middle, and where
    the largest of its distances to the four sides belongs to its level: up to ``reach`` of its strides, without an end
    on the coarsest level, and above ``reach`` strides of the level before, 0 on the finest. With a reach of 8 these are
    the paper's limits, 64 pixels on stride 8 and so on. Of several objects it is the smallest. A box that is too small
    for any position to lie inside is no position's.

    The centerness is equation 3: ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``.

    Args:
        boxes: (N, 4) xyxy in pixels.
        labels: (N,) int64.
        at: the image's positions.
        radius: of the middle, in strides.
        reach: see above.

    Examples:
        >>> from lqkd.models import positions
        >>> found = assign(torch.tensor([[2.0, 2, 14, 14]]), torch.tensor([5]), positions(16, 32, [8]))
        >>> found.labels.tolist(), round(float(found.centerness[0]), 3)
        ([5, 5, -1, -1, 5, 5, -1, -1], 0.2)
    """
    count = len(at.points)
    if len(boxes) == 0:
        empty = at.points.new_zeros(count)
        return Assigned(torch.full((count,), UNLABELLED, device=empty.device), empty.new_zeros(count, 4), empty)
    boxes = boxes.to(at.points)
    x, y = at.points.unsqueeze(1).unbind(-1)  # (P, 1)
    left, top, right, bottom = boxes.unbind(-1)  # (N,)
    distances = torch.stack([x - left, y - top, right - x, bottom - y], dim=-1)  # (P, N, 4)
    strides = at.strides.unsqueeze(1)
    near = torch.maximum((x - (left + right) / 2).abs(), (y - (top + bottom) / 2).abs()) < radius * strides
    longest = distances.amax(dim=-1)
    low = at.finer.unsqueeze(1) * reach
    high = torch.where(strides == at.strides.max(), math.inf, strides * reach)
    chosen = (distances.amin(dim=-1) > 0) & near & (longest > low) & (longest <= high)
    areas = ((right - left) * (bottom - top)).expand(count, -1)
    smallest, which = torch.where(chosen, areas, math.inf).min(dim=1)
    there = smallest < math.inf
    sides = distances[torch.arange(count, device=which.device), which]  # (P, 4): left, top, right, bottom
    shares = [
        torch.minimum(a, b) / torch.maximum(a, b) for a, b in ((sides[:, 0], sides[:, 2]), (sides[:, 1], sides[:, 3]))
    ]
    return Assigned(
        torch.where(there, labels[which], UNLABELLED),
        torch.where(there.unsqueeze(1), boxes[which], 0.0),
        torch.where(there, (shares[0] * shares[1]).clamp_min(0).sqrt(), 0.0),
    )


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of each class at each position, ``-alpha_t * (1 - p_t)**gamma * log(p_t)``.

    Lin et al., "Focal Loss for Dense Object Detection" (arXiv 1708.02002), equation 5, with a sigmoid for each class:
    where it is the position's, p_t is its probability and alpha_t is alpha, elsewhere they are what is left to 1.

    Args:
        logits: (..., C).
        labels: (...) int64; negative for the background.
        alpha: weight of what is there.
        gamma: how much less what is known already counts.

    Returns:
        (..., C), at least 0.

    Examples:
        >>> focal_loss(torch.tensor([[0.0, 4.0]]), torch.tensor([1]))[0, 1] < 1e-5  # surely the second, which it is
        tensor(True)
    """
    there = F.one_hot(labels.clamp_min(0), logits.shape[-1]).to(logits) * (labels >= 0).unsqueeze(-1)
    entropy = F.binary_cross_entropy_with_logits(logits, there, reduction="none")  # -log(p_t)
    p = logits.sigmoid()
    missed = there * (1 - p) + (1 - there) * p  # 1 - p_t
    return (alpha * there + (1 - alpha) * (1 - there)) * missed**gamma * entropy


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """``1 - GIoU`` of pairs of boxes: of their intersection over union, less what of their hull is of neither.

    Rezatofighi et al., "Generalized Intersection over Union" (arXiv 1902.09630), algorithm 1:
    ``GIoU = I / U - (A_c - U) / A_c`` with the area A_c of the smallest box around both.

    Args:
        boxes, others: (..., 4) xyxy, with an area of at least 0.

    Returns:
        (...), from 0 to 2.

    Examples:
        >>> giou_loss(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2]]))
        tensor([0.0000, 0.6667])
    """
    tiny = torch.finfo(boxes.dtype).eps
    inner = (torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])).clamp_min(
        0
    )
    outer = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    areas = [(of[..., 2:] - of[..., :2]).prod(dim=-1) for of in (boxes, others)]
    intersection, hull = inner.prod(dim=-1), outer.prod(dim=-1)
    union = areas[0] + areas[1] - intersection
    return 1 - intersection / union.clamp_min(tiny) + (hull - union) / hull.clamp_min(tiny)


def fcos_losses(classes: Tensor, boxes: Tensor, centerness: Tensor, assigned: Assigned) -> Tensor:
    """The loss of every image, FCOS' equation 2 with its centerness: focal loss, GIoU loss and cross-entropy, each 1.

    Equation 2 of arXiv 1904.01355 divides by the number of positions that are of an object, here of the image (1 where
    there is none) and not of the batch, so that a batch's loss is the mean over its images, however processes share
    them. Boxes are weighed by their centerness and divided by its sum, as in the authors' program.

    Args:
        classes: (B, P, C) logits.
        boxes: (B, P, 4) xyxy, in pixels.
        centerness: (B, P) logits.
        assigned: what they are to be, with B in front.

    Returns:
        (B,)
    """
    there = (assigned.labels >= 0).to(classes)
    number = there.sum(dim=1).clamp_min(1)
    of_classes = focal_loss(classes, assigned.labels).sum(dim=(1, 2)) / number
    # Where there is no object the target is the answer: finite, and of no weight.
    targets = torch.where(there.unsqueeze(-1) > 0, assigned.boxes.to(boxes), boxes.detach())
    weight = assigned.centerness.to(boxes)
    total = weight.sum(dim=1).clamp_min(torch.finfo(weight.dtype).eps)
    of_boxes = (giou_loss(boxes, targets) * weight).sum(dim=1) / total
    entropy = F.binary_cross_entropy_with_logits(centerness, weight.to(centerness), reduction="none")
    return of_classes + of_boxes + (entropy * there).sum(dim=1) / number
