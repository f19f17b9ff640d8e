"""What the pack runs: the settings of one visit, and the trainings in the order of their value."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lqkd.errors import UsageError
from lqkd.utils.files import write_json

EPOCHS = 200
BATCH = 128
METHODS = ("hints", "kl", "task")
SEEDS = (0, 1)
UNFINISHED = 75
"""Exit status of a stage that has more to do, for a later visit."""


@dataclass(frozen=True)
class Run:
    """One training of ResNet-20.

    Attributes:
        data: ``cifar10`` or ``cifar100``.
        bits: ``float``, or the bits of weights and activations; the first and last layer keep 8.
        method: ``hints``, stage outputs of its own float network, 0.1 CE : 100; ``kl``, 0.5 CE : 0.5 KL; ``task``.
        seed: of data and weights.
    """

    data: str
    bits: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}_resnet20_{self.bits}_{self.method}_{self.seed}"

    @property
    def needs(self) -> Run | None:
        """The training whose weights this one starts from; None where they are brought along or random."""
        if self.bits == "float" or self.data == "cifar10":
            return None
        return Run(self.data, "float", "task", 0)


def runs(seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Every training, the most valuable first, so that whatever a visit has no time for costs the least.

    At two bits the ways to distil differ most, and CIFAR-10 has published numbers for every width; one seed of each
    comparison comes before a second one of any.

    Args:
        seeds: the first of them 0.
    """
    first = [
        Run("cifar10", "w2a2", "hints", 0),
        Run("cifar10", "float", "task", 0),  # what the harness itself reaches, against a well-known number
        Run("cifar10", "w4a4", "hints", 0),
        Run("cifar10", "w2a2", "kl", 0),
        Run("cifar10", "w2a2", "task", 0),
        Run("cifar10", "w3a3", "hints", 0),
        Run("cifar10", "w1a1", "hints", 0),
        Run("cifar100", "float", "task", 0),
        Run("cifar100", "w2a2", "hints", 0),
    ]
    comparisons = [
        ("cifar10", "w2a2"),
        ("cifar10", "w4a4"),
        ("cifar10", "w1a1"),
        ("cifar10", "w3a3"),
        ("cifar100", "w2a2"),
    ]
    rest = [Run(data, bits, method, seed) for seed in seeds for data, bits in comparisons for method in METHODS]
    floats = [Run("cifar10", "float", "task", seed) for seed in seeds]
    return list(dict.fromkeys([*first, *rest, *floats]))


@dataclass(frozen=True)
class Settings:
    """What must be the same in all visits that add to one folder.

    Attributes:
        scale: part of the budget: 1 is 200 epochs of batches of 128, less is a rehearsal.
        epochs: of every training at scale 1.
    """

    scale: float = 1.0
    epochs: int = EPOCHS

    @property
    def whole(self) -> bool:
        return self.scale >= 1

    @property
    def scaled_epochs(self) -> int:
        return max(1, round(self.epochs * self.scale))

    @property
    def batch(self) -> int:
        return BATCH if self.whole else 4

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS if self.whole else SEEDS[:1]

    @property
    def steps_per_epoch(self) -> int | None:
        """The most steps of an epoch; None for all of its images."""
        return None if self.whole else max(2, round(400 * self.scale))

    def keep(self, folder: Path) -> None:
        """Write these settings into ``folder``, or see that they are those that are there.

        Raises:
            UsageError: when the folder has results of other settings.
        """
        path = folder / "settings.json"
        mine = dataclasses.asdict(self)
        if not path.exists():
            write_json(path, mine)
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        different = next((name for name in mine if mine[name] != kept.get(name)), None)
        if different is not None:
            raise UsageError(
                f"--{different} {mine[different]} is not possible with --out {folder}, whose results were made with "
                f"{kept.get(different)}: use that, or another folder"
            )


def settings_of(folder: Path) -> Settings:
    """The settings of the visits that add to ``folder``."""
    return Settings(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))


def stage_parser(description: str) -> argparse.ArgumentParser:
    """The arguments of every stage."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder of images and weights; default: $LQKD_DATA")
    parser.add_argument("--seconds", type=float, default=600, help="time limit")
    return parser
