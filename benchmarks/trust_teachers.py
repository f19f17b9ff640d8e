"""Makes the teachers of configs/studies/trust_digits.yaml: one that has learned little, and one of other class names.

    python -m benchmarks.trust_teachers studies/trust_teachers

They are the teacher of configs/regularizer.yaml after 40 steps on 100 images from random weights, and with classes 0, 1
and 2 renamed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lqkd.data import Digits
from lqkd.models import CifarResNet, load_weights

ORDER = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9]


def weak() -> CifarResNet:
    """Trained on the first 100 training images."""
    torch.manual_seed(0)
    network = CifarResNet(depth=14, width=8, in_channels=1)
    data = Digits(batch_size=100, limit_train=100, seed=0)
    data.setup("fit")
    batch = data.preprocess(next(iter(data.train_dataloader())), train=False, epoch=0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(batch.images), batch.labels).backward()
        optimizer.step()
    return network


def renamed() -> CifarResNet:
    """Knows all classes, of which it calls three by each other's name."""
    network = CifarResNet(depth=14, width=8, in_channels=1)
    load_weights(network, "builtin:digits_teacher")
    with torch.no_grad():
        network.linear.weight.copy_(network.linear.weight[ORDER])
        network.linear.bias.copy_(network.linear.bias[ORDER])
    return network


def main(folder: Path) -> None:
    """Write ``weak.safetensors`` and ``renamed.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in (("weak", weak()), ("renamed", renamed())):
        save_file(network.state_dict(), folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
