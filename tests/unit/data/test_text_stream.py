"""Texts that are read while a training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from lqkd import DistillModule, FrozenTeacher, Recipe
from lqkd.cli import main
from lqkd.data import TextStream
from lqkd.data.text import Tokens
from lqkd.errors import UsageError
from lqkd.losses import ForwardKL
from lqkd.models import GPT
from lqkd.runs import BestAndLast
from lqkd.tasks import CausalLM
from lqkd.teachers.cache import TeacherCache
from tests.conftest import parameters_of
from tests.hugging_face import save_tokenizer
from tests.integration.test_exact_resume import StopAt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files to train on, of 4,000 bytes together, and one for validation and testing each."""
    lines = [f"{number} times {number} is {number * number}, the lazy dog.\n" for number in range(120)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("".join(lines[:60]))
    texts = [json.dumps({"text": line.strip()}) for line in lines[60:]]
    (tmp_path / "text" / "b.jsonl").write_text("\n".join(texts))
    for name in ("val.txt", "test.txt"):
        (tmp_path / name).write_text("".join(lines[::2]))
    return tmp_path


def stream(folder: Path, **settings: Any) -> TextStream:
    files = {name: str(folder / f"{name}.txt") for name in ("val", "test")}
    return TextStream(root=str(folder / "text"), **files, **{"context": 16, "batch_size": 4, "seed": 0} | settings)


def windows(data: TextStream, epoch: int = 0, batches: int = 0, **place: Any) -> Tokens:
    data.setup()
    data.trainer = SimpleNamespace(**{"global_rank": 0, "world_size": 1} | place)
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    loader.start_at(batches)
    read = list(loader)
    return Tokens(torch.cat([b.tokens for b in read]), None, torch.cat([b.indices for b in read]))


def test_windows_are_the_texts_one_after_the_other(folder: Path) -> None:
    read = windows(stream(folder, mixed=1))
    expected = (folder / "text" / "a.txt").read_bytes() + b"\n\n"
    for line in (folder / "text" / "b.jsonl").read_text().splitlines():
        expected += json.loads(line)["text"].encode() + b"\n\n"
    found = bytes(read.tokens.flatten().tolist())
    assert found == expected[: len(found)]
    assert len(expected) - len(found) < 4 * 16
    assert torch.equal(read.indices, torch.arange(len(read.indices)))


def test_an_epoch_mixes_windows_and_goes_on_at_any_batch(folder: Path) -> None:
    first, second = (windows(stream(folder, mixed=20), epoch) for epoch in range(2))
    plain = windows(stream(folder, mixed=1))
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices, windows(stream(folder, mixed=20, seed=1)).indices)
    assert len(set(first.indices.tolist())) == len(first.indices)
    rows = dict(zip(plain.indices.tolist(), plain.tokens, strict=True))
    mixed = zip(first.indices.tolist(), first.tokens, strict=True)
    assert all(torch.equal(rows[place], window) for place, window in mixed if place in rows)
    later = windows(stream(folder, mixed=20), 0, batches=3)
    assert torch.equal(later.indices, first.indices[12:])


def test_processes_share_the_batches_of_one(folder: Path) -> None:
    one = windows(stream(folder, batch_size=8))
    shares = [windows(stream(folder), global_rank=rank, world_size=2).indices for rank in range(2)]
    assert torch.equal(torch.stack(shares, dim=1).flatten(), one.indices)


def test_tokens_are_those_of_a_tokenizer(folder: Path) -> None:
    data = stream(folder, tokenizer=str(save_tokenizer(folder / "tokenizer")), mixed=1)
    read = windows(data)
    text = data._tokenizer._tokenizer.decode(read.tokens.flatten().tolist())
    assert text.startswith("0 times 0 is 0, the lazy dog.\n1 times 1")
    assert read.tokens.numel() < len(windows(stream(folder, mixed=1)).tokens.flatten())


