"""Pictures of what detectors find on photographs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # which take a while to load
    from matplotlib.figure import Figure

SURE = 0.5
"""The score from which on an object is drawn."""


def are_there(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor, overlap: float = 0.5) -> Tensor:
    """Whether each found object is one that is there: of its class, in its place, and of no surer one.

    Args:
        boxes: (N, 4) xyxy of what was found, the surest first.
        labels: (N,) their classes.
        true_boxes: (M, 4) xyxy of what is there.
        true_labels: (M,) their classes.
        overlap: intersection over union from which on two boxes are in the same place.

    Returns:
        (N,) bool.

    Examples:
        >>> found, there = torch.tensor([[0.0, 0, 8, 8], [1, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 9]])
        >>> are_there(found, torch.tensor([1, 1]), there, torch.tensor([1])).tolist()  # the second is the same one
        [True, False]
    """
    from torchvision.ops import box_iou

    overlaps = box_iou(boxes.float(), true_boxes.float()) * (labels.unsqueeze(1) == true_labels.unsqueeze(0))
    right = torch.zeros(len(boxes), dtype=torch.bool)
    for number in range(len(boxes) if len(true_boxes) else 0):
        best, place = overlaps[number].max(dim=0)
        if best >= overlap:
            right[number] = True
            overlaps[:, place] = 0.0
    return right


def drawn_over(
    photograph: np.ndarray[Any, Any], objects: Tensor, seen: tuple[int, int], names: Sequence[str]
) -> np.ndarray[Any, Any]:
    """A photograph with boxes around the objects of a score of 0.5 or more.

    Args:
        photograph: (H, W, 3) or (H, W) uint8.
        objects: (K, 6) as the task predicts them: box xyxy, score and class.
        seen: height and width of the image that boxes are in pixels of.
        names: of the classes; empty for their numbers.

    Returns:
        (H', W', 3) uint8.
    """
    from lqkd.utils.box_figures import Boxes, with_boxes

    rows = objects[objects[:, 4] >= SURE].double().numpy()
    height, width = photograph.shape[:2]
    corners, labels = rows[:, :4] * ([width / seen[1], height / seen[0]] * 2), rows[:, 5].astype(int)
    names = names or [*map(str, range(1 + max(labels, default=0)))]
    return with_boxes(photograph, Boxes(corners, labels, rows[:, 4]), names)


def found_beside_truth(
    photographs: Sequence[np.ndarray[Any, Any]],
    objects: Sequence[tuple[Tensor, Tensor]],
    found: Mapping[str, Tensor],
    names: Sequence[str],
) -> Figure:
    """What is on photographs beside what networks find there.

    Args:
        photographs: (H, W, C) uint8.
        objects: of each, boxes (N, 4) xyxy in its pixels and labels (N,).
        found: by name of the network, (B, K, 6) as the task predicts it: box, score and class.
        names: of the classes.
    """
    from lqkd.utils.box_figures import Boxes, side_by_side

    there = [Boxes(boxes.numpy(), labels.numpy()) for boxes, labels in objects[: len(photographs)]]
    total = sum(len(one.labels) for one in there)
    columns, told = {f"labels: {total} objects": there}, []
    for network, rows in found.items():
        drawn, hits, misses = [], 0, 0
        for of_image, (boxes, labels) in zip(rows, objects[: len(photographs)], strict=False):
            sure = of_image[of_image[:, 4] >= SURE]
            right = are_there(sure[:, :4], sure[:, 5].long(), boxes, labels)
            hits, misses = hits + int(right.sum()), misses + int((~right).sum())
            drawn.append(Boxes(sure[:, :4].numpy(), sure[:, 5].long().numpy(), sure[:, 4].numpy(), right.numpy()))
        columns[f"{network}: {hits} of them, {misses} others"] = drawn
        told.append(f"the {network} finds {hits}")
    finding = f"Of {total} labelled objects {', '.join(told)}; dashed boxes have no label"
    return side_by_side(photographs, columns, names, finding)


def pixels_of(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[np.ndarray[Any, Any]]:
    """Images (B, C, H, W) that were normalised, as (H, W, 3) or (H, W) uint8 each.

    Where mean and std are not known, each is stretched from its darkest to its brightest value.
    """
    images = images.detach().float().cpu()
    if len(mean) == len(std) == images.shape[1]:
        images = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    else:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(torch.finfo(images.dtype).tiny)
    whole = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [(one if one.shape[-1] == 3 else one[..., 0]).numpy() for one in whole]
