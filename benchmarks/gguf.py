"""What a language model's run is worth as a GGUF file, and what is lost where its weights are rounded once more.

    python -m benchmarks.gguf runs/language_q4_0/version_0

writes the student of the run, measures it in PyTorch on the validation and test texts of Python's help, asks llama.cpp
for 1,000 tokens of the test texts, and rounds the weights behind the student's grid by the package ``gguf``, as a
conversion does that knows nothing of the grid. Needs ``pip install 'lqkd[gguf]' xllamacpp``.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lqkd import load_student
from lqkd.data import PythonTopics
from lqkd.export import from_gguf, llama_cpp, to_gguf
from lqkd.export.gguf_names import check_known, layers
from lqkd.tasks import CausalLM
from lqkd.utils.tables import print_table

ASKED = 1000


@torch.no_grad()
def nats(network: nn.Module, texts: Tensor) -> float:
    """The cross-entropy of texts (N, T) of one length, nats a token."""
    task, parts = CausalLM(), texts.split(64)
    losses = [task.loss(network(part), part) * len(part) for part in parts]
    return float(torch.stack(losses).sum()) / len(texts)


@torch.no_grad()
def rounded_again(network: nn.Module, student: nn.Module, kinds: dict[str, str]) -> nn.Module:
    """``network`` with the weights behind the grid of ``student``, rounded by the package ``gguf``."""
    import gguf

    weights = {name: layer for name, layer, _ in layers(student)}
    for name, layer, _ in layers(network):
        kind = kinds[f"{name}.weight"]
        if kind != "F32":
            of, values = gguf.GGMLQuantizationType[kind], cast(Tensor, weights[name].weight).numpy()
            rounded = gguf.quants.dequantize(gguf.quants.quantize(values, of), of)
            cast(Tensor, layer.weight).copy_(torch.from_numpy(rounded))
    return network


def main(run: str) -> None:
    """Measure, and print a table."""
    student = check_known(load_student(run))
    data = PythonTopics(seed=0)
    data.setup()
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    texts = {split: torch.cat([batch.tokens.long() for batch in loader]) for split, loader in loaders.items()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.gguf"
        kinds = to_gguf(student, file)
        held, again = from_gguf(file), rounded_again(from_gguf(file), student, kinds)
        found = llama_cpp.compare(file, held, texts["test"], ASKED)
    networks = {"as trained": student, "of the file": held, "rounded again": again}
    rows = []
    for name, network in networks.items():
        values = [nats(network, of) for of in texts.values()]
        rows.append((name, *(f"{value:.4f}" for value in values), f"{values[-1] / math.log(2):.4f}"))
    print_table(run, ("network", *(f"{split}, nats" for split in texts), "test, bits a byte"), rows)
    print(f"llama.cpp: {found}")


if __name__ == "__main__":
    main(sys.argv[1])