def test_a_resumed_training_ends_with_the_same_bits_and_other_files_are_refused(
    make_trainer: Callable[..., Trainer], folder: Path
) -> None:
    def module(**settings: Any) -> DistillModule:
        torch.manual_seed(0)
        teacher = FrozenTeacher(GPT(context=16, width=8, depth=1, heads=2), precision="fp32")
        student = GPT(context=16, width=8, depth=1, heads=2)
        return DistillModule(
            teacher, student, task=CausalLM(), quantization=Recipe("w4a32"), distillation_loss=ForwardKL(), **settings
        )

    def trainer(**settings: Any) -> Trainer:
        rare = {"val_check_interval": 5, "check_val_every_n_epoch": None, "limit_val_batches": 1}
        return make_trainer(max_steps=90, max_epochs=-1, limit_test_batches=1, **rare, **settings)

    whole, resumed = module(), module()
    trainer().fit(whole, datamodule=stream(folder))
    assert whole.trainer.current_epoch > 0  # of some 70 steps each
    saving = {"enable_checkpointing": True}
    callbacks = [BestAndLast(folder, every_n_steps=1), StopAt(1, 7)]
    with pytest.raises(InterruptedError):
        trainer(**saving, callbacks=callbacks).fit(module(), datamodule=stream(folder))
    last = {"ckpt_path": folder / "last.ckpt", "weights_only": True}
    trainer(**saving, callbacks=callbacks[:1]).fit(resumed, datamodule=stream(folder), **last)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    with pytest.raises(UsageError, match="seed=1 is not possible: the checkpoint was trained with 0"):
        trainer(**saving, callbacks=callbacks[:1]).fit(module(), datamodule=stream(folder, seed=1), **last)
    with open(folder / "text" / "a.txt", "a") as file:
        file.write("more")
    with pytest.raises(UsageError, match="has other files, or files of other sizes, than the checkpoint"):
        trainer(**saving, callbacks=callbacks[:1]).fit(module(), datamodule=stream(folder), **last)
    with pytest.raises(UsageError, match=r"teacher_cache needs .* it lacks train_indices"):
        trainer().fit(module(teacher_cache=TeacherCache(str(folder))), datamodule=stream(folder))


@pytest.mark.parametrize("name", ["mixed", "context", "tokenizer"])
def test_windows_in_another_order_than_those_of_the_checkpoint_are_refused(folder: Path, name: str) -> None:
    value = {"mixed": 5, "context": 8, "tokenizer": str(save_tokenizer(folder / "tokenizer"))}[name]
    before, same, other = stream(folder), stream(folder), stream(folder, **{name: value})
    for data in (before, same, other):
        data.setup()
    same.load_state_dict(before.state_dict())
    with pytest.raises(UsageError, match=f"{name}={value} is not possible: the checkpoint was trained with"):
        other.load_state_dict(before.state_dict())


def test_a_configuration_trains_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    network = {"class_path": "lqkd.models.GPT", "init_args": {"context": 16, "width": 8, "depth": 1, "heads": 2}}
    torch.save(GPT(**network["init_args"]).state_dict(), "teacher.pt")
    model = {
        "teacher": {"class_path": "FrozenTeacher", "init_args": {"network": network, "weights": "teacher.pt"}},
        "student": network,
        "quantization": {"bits": "w4a32"},
        "task": {"class_path": "lqkd.tasks.CausalLM", "init_args": {"bytes_per_token": 1}},
    }
    data = {"root": "text", "val": "val.txt", "test": "test.txt", "context": 16, "batch_size": 4, "mixed": 8}
    steps = {"max_epochs": -1, "max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    config = {
        "run": {"name": "stream"},
        "trainer": {"accelerator": "cpu", "limit_val_batches": 1, "limit_test_batches": 1, **steps},
        "model": {"class_path": "lqkd.modules.DistillModule", "init_args": model},
        "data": {"class_path": "lqkd.data.TextStream", "init_args": data},
    }
    Path("stream.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "stream.yaml"]) == 0
    assert Path("runs/stream/version_0/student.safetensors").exists()


def test_what_a_stream_cannot_be_is_one_sentence(folder: Path) -> None:
    with pytest.raises(TypeError, match="trust_fraction"):
        stream(folder, trust_fraction=0.2)
    with pytest.raises(UsageError, match="mixed=0 is not accepted"):
        stream(folder, mixed=0)
    (folder / "text" / "c.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(UsageError, match=r"c\.txt line 2 is not in UTF-8 \(0xff\)"):
        windows(stream(folder))
