"""What a training is said to take, against what PyTorch counts of a small one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.qat_step import peak_memory
from lqkd import DistillModule, FrozenTeacher, Recipe
from lqkd.losses import ForwardKL
from lqkd.models.training_size import LlamaSize, training_size
from lqkd.quantization import initialize_quantizers
from lqkd.tasks import CausalLM

SIZES = {"width": 64, "depth": 6, "heads": 4}


def llama(size: LlamaSize) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads or size.heads,
        tie_word_embeddings=size.tied,
        use_cache=False,
    )
    network: nn.Module = transformers.LlamaForCausalLM(config)
    return network


def step(module: DistillModule, tokens: torch.Tensor) -> None:
    module.losses(tokens).loss.backward()


@pytest.mark.parametrize(
    ("vocabulary", "bits", "again"),
    [(2000, "w4a32", False), (2000, "w4a32", True), (64, "w4a8", False), (64, "w4a32", True), (64, "q4_0", False)],
)
def test_memory_is_what_pytorch_counts(vocabulary: int, bits: str, again: bool) -> None:
    torch.manual_seed(0)
    size = LlamaSize(vocabulary, **SIZES, feed_forward=160, key_value_heads=2, tied=False)
    module = DistillModule(
        FrozenTeacher(llama(size), precision="fp32"),
        llama(size),
        task=CausalLM(),
        distillation_loss=ForwardKL(),
        quantization=Recipe(bits),
        gradient_checkpointing=again,
    )
    assert sum(p.numel() for p in module.teachers()[0].parameters()) == size.parameters
    tokens = torch.randint(vocabulary, (4, 96))
    initialize_quantizers(module.student.train(), tokens[:1])
    module._connect(tokens)
    step(module, tokens)  # which makes the gradients
    settings: dict[str, Any] = {"quantized_inputs": bits == "w4a8", "grids_of_blocks": bits == "q4_0"}
    told = training_size(size, size, texts=4, context=96, gradient_checkpointing=again, **settings)
    lasting = told.latents + told.gradients + told.optimizer + told.teacher
    assert peak_memory(partial(step, module, tokens)) == pytest.approx(told.total - lasting, rel=0.12)
