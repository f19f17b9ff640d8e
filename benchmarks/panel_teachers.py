"""Makes the networks of configs/studies/panel.yaml and panel_few_labels.yaml: students in float, teachers.

    python -m benchmarks.panel_teachers studies/panel_teachers data/fashion_mnist

The second folder holds Fashion-MNIST's IDX files. A file a network, unless it is there already; minutes on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.panel import TEACHERS, PanelFashionMNIST, PanelNetwork
from lqkd.models import load_weights
from lqkd.utils.files import write_safetensors

ROWS = torch.arange(TEACHERS)
NARROW, WIDE = (8, 16, 32, 32), (24, 32, 48, 48)
"""Widths of the student, and of its teachers."""
ORDER = [1, 2, 0, 3, 4, 5, 6, 7, 8, 9]
"""Which class the renamed teacher calls by the name of class 0, 1, ..."""
HALF = [0, 1, 2, 3, 4]
"""Classes of the first specialist, and those that the half-right teacher knows."""
FEW = 1_000
"""Rows with a label in panel_few_labels.yaml."""
HALF_ORDER = [0, 1, 2, 3, 4, 6, 7, 8, 9, 5]


def trained(
    data: PanelFashionMNIST,
    widths: tuple[int, int, int, int] = WIDE,
    rows: Tensor | None = None,
    epochs: int = 8,
    augment: bool = True,
) -> PanelNetwork:
    """A network after so many epochs of AdamW, with a cosine.

    Args:
        data: the set.
        widths: of the network.
        rows: what it is trained on; None for all rows of the teachers.
        epochs: how often.
        augment: whether half of the images are mirrored.
    """
    torch.manual_seed(0)
    network = PanelNetwork(widths)
    images, labels = data.images(ROWS if rows is None else rows)
    steps = epochs * max(1, len(labels) // 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.004, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(128)[: max(1, len(labels) // 128)]:
            seen = images[batch]
            if augment:
                seen = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, seen.flip(-1), seen)
            optimizer.zero_grad()
            F.cross_entropy(network(seen), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def changed(network: PanelNetwork, change: Callable[[Tensor], Tensor]) -> PanelNetwork:
    """The network with other weights and bias of its last layer, (10, ...) each."""
    made = PanelNetwork(WIDE)
    made.load_state_dict(network.state_dict())
    with torch.no_grad():
        for parameter in made[-1].parameters():
            parameter.copy_(change(parameter))
    return made.eval()


def random_outputs() -> PanelNetwork:
    """Weights as they were drawn, with outputs as large as those of a trained network."""
    torch.manual_seed(1)
    return changed(PanelNetwork(WIDE), lambda values: 30 * values)


def networks(data: PanelFashionMNIST) -> dict[str, Callable[[dict[str, PanelNetwork]], PanelNetwork]]:
    """How each is made, from those before it."""
    _, labels = data.images(ROWS)
    first = torch.isin(labels, torch.tensor(HALF))
    return {
        "own": lambda made: trained(data, NARROW),
        "own_of_few": lambda made: trained(data, NARROW, rows=data.labelled_rows(FEW), epochs=40),
        "good": lambda made: trained(data),
        "weak": lambda made: trained(data, rows=ROWS[:250], epochs=40),
        "first_half": lambda made: trained(data, rows=ROWS[first]),
        "second_half": lambda made: trained(data, rows=ROWS[~first]),
        "renamed": lambda made: changed(made["good"], lambda values: values[ORDER]),
        "half_right": lambda made: changed(made["good"], lambda values: values[HALF_ORDER]),
        "over_confident": lambda made: changed(made["good"], lambda values: 10 * values),
        "under_confident": lambda made: changed(made["good"], lambda values: 0.1 * values),
        "random": lambda made: random_outputs(),
        "memorised": lambda made: trained(data, epochs=25, augment=False),
    }


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in images.split(1000)])
    return 100 * float((found == labels).double().mean())


def main(folder: Path, root: str) -> None:
    """Write ``NAME.safetensors`` of each, and print what they reach on training and validation rows."""
    data = PanelFashionMNIST(root=root, horizontal_flip=False, crop_padding=0)
    data.setup("fit")
    made: dict[str, PanelNetwork] = {}
    for name, make in networks(data).items():
        path = folder / f"{name}.safetensors"
        if path.is_file():
            made[name] = PanelNetwork(NARROW if name.startswith("own") else WIDE).eval()
            load_weights(made[name], str(path))
        else:
            made[name] = make(made)
            write_safetensors(path, made[name].state_dict())
        told = [f"{accuracy(made[name], *data.images(rows)):.2f}" for rows in (ROWS, data.val_indices)]
        print(f"{name}: {told[0]} % of training, {told[1]} % of validation rows", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
