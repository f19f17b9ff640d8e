"""One process of the training of a language model: trains a little and saves what it saw."""

from __future__ import annotations

import os

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from lqkd.data import PythonTopics
from lqkd.losses import AttentionRelations, CosineDistance, ForwardKL
from lqkd.models import GPT
from lqkd.modules import DistillModule, Tap, Term
from lqkd.quantization import Recipe
from lqkd.regularizers import SampleWeight
from lqkd.tasks import CausalLM
from lqkd.teachers import FrozenTeacher
from tests.conftest import parameters_of


def main(output: str, processes: int, batch_size: int) -> None:
    torch.manual_seed(0)
    student = GPT(context=16, width=16, depth=1, heads=2)
    teacher = FrozenTeacher(GPT(context=16, width=24, depth=1, heads=2), precision="fp32")
    module = DistillModule(
        teacher,
        student,
        task=CausalLM(bytes_per_token=1),
        quantization=Recipe("w4a8"),
        gradient_checkpointing=True,
        distillation={
            "tokens": Term(ForwardKL(), regularizer=SampleWeight(hidden=4)),
            "hidden": Term(CosineDistance(), taps=[Tap("blocks.0", "blocks.0")]),
            "attention": Term(AttentionRelations(4), taps=[Tap("blocks.0.attention.qkv", "blocks.0.attention.qkv")]),
        },
        student_optimizer=lambda p: torch.optim.SGD(p, lr=0.05),  # Adam would divide by gradients of rounding size
        regularizer_optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    )
    data = PythonTopics(context=16, batch_size=batch_size, limit_train=96, seed=0)
    module._connect(torch.zeros(1, 16, dtype=torch.int64))  # here, since DDP draws random numbers of its own
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto",
        max_epochs=1,
        limit_val_batches=0,
        limit_test_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6
    torch.save({"parameters": parameters_of(module)}, f"{output}_{os.environ['RANK']}.pt")
