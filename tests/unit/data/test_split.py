from __future__ import annotations

import torch

from lqkd.data.split import stratified_split

LABELS = torch.tensor([0] * 50 + [1] * 33 + [2] * 17)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
IDS = torch.arange(100) * 10


def test_the_two_parts_are_disjoint_and_cover_everything() -> None:
    chosen, rest = stratified_split(IDS, LABELS, 23, seed=0, stream=1)
    assert torch.equal(torch.cat([chosen, rest]).sort().values, IDS)


def test_the_size_is_exact_for_every_size() -> None:
    assert all(len(stratified_split(IDS, LABELS, size, seed=0, stream=1)[0]) == size for size in range(101))


def test_each_class_is_chosen_in_proportion() -> None:
    chosen, _ = stratified_split(IDS, LABELS, 10, seed=0, stream=1)
    # 5.0, 3.3 and 1.7 images: the one that is left after 5 + 3 + 1 goes to the largest remainder.
    assert torch.bincount(LABELS[chosen // 10]).tolist() == [5, 3, 2]


def test_the_seed_decides_the_subset() -> None:
    first, again, other = (stratified_split(IDS, LABELS, 20, seed=seed, stream=1)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_without_a_label_are_split_in_proportion_too() -> None:
    labels = torch.where(LABELS == 2, -1, LABELS)
    chosen, _ = stratified_split(IDS, labels, 50, seed=0, stream=1)
    assert int((labels[chosen // 10] < 0).sum()) in (8, 9)  # of 17
