"""What a checkpoint needs beyond Lightning's own so that a resumed training is bit for bit the uninterrupted one."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch, sized_len
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lqkd.callbacks.progress import below_the_bar
from lqkd.errors import UsageError

KEY = "resume"
"""Where a checkpoint keeps it."""
SPLIT = "split"
"""Where a checkpoint keeps :func:`split`."""
LIMITS = "limits"
"""Where a checkpoint of a run keeps how much training its settings asked for when it was saved."""


def collect(trainer: Trainer, checkpoint: dict[str, Any], *, rows: int, finished: bool) -> None:
    """Complete a checkpoint that is saved between two batches, or when training has ended.

    Every process must call this together. Lightning's counters, which are in the middle of fetching a batch, are set
    back to the end of the last one.

    Args:
        trainer: the trainer that saves.
        checkpoint: what Lightning has put together; changed in place.
        rows: length of the table of metrics.
        finished: whether training has ended by itself.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["ready"] = counts["started"] = counts["processed"] = counts["completed"]
    if finished:  # an epoch that ended early is not gone on with: more training starts with a new one
        batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
    own: dict[str, Any] = {"random": random_state()}
    if trainer.world_size > 1:
        own["callbacks"] = checkpoint["callbacks"]  # those of the other processes have seen other samples
    checkpoint[KEY] = {
        "epoch": trainer.current_epoch,
        "batches": batches["current"]["completed"],
        "steps": trainer.global_step,
        "logged": loops["epoch_loop.state_dict"]["_batches_that_stepped"],
        "global_batch": _global_batch(trainer),
        "rows": rows,
        "finished": finished,
        "processes": _gather(own) if trainer.world_size > 1 else [own],
    }


def claim_own(trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """What :func:`collect` has put into ``checkpoint``, once this process has been given its own part of it.

    Raises:
        UsageError: when the checkpoint was saved within an epoch that these processes cannot go on with.
    """
    state: dict[str, Any] | None = checkpoint.get(KEY)
    if state is None:
        return None
    before, now = state["global_batch"], _global_batch(trainer)
    if state["batches"] and before != now:
        raise UsageError(
            f"the checkpoint was saved within an epoch with a global batch of {before} images, which is now {now}: "
            "keep trainer.devices and the data's batch_size"
        )
    if len(state["processes"]) != trainer.world_size:
        if state["batches"]:
            raise UsageError(
                f"the checkpoint was saved within an epoch on {len(state['processes'])} process(es), of which there are"
                f" now {trainer.world_size}: keep trainer.devices"
            )
        rank_zero_warn("resuming on another number of processes: random numbers are not those of the uninterrupted run")
        return state | {"processes": None}
    own = state["processes"][trainer.global_rank]
    checkpoint["callbacks"] = own.get("callbacks", checkpoint["callbacks"])
    return state | {"processes": [own]}


def split(trainer: Trainer) -> str | None:
    """Hash of which images are trained on and which validated; None where the DataModule does not tell."""
    data = getattr(trainer, "datamodule", None)
    parts = [getattr(data, name, None) for name in ("train_indices", "val_indices")]
    if any(part is None for part in parts):
        return None
    return hashlib.sha256(b"\0".join(np.asarray(part, dtype=np.int64).tobytes() for part in parts)).hexdigest()


def check_goes_on(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Check that a training can go on from ``checkpoint``, whichever folder it goes on in.

    Raises:
        UsageError: when images that were trained on might be validated now, or when the training is to end before the
            place that the checkpoint has reached.
    """
    before = checkpoint.get(SPLIT)
    if before is not None and before != split(trainer):
        raise UsageError(
            "the checkpoint was trained on another split into training and validation images, so that images it has "
            "seen could be validated: keep seed_everything and the data's root, seed, validation_fraction, "
            "limit_train and trust_fraction"
        )
    within = bool(checkpoint.get(KEY, {}).get("batches"))
    for name, limit, reached in (
        ("max_epochs", trainer.max_epochs, checkpoint["epoch"] + within),
        ("max_steps", trainer.max_steps, checkpoint["global_step"]),
    ):
        if limit is not None and 0 <= limit < reached:
            raise UsageError(
                f"trainer.{name}={limit} is not possible: the checkpoint has reached {reached}, give at least as many"
            )


def fast_forward(trainer: Trainer, batches: int) -> None:
    """Let the training loader go on after ``batches`` of its epoch, 0 or more; before its first step."""
    loader: Any = trainer.train_dataloader
    starts = hasattr(loader, "start_at")
    if starts and sized_len(loader) is None:  # of which Lightning has taken the first batch of epoch 0 by now
        epochs: Any = trainer.fit_loop.epoch_progress.current
        _set_sampler_epoch(loader, epochs.processed)
        loader.start_at(batches)
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # it is there once the data are set up
        return
    if not batches:
        return
    if starts:
        loader.start_at(batches)
        return
    rank_zero_warn(
        f"{type(loader).__name__} has no start_at(batch): the first {batches} batches of the epoch are read and left "
        "out, which is exact only when its order depends on nothing but the epoch"
    )
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    for _ in below_the_bar(trainer, range(batches), "leaving out batches", batches):
        next(fetcher)
    fetcher.fetched = 0  # the loop adds what it knows to be done


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set random numbers and Lightning's count of logged steps; when the first batch is about to start."""
    if state["processes"]:
        set_random_state(state["processes"][0]["random"])
    # Lightning counts one too many where a resumed epoch starts at a batch after which validation might run.
    trainer.fit_loop.epoch_loop._batches_that_stepped = state["logged"]


def random_state() -> dict[str, Any]:
    """Of all generators in use, as plain types and tensors that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo whatever was drawn since :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def between_steps(trainer: Trainer, module: LightningModule, batch_idx: int) -> bool:
    """Whether no gradient is being accumulated when batch ``batch_idx`` is about to start."""
    accumulated: int = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    return batch_idx % accumulated == 0


def all_finite(module: LightningModule) -> bool:
    """Whether no parameter is NaN or infinite; waits for the device."""
    sums: list[Tensor] = [parameter.detach().float().sum() for parameter in module.parameters()]
    return not sums or bool(torch.stack(sums).isfinite().all())


def _global_batch(trainer: Trainer) -> int | None:
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    return size * trainer.world_size if isinstance(size, int) else None


def _gather(own: dict[str, Any]) -> list[dict[str, Any]]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered
