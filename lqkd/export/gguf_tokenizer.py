"""The tokenizer within a GGUF file: bytes, a copy from another file, or made from one of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError
from lqkd.models.hugging_face import located, reading, require

BYTES = 256
"""Tokens of a text of bytes."""
_PREFIX = "tokenizer."
_OTHERWISE = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
"""Settings of a tokenizer that merges pairs which llama.cpp does not have for those of these kinds."""
_DIGITS = {"type": "Digits", "individual_digits": True}


def add_tokenizer(writer: Any, vocabulary: int, source: str | None) -> None:
    """Write a tokenizer.

    Args:
        writer: of the file.
        vocabulary: tokens of the network.
        source: of the tokenizer, as :class:`~lqkd.data.TextFiles` takes it. None for the bytes, as a tokenizer of
            GPT-2's kind that merges nothing, and for none where the network has another vocabulary.

    Raises:
        UsageError: when it has more tokens than the network, or is of a kind that is not made into a file.
    """
    if source is None and vocabulary != BYTES:
        writer.add_tokenizer_model("no_vocab")
    elif source is None:
        _add_bytes(writer)
    elif "gguf_file" in (place := located(source, "tokenizer")):
        _copy(writer, vocabulary, Path(place["pretrained_model_name_or_path"]) / place["gguf_file"], source)
    else:
        _convert(writer, vocabulary, source)


def byte_tokens() -> list[str]:
    """The 256 bytes as the tokenizer of GPT-2 writes them (Radford et al. 2019, section 2.2): printable ones of Latin-1
    as themselves, the others as the characters from 256 on, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(BYTES + others.index(byte)) for byte in range(BYTES)]


def _add_bytes(writer: Any) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_tokens())
    writer.add_token_types([gguf.TokenType.NORMAL] * BYTES)
    writer.add_token_merges(["no merge"])  # of parts longer than a byte, which never occurs; a list must have an entry
    writer.add_bos_token_id(0)  # a byte that no text has; llama.cpp's own choice would be 11
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _copy(writer: Any, vocabulary: int, path: Path, source: str) -> None:
    """All that another GGUF file says about its tokenizer."""
    import gguf

    fields = {key: field for key, field in gguf.GGUFReader(path).fields.items() if key.startswith(_PREFIX)}
    tokens = len(fields[gguf.Keys.Tokenizer.LIST].contents()) if gguf.Keys.Tokenizer.LIST in fields else vocabulary
    _check_size(tokens, vocabulary, source)
    more: dict[str, list[Any]] = {  # llama.cpp wants as many as the network has
        gguf.Keys.Tokenizer.LIST: [_unused(number) for number in range(tokens, vocabulary)],
        gguf.Keys.Tokenizer.TOKEN_TYPE: [gguf.TokenType.UNUSED] * (vocabulary - tokens),
        gguf.Keys.Tokenizer.SCORES: [-1000.0] * (vocabulary - tokens),
    }
    for key, field in fields.items():
        kind, *inner = field.types
        values = field.contents()
        values = values + more[key] if key in more else values
        writer.add_key_value(key, values, kind, inner[-1] if inner else None)


def _convert(writer: Any, vocabulary: int, source: str) -> None:
    """A fast tokenizer of GPT-2's kind: pairs of bytes that are merged."""
    import gguf

    transformers = require(source, "tokenizer")
    with reading(source, "tokenizer", "tokenizer"):
        own = transformers.AutoTokenizer.from_pretrained(**located(source, "tokenizer"))
    told = json.loads(own.backend_tokenizer.to_str()) if getattr(own, "backend_tokenizer", None) is not None else {}
    pre = _pre(told.get("pre_tokenizer") or {})
    model = told.get("model", {})
    otherwise = told.get("normalizer") is not None or any(model.get(setting) for setting in _OTHERWISE)
    if model.get("type") != "BPE" or pre is None or otherwise:
        raise UsageError(
            f"tokenizer={source!r} is of a kind that is not written into a GGUF file: those of GPT-2 and SmolLM are, "
            "and any that a .gguf file has, from which it is copied"
        )
    numbers = own.get_vocab()
    _check_size(1 + max(numbers.values()), vocabulary, source)
    added = {entry["content"]: entry["special"] for entry in told.get("added_tokens", [])}
    names = [_unused(number) for number in range(vocabulary)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary
    for token, number in numbers.items():
        names[number], kinds[number] = token, gguf.TokenType.NORMAL
        if token in added:
            kinds[number] = gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or ["no merge"])
    for add, number in (
        (writer.add_bos_token_id, own.bos_token_id),
        (writer.add_eos_token_id, own.eos_token_id),
        (writer.add_unk_token_id, own.unk_token_id),
        (writer.add_pad_token_id, own.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)  # as texts were trained on
    if isinstance(own.chat_template, str):
        writer.add_chat_template(own.chat_template)


def _check_size(tokens: int, vocabulary: int, source: str) -> None:
    if tokens > vocabulary:
        raise UsageError(
            f"tokenizer={source!r} has {tokens} tokens and the network {vocabulary}: it must be that of the network"
        )


def _unused(number: int) -> str:
    """What llama.cpp calls a token that has no text: those of a network with more tokens than its tokenizer."""
    return f"[PAD{number}]"


def _pre(told: dict[str, Any]) -> str | None:
    """What llama.cpp calls the way in which a text is split before pairs are merged; None for one not known here."""
    parts = told["pretokenizers"] if told.get("type") == "Sequence" else [told]
    *before, last = parts
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not last.get("use_regex", True):
        return None
    return {"[]": "gpt-2", json.dumps([_DIGITS]): "smollm"}.get(json.dumps(before))
