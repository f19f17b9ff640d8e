"""Tiny language models and a tokenizer of Hugging Face, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def llama(folder: Path, **settings: Any) -> nn.Module:
    """A Llama of two blocks, saved to ``folder``; its head is its embedding."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | settings)).eval()
    network.save_pretrained(folder)
    return network


def gpt2(folder: Path) -> nn.Module:
    """A GPT-2 of two blocks, saved to ``folder``."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    network = transformers.GPT2LMHeadModel(config).eval()
    nn.init.normal_(network.transformer.h[0].mlp.c_fc.bias)
    network.save_pretrained(folder)
    return network


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of GPT-2's kind, of bytes and 44 pairs of them."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    own.train_from_iterator(["the quick brown fox jumps over the lazy dog; the dog sleeps"] * 9, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    return folder


def language_model(folder: Path) -> Path:
    """A Llama and its tokenizer in one folder, for texts of up to 256 tokens."""
    llama(folder, vocab_size=300, max_position_embeddings=256, initializer_range=0.1)
    return save_tokenizer(folder)
