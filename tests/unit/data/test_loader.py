from __future__ import annotations

from itertools import chain
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lqkd.data import Batch, TensorBatches
from lqkd.data.loader import EpochShuffle
from lqkd.errors import UsageError


def make_loader(samples: int = 50, **settings: Any) -> TensorBatches:
    """Image i is filled with i, label i is i % 7; the subset is the even positions."""
    images = torch.arange(2 * samples, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    labels = torch.arange(2 * samples) % 7
    return TensorBatches(images, labels, torch.arange(0, 2 * samples, 2), **settings)


def ids(loader: TensorBatches) -> list[list[int]]:
    return [batch.indices.tolist() for batch in loader]


def set_epoch(loader: TensorBatches, epoch: int) -> TensorBatches:
    assert isinstance(loader.sampler, EpochShuffle)
    loader.sampler.set_epoch(epoch)
    return loader


def training_ranks(world_size: int, samples: int = 50, **settings: Any) -> list[list[list[int]]]:
    return [
        ids(make_loader(samples, shuffle=True, rank=rank, world_size=world_size, **settings))
        for rank in range(world_size)
    ]


def test_images_labels_and_indices_of_a_batch_belong_together() -> None:
    for batch in make_loader(batch_size=8, shuffle=True):
        assert isinstance(batch, Batch)
        assert torch.equal(batch.images[:, 0, 0, 0].to(torch.int64), batch.indices)
        assert torch.equal(batch.labels, batch.indices % 7)


def test_an_epoch_visits_every_sample_once() -> None:
    visited = [index for batch in ids(make_loader(batch_size=8, shuffle=True)) for index in batch]
    assert sorted(visited) == list(range(0, 100, 2))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return ids(set_epoch(make_loader(batch_size=8, shuffle=True, seed=seed), epoch))

    assert order(0, 0) == order(0, 0)
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_shuffling_leaves_the_global_generator_untouched() -> None:
    before = torch.get_rng_state()
    first = ids(make_loader(batch_size=8, shuffle=True))
    torch.manual_seed(123)
    assert ids(make_loader(batch_size=8, shuffle=True)) == first
    torch.set_rng_state(before)
    ids(make_loader(batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_epoch_is_read_at_the_first_batch_and_not_when_the_iterator_is_made() -> None:
    loader = make_loader(batch_size=8, shuffle=True)
    early = iter(loader)
    set_epoch(loader, 3)
    assert next(early).indices.tolist() == ids(loader)[0]


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_together_see_the_global_batches_of_one_process(drop_last: bool) -> None:
    one = ids(make_loader(batch_size=12, shuffle=True, drop_last=drop_last))
    three = training_ranks(3, batch_size=4, drop_last=drop_last)
    if len(one[-1]) < 3:
        one.pop()
    assert [sorted(chain(*parts)) for parts in zip(*three, strict=True)] == [sorted(batch) for batch in one]


@pytest.mark.parametrize("samples", range(9, 60))
def test_every_rank_trains_on_as_many_non_empty_batches_as_len_says(samples: int) -> None:
    ranks = training_ranks(4, samples, batch_size=2)
    lengths = {len(make_loader(samples, shuffle=True, batch_size=2, rank=r, world_size=4)) for r in range(4)}
    assert lengths == {len(batches) for batches in ranks}
    assert len(lengths) == 1
    assert all(batch for batches in ranks for batch in batches)
    assert samples - len({index for batches in ranks for batch in batches for index in batch}) < 4


def test_drop_last_keeps_full_batches_only() -> None:
    assert [len(batch) for batch in ids(make_loader(batch_size=8, shuffle=True, drop_last=True))] == [8] * 6


@pytest.mark.parametrize("samples", [3, 4, 5, 10, 47, 48, 49, 50])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_evaluation_over_three_ranks_counts_every_sample_once(samples: int, batch_size: int) -> None:
    loaders = [make_loader(samples, shuffle=False, batch_size=batch_size, rank=rank, world_size=3) for rank in range(3)]
    ranks = [ids(loader) for loader in loaders]
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(0, 2 * samples, 2))
    assert {len(batches) for batches in ranks} == {len(loaders[0])}
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert min(sizes) > 0
    assert max(sizes) <= (batch_size if batch_size > 1 else 2)


def test_evaluation_of_one_process_keeps_the_order() -> None:
    batches = ids(make_loader(batch_size=7, shuffle=False))
    assert list(chain(*batches)) == list(range(0, 100, 2))
    assert len(batches) == 8


def test_too_few_samples_for_one_batch_are_refused_with_the_number_that_would_do() -> None:
    with pytest.raises(UsageError, match=r"batch_size=32 on 2 process\(es\) needs at least 64 samples .* there are 50"):
        make_loader(batch_size=32, shuffle=True, drop_last=True, world_size=2)
    with pytest.raises(UsageError, match="needs at least 3 samples"):
        make_loader(2, batch_size=32, shuffle=False, world_size=3)


class Recorder(pl.LightningModule):
    """Trains one number and notes which samples came in which epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append(batch.indices.tolist())
        return self.weight * batch.images.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(max_epochs: int, tmp_path: Any, resume: str | None = None) -> tuple[Recorder, pl.Trainer]:
    module = Recorder()
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, make_loader(batch_size=8, shuffle=True, seed=4), ckpt_path=resume, weights_only=False)
    return module, trainer


def expected_order(epoch: int) -> list[list[int]]:
    return ids(set_epoch(make_loader(batch_size=8, shuffle=True, seed=4), epoch))


def test_lightning_sets_the_epoch_of_the_order(tmp_path: Any) -> None:
    module, _ = fit(2, tmp_path)
    assert module.seen == {0: expected_order(0), 1: expected_order(1)}
    assert module.seen[0] != module.seen[1]


def test_a_resumed_run_goes_on_with_the_order_of_its_epoch(tmp_path: Any) -> None:
    _, trainer = fit(2, tmp_path)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = fit(3, tmp_path, resume=str(tmp_path / "two.ckpt"))
    assert resumed.seen == {2: expected_order(2)}
