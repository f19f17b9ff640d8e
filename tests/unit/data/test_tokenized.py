"""Texts as tokens of a tokenizer of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lqkd.data import TextFiles
from lqkd.data.tokenized import Tokenizer, tokenized
from lqkd.errors import UsageError
from tests.hugging_face import save_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def text(folder: Path) -> Path:
    file = folder / "text.txt"
    file.write_text("\n".join(f"the quick brown fox {number} jumps over the dog; Café" for number in range(300)))
    return file


def test_windows_are_the_tokens_of_the_text(tokenizer: str, tmp_path: Path) -> None:
    file = text(tmp_path)
    data = TextFiles(root=str(file), test=str(file), context=16, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="has no text, beside what val and test name"):
        data.setup()
    held_out = tmp_path / "held_out.txt"
    held_out.write_bytes(file.read_bytes())
    data = TextFiles(root=str(file), test=str(held_out), context=16, tokenizer=tokenizer)
    data.setup()
    seen = torch.cat([data.preprocess(batch, train=False, epoch=0).tokens for batch in data.test_dataloader()])
    backend = transformers.AutoTokenizer.from_pretrained(tokenizer)
    expected = backend(file.read_text() + "\n\n")["input_ids"]
    assert seen.flatten().tolist() == expected[: seen.numel()]
    assert len(expected) - seen.numel() < 16
    assert data.num_classes == len(backend)


def test_a_text_is_tokenized_once(tokenizer: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, own = [b"the quick brown fox"], Tokenizer(tokenizer)
    first = tokenized(texts, own).clone()  # not what is mapped from the file that is damaged below
    monkeypatch.setattr(own, "numbers", lambda texts: pytest.fail("tokenized again"))
    assert torch.equal(tokenized(texts, own), first)
    next(cache.iterdir()).write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setenv("LQKD_CACHE", str(cache.parent))
    assert torch.equal(tokenized(texts, own), first)


def test_slow_tokenizers_with_one_vocabulary_and_other_merges_have_files_of_their_own(tmp_path: Path) -> None:
    own = []
    for name, merge in (("a", "t h"), ("b", "h e")):
        folder = tmp_path / name
        folder.mkdir()
        tokens = ["<unk>", "t", "h", "e", "t@@", "h@@", "th@@", "he", "e</w>"]
        (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text(f"#version\n{merge}\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
        own += [Tokenizer(str(folder)), Tokenizer(str(folder))]
    assert [tokenizer.fingerprint() == own[0].fingerprint() for tokenizer in own] == [True, True, False, False]


def test_where_the_cache_cannot_be_written_there_are_tokens_nevertheless(tokenizer: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("no folder")
    with pytest.warns(UserWarning, match="tokenized again in every run"):
        assert len(tokenized([b"the dog"], Tokenizer(tokenizer))) > 1


def test_what_is_no_tokenizer_is_said_in_a_sentence(tmp_path: Path) -> None:
    for source, message in (
        (str(tmp_path), "has no tokenizer that can be read"),
        ("nothing.gguf", "tokenizer='nothing.gguf' does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            TextFiles(root=str(text(tmp_path)), tokenizer=source).setup()


def test_too_short_a_text_is_counted_in_tokens(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"context=5000 is not possible: the text for \w+ has \d+ tokens"):
        TextFiles(root=str(text(tmp_path)), tokenizer=tokenizer, context=5000).setup()
