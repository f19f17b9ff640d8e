"""What a person sees: a bar on a terminal, lines in a file."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from lqkd.callbacks.progress import ProgressBar, below_the_bar

from .dummy import BATCHES, Dummy


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("epoch")]


def test_without_a_terminal_there_is_one_line_per_epoch(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[ProgressBar()], logger=False).fit(Dummy())
    mean = sum(range(BATCHES)) / BATCHES
    printed = capsys.readouterr().out
    expected = rf"task {mean:.3f}  distill 0\.500  val acc 0\.750%s  \(\d+\.\d s\)"
    assert len(_lines(printed)) == 2
    for number, line, mark in zip((1, 2), _lines(printed), (" best", ""), strict=True):  # as good is no better
        assert re.fullmatch(rf"epoch {number}/2  {expected % mark}", line)
    assert "━" not in printed


def test_an_epoch_without_validation_shows_no_accuracy(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(
        max_epochs=3,
        check_val_every_n_epoch=2,
        enable_progress_bar=True,
        callbacks=[ProgressBar()],
        logger=False,
        num_sanity_val_steps=1,
    )
    trainer.fit(Dummy())
    assert ["val acc" in line for line in _lines(capsys.readouterr().out)] == [False, True, False]


def test_a_module_that_does_not_distil_shows_its_loss(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    class Classifier(Dummy):
        def log_dict(self, dictionary: dict[str, float], **arguments: object) -> None:  # type: ignore[override]
            self.log("train/loss", dictionary["train/loss"], batch_size=2)

    make_trainer(enable_progress_bar=True, callbacks=[ProgressBar()], logger=False).fit(Classifier(weights=None))
    assert "epoch 1/1  loss 1.000  val acc" in capsys.readouterr().out


def test_other_processes_than_the_first_print_nothing(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    make_trainer(enable_progress_bar=True, callbacks=[ProgressBar()], logger=False).fit(Dummy())
    assert not _lines(capsys.readouterr().out)


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """Calls something whose standard output is a terminal, and returns what that has got, without its control codes."""

    def shown(call: Callable[[], object]) -> str:
        master, slave = os.openpty()
        received: list[bytes] = []

        def listen() -> None:
            try:
                while chunk := os.read(master, 4096):
                    received.append(chunk)
            except OSError:  # the other end is closed
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        with monkeypatch.context() as patch, os.fdopen(slave, "w") as terminal:
            patch.setenv("COLUMNS", "200")
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, "stdout", terminal)
            call()
        listener.join()
        os.close(master)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(received).decode())

    return shown


def test_a_terminal_gets_the_bar_with_the_metrics(
    make_trainer: Callable[..., Trainer], on_a_terminal: Callable[[Callable[[], object]], str]
) -> None:
    def train() -> None:
        make_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[ProgressBar()], logger=False).fit(Dummy())

    shown = on_a_terminal(train)
    assert "━" in shown
    assert re.search(r"task: 3\.000 distill: 0\.500 val/acc: 0\.750", shown)


def test_a_terminal_keeps_a_row_of_every_epoch(
    make_trainer: Callable[..., Trainer], on_a_terminal: Callable[[Callable[[], object]], str]
) -> None:
    def train() -> None:
        make_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[ProgressBar()], logger=False).fit(Dummy())

    rows = re.findall(r"^\s*(epoch \d/2  task 1\.500 .*?) *$", on_a_terminal(train).replace("\r", "\n"), re.MULTILINE)
    assert [row.partition("  ")[0] for row in rows] == ["epoch 1/2", "epoch 2/2"]


def test_nothing_is_drawn_while_the_row_of_an_epoch_is_printed(
    make_trainer: Callable[..., Trainer],
    on_a_terminal: Callable[[Callable[[], object]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread that draws the bar would move the cursor, and the row would be overwritten now and then."""
    printed, bars, free = Console.print, list[ProgressBar](), list[bool]()

    def look(console: Console, *objects: object, **arguments: object) -> None:
        if objects and str(objects[0]).startswith("epoch"):
            live = bars[0].progress.live  # type: ignore[union-attr]

            def try_to_draw() -> None:
                free.append(live._lock.acquire(blocking=False))
                if free[-1]:
                    live._lock.release()

            other = threading.Thread(target=try_to_draw)
            other.start()
            other.join()
        printed(console, *objects, **arguments)  # type: ignore[arg-type]

    def train() -> None:
        bars.append(ProgressBar())
        make_trainer(max_epochs=2, enable_progress_bar=True, callbacks=bars, logger=False).fit(Dummy())

    monkeypatch.setattr(Console, "print", look)
    on_a_terminal(train)
    assert free == [False, False]


def test_work_between_batches_has_a_bar_below_that_of_the_training(
    make_trainer: Callable[..., Trainer], on_a_terminal: Callable[[Callable[[], object]], str]
) -> None:
    class Works(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            done.extend(below_the_bar(trainer, iter("abc"), "looking for letters", 3))

    done: list[str] = []
    arguments = {"max_epochs": 2, "enable_progress_bar": True, "logger": False}
    shown = on_a_terminal(
        lambda: make_trainer(callbacks=[ProgressBar(), Works()], **arguments).fit(Dummy())  # type: ignore[arg-type]
    )
    assert done == [*"abcabc"]
    rows = re.findall(r"looking for letters\W+(\d)/3", shown)
    assert [number for number in "012" if number in rows] == ["0", "1", "2"]
    assert "looking for letters" not in shown.rpartition("epoch 2/2")[2]


def test_work_between_batches_has_no_bar_without_a_terminal(
    make_trainer: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(callbacks=[ProgressBar()], enable_progress_bar=True, logger=False)
    assert list(below_the_bar(trainer, "abc", "looking for letters", 3)) == [*"abc"]
    assert "looking" not in "".join(capsys.readouterr())


def test_metrics_are_not_read_from_the_device_in_every_batch(make_trainer: Callable[..., Trainer]) -> None:
    class Often(ProgressBar):
        def on_train_batch_end(self, trainer: Trainer, *arguments: object) -> None:  # type: ignore[override]
            super().on_train_batch_end(trainer, *arguments)  # type: ignore[arg-type]
            read.append(id(self.get_metrics(trainer, trainer.lightning_module)))

    read: list[int] = []
    bar = Often()
    bar._next_read = float("inf")
    make_trainer(enable_progress_bar=True, callbacks=[bar], logger=False).fit(Dummy())
    assert len(set(read[:-1])) == 1  # only the epoch's last batch reads anew
    assert read[-1] != read[0]
