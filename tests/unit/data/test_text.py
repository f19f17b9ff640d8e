"""Texts in windows: what is held out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lqkd.data import PythonTopics, TextFiles
from lqkd.errors import UsageError


def prose(words: int, seed: int = 0) -> str:
    numbers = torch.randint(0, 10_000, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(f"word{number}{' ' if place % 9 else chr(10)}" for place, number in enumerate(numbers))


def folder(tmp_path: Path) -> Path:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_text(prose(200, number))
    return tmp_path


def windows(data: TextFiles | PythonTopics, split: str) -> list[bytes]:
    loader = getattr(data, f"{split}_dataloader")()
    return [bytes(row.tolist()) for batch in loader for row in batch.tokens]


def test_every_window_is_text_of_its_split_and_splits_have_nothing_in_common(tmp_path: Path) -> None:
    data = TextFiles(root=str(folder(tmp_path)), context=32, batch_size=4, seed=3)
    data.setup()
    texts = b"".join(file.read_bytes() + b"\n\n" for file in sorted(tmp_path.iterdir()))
    found = {split: windows(data, split) for split in ("train", "val", "test")}
    everything = {window for split in found.values() for window in split}
    assert len(everything) == sum(map(len, found.values()))
    assert sum(window in texts for window in everything) > 0.9 * len(everything)  # but for those across two pieces
    assert 0.85 * len(texts) < 32 * len(everything) <= len(texts)
    assert 0.07 < len(found["test"]) / len(everything) < 0.14


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    def order(epoch: int, batch_size: int, seed: int = 0) -> list[int]:
        data = TextFiles(root=str(tmp_path), context=32, batch_size=batch_size, seed=seed)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[union-attr]
        return torch.cat([batch.indices for batch in loader]).tolist()

    folder(tmp_path)
    assert order(1, 4)[:80] == order(1, 8)[:80] != order(2, 8)[:80]


def test_the_test_windows_are_the_same_for_every_seed_and_validation_is_not(tmp_path: Path) -> None:
    parts = []
    for seed in (0, 1):
        data = TextFiles(root=str(folder(tmp_path)), context=32, seed=seed)
        data.setup()
        parts.append((windows(data, "test"), windows(data, "val"), data.fingerprint()))
    (test, val, key), (other_test, other_val, other_key) = parts
    assert test == other_test
    assert val != other_val
    assert key != other_key


def test_windows_of_trust_are_whole_ones_of_the_training_text_that_no_training_batch_has(tmp_path: Path) -> None:
    def made(seed: int = 3, **settings: Any) -> TextFiles:
        data = TextFiles(root=str(folder(tmp_path)), context=32, batch_size=4, seed=seed, **settings)
        data.setup()
        return data

    data, plain = made(trust_fraction=0.2, eval_batch_size=7), made()
    trusted = [bytes(row.tolist()) for batch in data.trust_batches(torch.device("cpu")) for row in batch.tokens]
    assert len(trusted) == len(data.trust_indices) == round(0.2 * len(plain.train_indices))
    assert set(trusted) <= set(windows(plain, "train"))  # which is all but the last, short batch
    assert not set(trusted) & set(windows(data, "train"))
    assert not set(trusted) & {*windows(data, "val"), *windows(data, "test")}
    assert torch.equal(torch.cat([data.train_indices, data.trust_indices]).sort().values, plain.train_indices)
    assert windows(data, "val") == windows(plain, "val")
    assert data.fingerprint() == plain.fingerprint()  # of all windows, which the places point into
    assert torch.equal(data.trust_indices, made(trust_fraction=0.2).trust_indices)
    assert not torch.equal(data.trust_indices, made(trust_fraction=0.2, seed=4).trust_indices)
    assert not list(plain.trust_batches(torch.device("cpu")))


def test_files_for_validation_and_testing_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(prose(2000))
    (tmp_path / "val.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ("grün " * 9, "blau " * 9)))
    (tmp_path / "test.md").write_text("t" * 70)
    given = {name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("val", "test")}
    data = TextFiles(root=str(tmp_path / "train.txt"), context=32, **given)
    data.setup()
    assert windows(data, "test") == [b"t" * 32] * 2
    assert b"".join(windows(data, "val")).decode().startswith("grün grün")
    assert 32 * len(windows(data, "train")) > len(prose(2000)) - 32 * 33  # all but the last, short batch


@pytest.mark.parametrize("separator", ["", " ", "\r"])
def test_text_without_ends_of_lines_is_cut_as_well(tmp_path: Path, separator: str) -> None:
    (tmp_path / "a.txt").write_bytes(prose(4000).replace("\n", " ").replace(" ", separator).encode())
    data = TextFiles(root=str(tmp_path), context=32)
    data.setup()
    counts = {split: len(windows(data, split)) for split in ("train", "val", "test")}
    assert 0.08 < counts["test"] / sum(counts.values()) < 0.13
    assert 0.07 < counts["val"] / sum(counts.values()) < 0.13


def test_a_cut_is_never_within_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\N{SNOWMAN}" * 5020, encoding="utf-8")
    data = TextFiles(root=str(tmp_path), context=3)
    data.setup()
    found = [window for split in ("train", "val", "test") for window in windows(data, split)]
    assert {window for window in found if b"\n" not in window} == {"\N{SNOWMAN}".encode()}


def test_what_val_and_test_name_copies_and_hidden_files_are_not_trained_on(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "00.txt").read_bytes())
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden " * 99)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "v.txt").write_text("v" * 64)
    (tmp_path / "t.TXT").write_text("\N{BYTE ORDER MARK}" + "t" * 64, encoding="utf-8")
    data = TextFiles(root=str(tmp_path), val=str(tmp_path / "held"), test=str(tmp_path / "t.TXT"), context=32)
    with pytest.warns(UserWarning, match=r"texts that are there already are left out \(1\)"):
        data.setup()
    assert windows(data, "val") == [b"v" * 32] * 2
    assert windows(data, "test") == [b"t" * 32] * 2
    texts = b"".join(data.texts()["train"])
    assert b"hidden" not in texts
    assert b"vv" not in texts
    assert b"tt" not in texts
    assert texts.count((tmp_path / "00.txt").read_bytes()) == 1


def test_the_text_of_python_is_split_the_same_for_every_seed_and_nothing_is_in_two_splits() -> None:
    parts = []
    for seed in (0, 1):
        data = PythonTopics(seed=seed)
        data.setup()
        parts.append((data.fingerprint(), data.texts()))
    assert parts[0][0] == parts[1][0]
    train, val, test = map(set, parts[0][1].values())
    assert len(train | val | test) == len(train) + len(val) + len(test)


def test_the_text_that_comes_with_python_is_english() -> None:
    data = PythonTopics()
    data.setup()
    text = b"".join(windows(data, "train")).decode(errors="ignore")
    assert text.count(" the ") > 1000
    (batch,) = (data.preprocess(batch, train=True, epoch=0) for batch in [next(iter(data.train_dataloader()))])
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (32, 128)


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "does not exist"),
        ({"a.csv": b"x"}, {}, "has no text"),
        ({"a.txt": b" \n"}, {}, "has no text"),
        ({"a.txt": b"caf\xe9 au lait"}, {}, "a.txt is not in UTF-8: byte 3 is 0xe9"),
        ({"a.jsonl": b'{"text": "x"}\n{"title": "y"}'}, {}, "a.jsonl line 2 is no object with a text"),
        ({"a.jsonl": b"[" * 200_000}, {}, "a.jsonl line 1 is no object with a text"),
        ({"a.txt": "text".encode("utf-16-le")}, {}, "has bytes of zero, as UTF-16 has"),
        ({"a.txt": b"x"}, {"batch_size": 2.5}, "batch_size=2.5 is not accepted"),
        ({"a.txt": b"too little\n" * 20}, {}, "context=128 is not possible: the text for"),
        ({"a.txt": b"line of text\n" * 900}, {"limit_train": 10_000}, "limit_train=10000 is not accepted"),
        ({"a.txt": b"x"}, {"context": 1}, "context=1 is not accepted"),
        ({"a.txt": b"x"}, {"test_fraction": 1.0}, "test_fraction=1.0 is not accepted"),
        ({"a.txt": b"x"}, {"trust_fraction": 1.0}, "trust_fraction=1.0 is not accepted"),
        ({"a.txt": b"line of text\n" * 900}, {"trust_fraction": 1e-3}, "trust_fraction=0.001 holds out 0 of "),
    ],
)
@pytest.mark.filterwarnings("ignore:left out")
def test_what_cannot_be_read_is_told_in_a_sentence(
    tmp_path: Path, content: dict[str, bytes] | None, settings: dict[str, Any], message: str
) -> None:
    for name, raw in (content or {}).items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError) as error:
        TextFiles(root=str(tmp_path if content else tmp_path / "missing"), **settings).setup()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out .*photo.jpg of root="):
        TextFiles(root=str(tmp_path), context=32).setup()
