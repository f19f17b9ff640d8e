from __future__ import annotations

import pytest
import torch

from lqkd.data.resized_crop import ATTEMPTS
from lqkd.utils import counter_rng
from lqkd.utils.counter_rng import STREAM_CROP_X, STREAM_CROP_Y, integers, random_bits, uniform

IDS = torch.arange(20_000)


def splitmix64(state: int) -> int:
    """The finaliser of the published algorithm on Python's unbounded integers."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_bits_are_those_of_splitmix64() -> None:
    golden, mask, key = 0x9E3779B97F4A7C15, 2**64 - 1, 0
    for part in (7, 3, 5):
        key = splitmix64(((key ^ part) + golden) & mask)
    ids = [0, 1, 49_999, 2**40]
    expected = [splitmix64(index * golden + key) for index in ids]
    assert [bits % 2**64 for bits in random_bits(7, 3, torch.tensor(ids), 5).tolist()] == expected


def test_numbers_lie_in_zero_to_one_and_are_uniform() -> None:
    numbers = uniform(0, 0, IDS, STREAM_CROP_X)
    assert numbers.dtype == torch.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("seed", "epoch", "stream"),
    [(1, 0, STREAM_CROP_X), (0, 1, STREAM_CROP_X), (0, 0, STREAM_CROP_Y), (-1, 0, STREAM_CROP_X)],
)
def test_another_seed_epoch_or_stream_gives_unrelated_numbers(seed: int, epoch: int, stream: int) -> None:
    pair = torch.stack([uniform(0, 0, IDS, STREAM_CROP_X), uniform(seed, epoch, IDS, stream)])
    assert torch.corrcoef(pair)[0, 1].abs() < 0.03


def test_seed_and_epoch_do_not_add_up_to_the_same_numbers() -> None:
    assert not torch.equal(uniform(0, 1, IDS, STREAM_CROP_X), uniform(1, 0, IDS, STREAM_CROP_X))


def test_a_number_depends_on_its_sample_alone() -> None:
    shuffled = IDS[torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))]
    together = uniform(3, 4, IDS, STREAM_CROP_X)
    apart = torch.cat([uniform(3, 4, part, STREAM_CROP_X) for part in torch.tensor_split(shuffled, 26)])
    assert torch.equal(apart, together[shuffled])


def test_every_decision_has_a_stream_of_its_own() -> None:
    streams = [value for name, value in vars(counter_rng).items() if name.startswith("STREAM_")]
    streams += range(counter_rng.STREAM_RESIZED_CROP + 1, counter_rng.STREAM_RESIZED_CROP + 4 * ATTEMPTS)
    assert len(set(streams)) == len(streams)


def test_draws_of_a_stream_are_unrelated_and_the_first_is_the_default() -> None:
    first, second = (uniform(0, 0, IDS, STREAM_CROP_X, draw) for draw in (0, 1))
    assert torch.equal(first, uniform(0, 0, IDS, STREAM_CROP_X))
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 0.03
    assert not torch.equal(second, uniform(0, 0, IDS, STREAM_CROP_Y))


def test_integers_are_uniform_below_their_limit_for_each_sample_its_own() -> None:
    drawn = integers(0, 0, IDS, STREAM_CROP_X, 20)
    counts = torch.bincount(drawn, minlength=20)
    assert len(counts) == 20
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, p = 0.001
    limits = IDS % 5 + 1
    own = integers(0, 0, IDS, STREAM_CROP_X, limits)
    assert ((own >= 0) & (own < limits)).all()
    assert torch.equal(own[limits == 5], integers(0, 0, IDS[limits == 5], STREAM_CROP_X, 5))


@pytest.mark.parametrize(("seed", "epoch", "draw"), [(0, 0, 0), (-7, 12, 3), (2**63 + 5, 2**40, 1)])
def test_an_epoch_in_a_tensor_gives_the_numbers_of_the_number(seed: int, epoch: int, draw: int) -> None:
    told = torch.tensor(epoch)
    assert torch.equal(
        random_bits(seed, told, IDS, STREAM_CROP_X, draw), random_bits(seed, epoch, IDS, STREAM_CROP_X, draw)
    )
    assert told == epoch
