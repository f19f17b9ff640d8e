"""Records on disk, the answers in them and what they are known by."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.losses import ForwardKL, JensenShannon, ReverseKL
from lqkd.losses.taps import Seen
from lqkd.losses.token_rows import RowDivergence
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import OpenCache, TeacherCache
from lqkd.teachers.cache.codec import Codec, projection, shapes_of
from lqkd.teachers.cache.keys import teacher_key
from lqkd.teachers.cache.records import Records, RecordStore

LAYOUT = np.dtype([("value", "<f4", (16,))])
SAMPLES = 2000


def records_of(store: RecordStore, rows: np.ndarray) -> Records:
    """Records that tell which row they are for."""
    records = np.zeros(len(rows), store.layout)
    records["value"] = rows[:, None] + np.arange(16) / 16
    return records


def write_share(folder: str, rank: int, ranks: int, again: bool = False) -> None:
    store = RecordStore(Path(folder), SAMPLES, LAYOUT)
    while True:
        for start in range(rank, SAMPLES, 20 * ranks):
            rows = np.arange(start, min(start + 20 * ranks, SAMPLES), ranks)
            store.write(0, rows, records_of(store, rows))
        if not again:
            return


def test_what_was_not_written_is_absent_and_what_was_is_returned_in_any_order(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, SAMPLES, LAYOUT)
    rows = np.array([7, 3, 1999])
    assert not store.read(0, rows)[1].any()
    store.write(0, rows, records_of(store, rows))
    wanted = np.array([1999, 4, 3, 7])
    found, present = store.read(0, wanted)
    assert present.tolist() == [True, False, True, True]
    assert np.array_equal(found["value"][present], records_of(store, wanted[present])["value"])
    assert not store.read(1, rows)[1].any()


def test_several_processes_write_and_read_one_file_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_share, args=(str(tmp_path), rank, 3)) for rank in range(3)]
    for writer in writers:
        writer.start()
    store, everything = RecordStore(tmp_path, SAMPLES, LAYOUT), np.arange(SAMPLES)
    while any(writer.is_alive() for writer in writers):
        found, present = store.read(0, everything)
        assert np.array_equal(found["value"][present], records_of(store, everything[present])["value"])
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert store.read(0, everything)[1].all()


def test_a_writer_that_is_killed_leaves_only_whole_records(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    everything = np.arange(SAMPLES)
    for attempt in range(5):
        writer = context.Process(target=write_share, args=(str(tmp_path), attempt, 7, True))
        writer.start()
        time.sleep(0.02 * (attempt + 1))
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        found, present = RecordStore(tmp_path, SAMPLES, LAYOUT).read(0, everything)
        assert np.array_equal(
            found["value"][present], records_of(RecordStore(tmp_path, 1, LAYOUT), everything[present])["value"]
        )


@pytest.mark.parametrize("byte", [0, 3, 4, 40, 67])
def test_a_record_of_which_one_byte_changed_is_absent(tmp_path: Path, byte: int) -> None:
    store, rows = RecordStore(tmp_path, SAMPLES, LAYOUT), np.array([4, 5, 6])
    store.write(0, rows, records_of(store, rows))
    path = tmp_path / "epoch_00000.records"
    content = bytearray(path.read_bytes())
    content[5 * store.layout.itemsize + byte] ^= 0x10
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged records"):
        present = RecordStore(tmp_path, SAMPLES, LAYOUT).read(0, rows)[1]
    assert present.tolist() == [True, False, True]


def test_holes_take_no_room(tmp_path: Path) -> None:
    store = RecordStore(tmp_path, 10_000_000, LAYOUT)
    store.write(0, np.array([9_999_999]), records_of(store, np.array([3])))
    assert (tmp_path / "epoch_00000.records").stat().st_size == 680_000_000
    assert store.bytes_on_disk() < 100_000


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_answers_come_back_as_they_were_to_the_precision_of_storage(dtype: str) -> None:
    """Of two teachers, one with logits for every pixel and one with a tap."""
    images = torch.randn(6, 1, 8, 8)
    answers = {
        "a": Seen(torch.randn(6, 3, 8, 8), {}),
        "b": Seen(torch.randn(6, 10), {"layer": torch.randn(6, 4, 3, 3)}),
    }
    codec = Codec(("a", "b"), shapes_of(answers), dtype, None)
    records = np.zeros(6, codec.layout)
    codec.encode(records, answers, projection(images))
    found = codec.decode(records, torch.device("cpu"))
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype == "float32" else {"rtol": 1e-3, "atol": 1e-4}
    assert [*found] == ["a", "b"]
    for name, seen in answers.items():
        torch.testing.assert_close(found[name].output, seen.output, **tolerance)
        torch.testing.assert_close(found[name].features, seen.features, **tolerance)


def test_top_k_keeps_the_largest_probabilities_and_the_mass_of_the_rest() -> None:
    codec, logits = Codec(("a",), [[("output", (100,))]], "float32", 5), 3 * torch.randn(7, 100)
    records = np.zeros(7, codec.layout)
    codec.encode(records, {"a": Seen(logits, {})}, torch.zeros(7))
    found = codec.decode(records, torch.device("cpu"))["a"].output
    expected, got = logits.softmax(1), found.softmax(1)
    kept = logits.topk(5).indices
    torch.testing.assert_close(got.gather(1, kept), expected.gather(1, kept))
    torch.testing.assert_close(found.gather(1, kept), logits.gather(1, kept))
    rest = got.scatter(1, kept, 0.0)
    torch.testing.assert_close(rest.sum(1), expected.scatter(1, kept, 0.0).sum(1))
    assert all(len(row[row > 0].unique()) == 1 for row in rest)


@pytest.mark.parametrize("loss", [ForwardKL(top_k=5), ReverseKL(top_k=5), JensenShannon(top_k=5)])
def test_top_k_words_of_every_token_give_a_divergence_of_as_many_the_same(loss: RowDivergence) -> None:
    logits, student = 3 * torch.randn(2, 7, 100), torch.randn(2, 7, 100)
    codec = Codec(("a",), shapes_of({"a": Seen(logits, {})}), "float32", 5)
    records = np.zeros(2, codec.layout)
    codec.encode(records, {"a": Seen(logits, {})}, torch.zeros(2))
    assert records.nbytes == 2 * (4 + 7 * (5 * 2 + 6 * 4))
    found = codec.decode(records, torch.device("cpu"))["a"].output
    live, cached = (loss(each.flatten(0, 1), student.flatten(0, 1)) for each in (logits, found))
    torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-6)


def test_float16_refuses_what_it_cannot_hold() -> None:
    codec = Codec(("a",), [[("output", (3,))]], "float16", None)
    with pytest.raises(UsageError, match="exceed 65504: use float32"):
        codec.encode(np.zeros(1, codec.layout), {"a": Seen(torch.tensor([[1e5, 0, 0]]), {})}, torch.zeros(1))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.flip(-1), lambda x: x.roll(1, -1), lambda x: x.roll(1, -2), lambda x: x * 1.05, lambda x: x + 0.05],
)
def test_a_projection_tells_a_changed_image(change: Any) -> None:
    images = torch.rand(64, 3, 32, 32)
    difference = (projection(change(images)) - projection(images)).abs()
    assert (difference > 0.01 + 1e-4 * projection(images).abs()).float().mean() > 0.95
    torch.testing.assert_close(projection(images)[3:5], projection(images[3:5]), rtol=0, atol=1e-3)


class Scaled(nn.Module):
    """A network of which ``repr`` does not tell all; noise is that of a network that draws numbers."""

    def __init__(self, scale: float = 1.0, pool: str = "avg", noise: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 10)
        nn.init.uniform_(self.linear.weight, generator=torch.Generator().manual_seed(3))
        nn.init.zeros_(self.linear.bias)
        self.scale, self.pool, self.noise = scale, pool, noise

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0]
        pooled = rows.mean(1) if self.pool == "avg" else rows[:, 0]
        return self.scale * self.linear(pooled + self.noise * torch.randn(8))


class Negated(Scaled):
    def forward(self, images: Tensor) -> Tensor:
        return -super().forward(images)


def key_of(network: nn.Module) -> dict[str, Any]:
    return teacher_key(FrozenTeacher(network), False, (1, 8, 8))


def test_a_key_tells_networks_that_differ_in_what_their_repr_does_not_say() -> None:
    networks = [Scaled(), Scaled(scale=1.02), Scaled(scale=2), Scaled(pool="token")]
    assert len({str(network) for network in networks}) == 1
    assert len({str(key_of(network)) for network in networks}) == len(networks)
    negated = Negated()
    Negated.__name__ = Negated.__qualname__ = "Scaled"
    assert str(negated) == str(networks[0])
    assert key_of(negated)["answers"] != key_of(networks[0])["answers"]


def test_a_key_tells_classes_of_one_name_in_two_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(Scaled())
    monkeypatch.setattr(Scaled, "__module__", "elsewhere")
    assert key_of(Scaled()) != before


def test_a_key_does_not_depend_on_threads_rounding_or_random_numbers_and_leaves_them_alone() -> None:
    network = Scaled(noise=0.1)
    before = key_of(network)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert key_of(network) == before
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert key_of(network) == before
    network.scale *= 1 + 1e-6
    assert key_of(network) == before


def opened(tmp_path: Path, **settings: Any) -> OpenCache:
    key: dict[str, Any] = {"data": {"augmentation": {"seed": 0}}}
    return TeacherCache(str(tmp_path), dtype="float32", **settings).open(
        key, torch.arange(0, 40, 2), 3, ["a"], lambda: [[("output", (10,))]]
    )


def test_a_full_disk_ends_the_writing_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, images, logits = opened(tmp_path), torch.randn(5, 1, 8, 8), torch.randn(5, 10)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ask() -> dict[str, Seen]:
        return {"a": Seen(logits, {})}

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.warns(UserWarning, match="goes on live.*No space left"):
        assert torch.equal(cache.answers(images, torch.arange(0, 10, 2), 0, ask)["a"].output, logits)
    assert torch.equal(cache.answers(images, torch.arange(0, 10, 2), 0, ask)["a"].output, logits)
    assert cache.asked == 2


def test_a_batch_that_is_known_in_part_is_asked_for_and_completed(tmp_path: Path) -> None:
    cache, images, logits = opened(tmp_path), torch.randn(6, 1, 8, 8), torch.randn(6, 10)
    cache.answers(images[:4], torch.arange(0, 8, 2), 1, lambda: {"a": Seen(logits[:4], {})})
    other = opened(tmp_path)
    found = other.answers(images, torch.arange(0, 12, 2), 1, lambda: {"a": Seen(logits + 1, {})})["a"].output
    assert torch.equal(found, torch.cat([logits[:4], logits[4:] + 1]))  # what is there stays
    assert other.asked == 1
    again = other.answers(images.flip(0), torch.arange(10, -1, -2), 1, lambda: pytest.fail("asked"))["a"].output
    assert torch.equal(again, found.flip(0))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"teacher_cache\.folder=.*cannot be written"):
        opened(tmp_path / "file" / "cache")


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100}))
    with pytest.raises(UsageError, match=r"2\.8 KiB.*100 bytes left"):
        opened(tmp_path)
