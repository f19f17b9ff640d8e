"""What networks are trained for, as far as a batch tells it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.calls import dtype_name
from lqkd.models.outputs import Asked, main_tensor
from lqkd.pipelines.found import reach_of
from lqkd.quantization.modes import evaluating
from lqkd.tasks import CausalLM, Classification, Detection, KeyedClassification, MultiLabel, Segmentation, Task
from lqkd.tasks.scenes import scenes_of

LABELS = ("labels", "label", "targets", "target")
"""What labels are called in batches that are dicts."""
_OWN = "give task=, one of lqkd.tasks or a class of yours (docs/tasks.md)"


def guess_task(batch: Any, network: nn.Module) -> Task:
    """The task of batches like ``batch``.

    =========================================================  =====================================
    batch                                                      task
    =========================================================  =====================================
    inputs and integers (B,) or (B, 1); inputs alone           :class:`~lqkd.tasks.Classification`
    inputs and integers (B, H, W)                              :class:`~lqkd.tasks.Segmentation`
    inputs and 0, 1 or -1 (B, C), C >= 2                       :class:`~lqkd.tasks.MultiLabel`
    images and a list of dicts with ``boxes`` and ``labels``   :class:`~lqkd.tasks.Detection`
    a dict with integers (B,) under one of :data:`LABELS`      :class:`~lqkd.tasks.KeyedClassification`
    a dict with ``input_ids`` (B, T), and no labels or them    :class:`~lqkd.tasks.CausalLM`
    =========================================================  =====================================

    Of a dict the network is called with those tensors that its ``forward`` has parameters for, or with the only one.

    Args:
        batch: what a loader yields, on the CPU.
        network: is asked how many classes of pixels, or of objects on which levels, it knows, and what its arguments
            are called.

    Raises:
        UsageError: when it is none of these, or could be several.
    """
    if isinstance(batch, Mapping):
        return _keyed(batch, network)
    if isinstance(batch, Tensor):
        return Classification()
    if isinstance(batch, (tuple, list)) and len(batch) > 1 and _are_boxes(batch[1]):
        return _detection(batch, network)
    if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], Tensor):
        raise UsageError(f"the task cannot be told from a batch that is a {_name(batch)}: {_OWN}")
    return Classification() if len(batch) == 1 else _labelled(batch[0], batch[1], network)


def _labelled(images: Tensor, labels: Any, network: nn.Module) -> Task:
    if not isinstance(labels, Tensor):
        raise UsageError(f"the task cannot be told from labels that are a {_name(labels)}: {_OWN}")
    whole = not (labels.is_floating_point() or labels.is_complex())
    if whole and labels.dtype != torch.bool and (labels.ndim == 1 or labels.shape[1:] == (1,)):
        return Classification()
    if whole and labels.ndim == 3:
        return Segmentation(classes=_classes_of_pixels(network, images))
    if labels.ndim == 2 and labels.shape[1] > 1 and bool(torch.isin(labels.float(), torch.tensor([-1.0, 0, 1])).all()):
        if bool(((labels == 1).sum(dim=1) == 1).all()):
            raise UsageError(
                f"every row of the labels {tuple(labels.shape)} has a single 1: give labels.argmax(dim=1) for one "
                "class of several, or task=lqkd.tasks.MultiLabel(classes) for classes by themselves"
            )
        return MultiLabel(classes=labels.shape[1])
    raise UsageError(
        f"the task cannot be told from labels of {dtype_name(labels)} and shape {tuple(labels.shape)}: {_OWN}"
    )


def _keyed(batch: Mapping[str, Any], network: nn.Module) -> Task:
    found = [key for key in LABELS if key in batch]
    tokens = batch.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.ndim == 2 and found in ([], ["labels"]):
        labels = batch.get("labels", tokens)
        own = isinstance(labels, Tensor) and labels.shape == tokens.shape
        if own and bool(((labels < 0) | (labels == tokens)).all()):  # and not those of masked words, or names of things
            return CausalLM(inputs=_taken(network, [key for key in batch if key not in ("input_ids", "labels")]))
    if len(found) != 1:
        raise UsageError(
            f"the task cannot be told from a dict with {', '.join(map(repr, batch))}: it needs labels under one of "
            f"{', '.join(map(repr, LABELS))}; {_OWN}"
        )
    labels = batch[found[0]]
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.squeeze(-1).ndim > 1:
        shape = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"that are a {_name(labels)}"
        raise UsageError(f"the task cannot be told from {found[0]!r} {shape}: {_OWN}")
    tensors = [key for key, value in batch.items() if isinstance(value, Tensor) and key != found[0]]
    named = _taken(network, tensors)
    if named:
        return KeyedClassification(found[0], named)
    if len(tensors) == 1:
        return KeyedClassification(found[0], tensors, by_name=False)
    raise UsageError(
        f"{type(network).__name__}.forward has no parameter called {' or '.join(map(repr, tensors)) or 'like a tensor'}"
        f", as the batches have: {_OWN}"
    )


def _taken(network: nn.Module, keys: Sequence[str]) -> list[str]:
    """Those of the keys that ``network`` has parameters for."""
    takes = inspect.signature(network.forward).parameters
    return [key for key in keys if key in takes]


@torch.no_grad()
def _classes_of_pixels(network: nn.Module, images: Tensor) -> int:
    parameter = next(network.parameters(), images)
    one = images[:1].to(parameter.device)
    with evaluating(network):
        logits = main_tensor(network(one), Asked("student", 1))
    if logits.ndim != 4:
        raise UsageError(
            f"labels have a number for each pixel, and the student returns a tensor of shape {tuple(logits.shape)}: "
            "logits of shape (B, C, H, W) are needed"
        )
    return logits.shape[1]


def _are_boxes(labels: Any) -> bool:
    listed = isinstance(labels, (tuple, list)) and len(labels) > 0
    return listed and all(isinstance(one, Mapping) and {"boxes", "labels"} <= one.keys() for one in labels)


@torch.no_grad()
def _detection(batch: Sequence[Any], network: nn.Module) -> Detection:
    """Of the classes and strides that the network's maps have."""
    images = scenes_of(batch, 128).images[:1]  # of any stride
    parameter = next(network.parameters(), images)
    with evaluating(network):
        maps = network(images.to(parameter.device, parameter.dtype))
    found = {}
    for name, value in maps.items() if isinstance(maps, Mapping) else ():
        kind, _, stride = str(name).rpartition("_")
        if kind == "classes" and stride.isdecimal() and isinstance(value, Tensor) and value.ndim == 4:
            found[int(stride)] = value.shape[1]
    if not found or len({*found.values()}) > 1:
        raise UsageError(
            "labels have boxes, and the student returns no maps 'classes_S' (B, C, H / S, W / S) of the same classes "
            f"for each stride S, as lqkd.models.SmallFCOS does: {_OWN}"
        )
    longest = max(side for image in batch[0] for side in image.shape[-2:])
    return Detection(next(iter(found.values())), strides=sorted(found), reach=reach_of(longest))


def _name(value: Any) -> str:
    return type(value).__name__
