"""Object detection by torchvision's detectors, with its anchors, losses and decoding."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.outputs import Asked
from lqkd.tasks.base import Rows
from lqkd.tasks.box_detection import ANY_SIZE, BoxDetection

_FAMILIES = ("fcos", "retinanet", "ssdlite")


class _Answers(NamedTuple):
    """The columns of an answer."""

    logits: Tensor
    """(B, P, C); of SSDlite C + 1, the background first."""
    boxes: Tensor
    """(B, P, 4), as the network says them, in units of the anchors."""
    centerness: Tensor
    """(B, P, 1) logits; (B, P, 0) where there are none."""
    anchors: Tensor
    """(B, P, 4) xyxy in pixels, of the finest level first."""


class TorchvisionDetection(BoxDetection):
    """Boxes and classes of the objects in images, by :class:`lqkd.models.TorchvisionDetector`.

    Batches, metrics and what is quantised are those of :class:`lqkd.tasks.Detection`. The loss is the sum of what
    ``compute_loss`` of torchvision's own detector gives: focal, GIoU and centerness losses for FCOS, focal and L1
    losses for RetinaNet, cross-entropy with hard negatives and smooth L1 loss for SSDlite. FCOS' and SSDlite's are
    divided by the objects' positions of the batch, of one process, RetinaNet's by those of each image. Anchors,
    decoding and non-maximum suppression are torchvision's as well; none of them is quantised, nor in a file.

    An answer is a tensor (B, P, ...) over all anchors: logits, box as the network says it, centerness where there is
    one, and the anchor's box xyxy. Rows of distillation are the logits of all anchors: of FCOS and RetinaNet each class
    is there or not, which ``BinaryKL`` compares; of SSDlite they are predictions of one class of C + 1, the first of
    which is the background, which ``HintonKL`` compares.

    Images are what networks see: resized and normalised by the data (``image_size``, ``mean``, ``std``), in place of
    torchvision's ``GeneralizedRCNNTransform``. SSDlite was trained on 320x320 with ``mean: [0.5, 0.5, 0.5]`` and
    ``std: [0.5, 0.5, 0.5]``, the others with those of ImageNet.

    Args:
        detector: ``fcos``, ``retinanet`` or ``ssdlite``.
        classes: their names, or their number, without the background.
        min_score: the least score of an object that counts, in [0, 1).
        overlap: of two objects of a class, from which on one of them does not count, in (0, 1); null for torchvision's,
            0.6 for FCOS, 0.5 for RetinaNet and 0.55 for SSDlite.
        most_objects: of an image that count; the metric looks at 100.

    Raises:
        UsageError: when an argument is not possible, or faster-coco-eval is not installed.
    """

    _rules: Any
    _anchors: tuple[Any, list[Tensor]]

    def __init__(
        self,
        detector: Literal["fcos", "retinanet", "ssdlite"],
        classes: int | list[str],
        min_score: float = 0.05,
        overlap: float | None = None,
        most_objects: int = 100,
    ) -> None:
        if detector not in _FAMILIES:
            raise UsageError(f"detector={detector!r} is not possible: {', '.join(_FAMILIES)}")
        ssdlite = detector == "ssdlite"
        strides = (16, 32, 64, 128, 256, 512) if ssdlite else (8, 16, 32, 64, 128)
        own = {"fcos": 0.6, "retinanet": 0.5, "ssdlite": 0.55}[detector]
        super().__init__(
            classes, strides, 16 if ssdlite else 32, min_score, own if overlap is None else overlap, most_objects
        )
        self.detector = detector
        self.softmax_rows, self.independent_logits = ssdlite, not ssdlite
        self.__dict__["_rules"] = self._torchvisions()  # no submodule: nothing of it is trained or saved
        self._anchors = (None, [])  # of the images of the last batch

    def _torchvisions(self) -> Any:
        """torchvision's detector without a network: its anchors, matching, losses and decoding."""
        from torchvision.models import detection
        from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
        from torchvision.models.detection.fcos import FCOSHead
        from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen

        backbone = nn.Module()
        backbone.out_channels = 32  # type: ignore[assignment]
        limits = {
            "score_thresh": self.min_score,
            "nms_thresh": self.overlap,
            "detections_per_img": self.most_objects,
        }
        made: Any
        if self.detector == "ssdlite":
            anchors: Any = DefaultBoxGenerator([[2, 3] for _ in self.strides], min_ratio=0.2, max_ratio=0.95)
            made = detection.ssd.SSD(
                backbone, anchors, (320, 320), self.classes + 1, head=nn.Identity(), topk_candidates=300, **limits
            )
        elif self.detector == "fcos":
            anchors = AnchorGenerator(tuple((stride,) for stride in self.strides), ((1.0,),) * len(self.strides))
            head: Any = FCOSHead(32, 1, self.classes, num_convs=0)
            made = detection.FCOS(backbone, self.classes, anchor_generator=anchors, head=head, **limits)
        else:
            anchors = _default_anchorgen()
            head = RetinaNetHead(32, anchors.num_anchors_per_location()[0], self.classes)
            made = detection.RetinaNet(backbone, self.classes, anchor_generator=anchors, head=head, **limits)
        for module in made.modules():
            module._parameters.clear()
        return made

    # ---- the path of a batch

    def outputs(self, returned: Any, asked: Asked) -> Tensor:
        """An answer for every anchor (B, P, C + 9), float32, of FCOS and SSDlite one more; see the class.

        Raises:
            UsageError: when the network returns anything else.
        """
        logits = self.classes + (self.detector == "ssdlite")
        anchors_at = self._rules.anchor_generator.num_anchors_per_location()
        levels, columns = [], {"classes": logits, "boxes": 4} | ({"centerness": 1} if self.detector == "fcos" else {})
        size = (0, 0)
        for number, stride in enumerate(self.strides):
            count = anchors_at[number]
            maps = self.maps(returned, stride, {name: of * count for name, of in columns.items()}, asked)
            if number == 0:
                size = (maps[0].shape[2] * stride, maps[0].shape[3] * stride)
            each = [
                values.float().unflatten(1, (count, of)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (B, H * W * A, C)
                for values, of in zip(maps, columns.values(), strict=True)
            ]
            levels.append(torch.cat(each, dim=2))
        answers = torch.cat(levels, dim=1)
        anchors = torch.cat(self._levels(size, answers.device))
        if len(anchors) != answers.shape[1]:
            raise UsageError(
                f"the {asked.network} returns maps for {answers.shape[1]} anchors of images of "
                f"{size[0]}x{size[1]} pixels, which have {len(anchors)}: image_size must be a multiple of "
                f"{self.multiple}, and the network one of the detectors of task.detector={self.detector!r}"
            )
        return torch.cat([answers, anchors.expand(len(answers), -1, -1)], dim=2)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The sum of torchvision's losses, 0-dim; 0 for images alone."""
        scenes = self.scenes(batch)
        if scenes.objects is None:
            return 0.0 * outputs.sum()
        answers, background = self._answers(outputs), int(self.detector == "ssdlite")
        targets = [{"boxes": of.boxes, "labels": of.labels + background} for of in scenes.objects]
        said = {"cls_logits": answers.logits, "bbox_regression": answers.boxes, "bbox_ctrness": answers.centerness}
        anchors = list(answers.anchors)
        if self.detector == "fcos":
            height, width = scenes.images.shape[-2:]
            levels = [len(level) for level in self._levels((height, width), outputs.device)]
            losses = self._rules.compute_loss(targets, said, anchors, levels)
        elif self.detector == "retinanet":
            losses = self._rules.compute_loss(targets, said, anchors)
        else:
            losses = self._rules.compute_loss(targets, said, anchors, self._matched(targets, anchors))
        return cast(Tensor, sum(losses.values()))

    def _matched(self, targets: list[dict[str, Tensor]], anchors: list[Tensor]) -> list[Tensor]:
        """The object of each anchor of SSDlite, -1 for the background, which torchvision finds in its forward."""
        from torchvision.ops import box_iou

        return [
            self._rules.proposal_matcher(box_iou(target["boxes"], at))
            if len(target["boxes"])
            else torch.full((len(at),), -1, dtype=torch.int64, device=at.device)
            for target, at in zip(targets, anchors, strict=True)
        ]

    def rows(self, outputs: Tensor, batch: Any) -> Rows:
        """Every anchor of every image: logits (B * P, C), of SSDlite C + 1; no labels."""
        return Rows(self._answers(outputs).logits.flatten(0, 1), None)

    # ---- parts

    def decoded(self, outputs: Tensor, size: tuple[int, int] | None) -> list[dict[str, Tensor]]:
        answers, sizes = self._answers(outputs), [size or ANY_SIZE] * len(outputs)
        if self.detector == "ssdlite":
            said = {"cls_logits": answers.logits, "bbox_regression": answers.boxes}
            found = self._rules.postprocess_detections(said, list(answers.anchors), sizes)
            return [one | {"labels": one["labels"] - 1} for one in found]
        levels = [outputs.shape[1]] if size is None else [len(at) for at in self._levels(size, outputs.device)]
        by_level = {
            "cls_logits": answers.logits.split(levels, 1),
            "bbox_regression": answers.boxes.split(levels, 1),
            "bbox_ctrness": answers.centerness.split(levels, 1),
        }
        anchors = [list(at.split(levels)) for at in answers.anchors]
        found = self._rules.postprocess_detections(by_level, anchors, sizes)
        return cast(list[dict[str, Tensor]], found)

    def check_positions(self, outputs: Tensor, images: Tensor) -> None:
        height, width = images.shape[-2:]
        self.check_count(outputs, images, sum(len(at) for at in self._levels((height, width), outputs.device)))

    def _answers(self, outputs: Tensor) -> _Answers:
        logits, centerness = self.classes + (self.detector == "ssdlite"), int(self.detector == "fcos")
        return _Answers(*outputs.split([logits, 4, centerness, 4], dim=2))

    def _levels(self, size: tuple[int, int], device: torch.device) -> list[Tensor]:
        """The anchors (A * H * W, 4) of each level of an image of this size, xyxy in pixels."""
        if self._anchors[0] == (size, device):
            return self._anchors[1]
        with torch.inference_mode(False):  # as a later training uses them
            from torchvision.models.detection.image_list import ImageList

            image = torch.empty(1, device=device).expand(1, 1, *size)
            grids = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in self.strides]
            maps = [torch.empty(1, device=device).expand(1, 1, *grid) for grid in grids]
            (anchors,) = self._rules.anchor_generator(ImageList(image, [size]), maps)
            counts = self._rules.anchor_generator.num_anchors_per_location()
            sizes = [height * width * count for (height, width), count in zip(grids, counts, strict=True)]
            self._anchors = ((size, device), list(anchors.split(sizes)))
        return self._anchors[1]
