"""The networks and the data of configs/studies/panel.yaml and panel_features.yaml."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lqkd.data import FashionMNIST
from lqkd.data.augment import normalize
from lqkd.data.base import ImageSet
from lqkd.data.split import stratified_split
from lqkd.errors import UsageError
from lqkd.utils.counter_rng import STREAM_HELD_OUT, STREAM_LIMIT, integers, uniform

TRAINING, TEACHERS, VALIDATION = 12_500, 25_000, 5_000
"""Rows of the training set: the first that students train on, the first that teachers may have been trained on, and how
many after these choose."""
UNLABELLED = -1
_WRONG, _NOISE = 2_000, 2_001
"""Streams of the random numbers that decide whose label is wrong, and which it has, and of noise in features."""


class PanelNetwork(nn.Sequential):
    """Four convolutions with batch norm and a linear layer: images (B, 1, H, W), logits (B, 10).

    Args:
        widths: channels of the four convolutions, of which the first and second halve the image.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (8, 16, 32, 32)) -> None:
        layers: list[nn.Module] = []
        for before, after, stride in zip((1, *widths), widths, (2, 2, 1, 1), strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class NoisyPanelNetwork(PanelNetwork):
    """The same network, whose module ``noisy`` gives its features after the third convolution, half of them noise.

    Every second channel shows a normal number in the place of each normalised one, before the scale, shift and ReLU of
    batch norm: it varies as much as it did and says nothing of the image, which decides it and nothing else. Logits
    are those of :class:`PanelNetwork`, whose weights it takes.

    Args:
        widths: as there.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (8, 16, 32, 32)) -> None:
        super().__init__(widths)
        self.noisy = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        *layers, noisy = self.children()
        features = images
        for layer in layers[:9]:
            features = layer(features)
        norm, shown = layers[7], features.clone()
        assert isinstance(norm, nn.BatchNorm2d)
        drawn = normal_of(images, features[:, 1::2].shape[1:])
        shown[:, 1::2] = (norm.bias[1::2, None, None] + norm.weight[1::2, None, None] * drawn).relu()
        noisy(shown)
        for layer in layers[9:]:
            features = layer(features)
        return features


def normal_of(images: Tensor, shape: torch.Size) -> Tensor:
    """Normal numbers (B, ``shape``) float32 that images (B, ...) decide, each its own (Box & Muller, 1958)."""
    pixels = (256 * images).round().long().flatten(1)
    keys = (pixels * torch.arange(1, 2 * pixels.shape[1], 2, device=images.device)).sum(1)
    numbers = torch.arange(shape.numel(), device=images.device)
    indices = (keys[:, None] * shape.numel() + numbers).flatten()
    one, other = (uniform(0, 0, indices, _NOISE, draw=draw) for draw in range(2))
    drawn = (-2 * (1 - one).log()).sqrt() * (2 * torch.pi * other).cos()
    return drawn.view(-1, *shape)


class PanelFashionMNIST(FashionMNIST):
    """12,500 training rows of Fashion-MNIST, and 5,000 for validation that no teacher has been trained on.

    Both are the same in every run; its seed chooses rows that are held out. Labels are spoiled in training and among
    held-out rows alike, never in validation and test, and of the same rows for every seed and method.

    Args:
        root: as for :class:`~lqkd.data.FashionMNIST`.
        wrong_labels: share of the training rows that have the label of another class.
        wrong_classes: classes whose rows may have a wrong label; null for all.
        labelled: training rows that keep their label, all classes in proportion, of which ``trust_fraction`` is held
            out; null for all.
        kwargs: the other settings of :class:`~lqkd.data.FashionMNIST`.

    Raises:
        UsageError: when a setting is out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        wrong_labels: float = 0.0,
        wrong_classes: list[int] | None = None,
        labelled: int | None = None,
        **kwargs: object,
    ) -> None:
        if not 0 <= wrong_labels <= 1:
            raise UsageError(f"wrong_labels={wrong_labels} is not possible: it must be from 0 to 1")
        if labelled is not None and not 1 <= labelled <= TRAINING:
            raise UsageError(f"labelled={labelled} is not possible: it must be from 1 to {TRAINING}")
        self.wrong_labels, self.wrong_classes, self.labelled = wrong_labels, wrong_classes, labelled
        self._unknown: Tensor | None = None
        super().__init__(root=root, **kwargs)  # type: ignore[arg-type]

    def load(self) -> ImageSet:
        images = super().load()
        assert isinstance(images.train_images, Tensor)
        kept = slice(TEACHERS + VALIDATION)
        return images._replace(train_images=images.train_images[kept], train_labels=images.train_labels[kept])

    def _hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(TEACHERS, TEACHERS + VALIDATION), torch.arange(TRAINING)

    def _split(self, labels: Tensor) -> None:
        super()._split(labels)
        if self.labelled is None:
            return
        rows = torch.arange(TRAINING)
        known = _labelled(labels, self.labelled)
        self._unknown = rows[~torch.isin(rows, known)]
        size, seed = round(self.trust_fraction * len(known)), self.run_seed
        self.trust_indices, _ = stratified_split(known, labels[known], size, seed=seed, stream=STREAM_HELD_OUT)
        self.train_indices = rows[~torch.isin(rows, self.trust_indices)]

    def labelled_rows(self, count: int) -> Tensor:
        """(count,) rows that keep their label with ``labelled=count``; after ``setup`` without it."""
        return _labelled(self._loaded().train_labels, count)

    def setup(self, stage: str | None = None) -> None:
        before = self._images
        super().setup(stage)
        if before is None:
            self._spoil(self._loaded().train_labels)

    def _spoil(self, labels: Tensor) -> None:
        """Change labels of training rows, held-out ones included, in place."""
        rows = torch.arange(TRAINING)
        spoiled = uniform(0, 0, rows, _WRONG) < self.wrong_labels
        if self.wrong_classes is not None:
            spoiled &= torch.isin(labels[rows], torch.tensor(self.wrong_classes))
        rows = rows[spoiled]
        labels[rows] = (
            labels[rows] + 1 + integers(0, 0, rows, _WRONG, self.num_classes - 1, draw=1)
        ) % self.num_classes
        if self._unknown is not None:
            labels[self._unknown] = UNLABELLED

    def images(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 1, 28, 28) and labels (N,) of rows of the training set, after ``setup``."""
        loaded = self._loaded()
        assert isinstance(loaded.train_images, Tensor)
        return normalize(loaded.train_images[rows], self.mean, self.std), loaded.train_labels[rows]


def _labelled(labels: Tensor, count: int) -> Tensor:
    rows = torch.arange(TRAINING)
    return stratified_split(rows, labels[rows], count, seed=0, stream=STREAM_LIMIT)[0]
