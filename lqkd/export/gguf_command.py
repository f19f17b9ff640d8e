"""A run's language model as a GGUF file: written, proven and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lqkd.errors import UsageError, first_line
from lqkd.export import llama_cpp
from lqkd.export.card import Summary, rejected
from lqkd.export.gguf_file import GGUF, from_gguf, gguf_student, to_gguf
from lqkd.export.gguf_names import vocabulary
from lqkd.export.gguf_tokenizer import BYTES
from lqkd.export.language_card import measured_rows, size_row, tell
from lqkd.export.language_proof import compared, keep_proven
from lqkd.export.parity import Parity
from lqkd.models.calls import Inputs
from lqkd.models.gpt import GPTBlock
from lqkd.quantization import size
from lqkd.tasks import Task
from lqkd.tasks.values import change_shown
from lqkd.utils.escaping import markdown

TEXTS = 8
"""Samples on which llama.cpp is asked."""


def write_gguf(
    student: nn.Module,
    path: Path,
    inputs: Inputs,
    test: Iterable[Any],
    split: str,
    task: Task,
    about: dict[str, Any],
    tokenizer: str | None = None,
) -> None:
    """Write the file, compare what it says with the student's own words, and print and write what came of it.

    The network is built once more out of nothing but the file, and computes the logits of ``inputs`` and the task's
    metric on all of ``test``. Where the package ``xllamacpp`` is installed, llama.cpp runs the file.

    Args:
        student: as it was trained.
        path: of the file; one that fails the comparison is kept under another name.
        inputs: texts (B, T) of tokens.
        test: batches of the task.
        split: what they are of.
        task: says how good an answer is.
        about: what the file shall say about itself.
        tokenizer: see :func:`~lqkd.export.to_gguf`.

    Raises:
        UsageError: when no file can be made of the student.
        ParityError: when the file does not hold what was trained.
    """
    served = as_served(student)
    unproven = rejected(path)
    kinds = to_gguf(student, unproven, about=about, tokenizer=tokenizer)
    parity = prove(unproven, served, student, inputs, test, task)
    parity.split = split
    keep_proven(unproven, path, parity)
    weights = size(student)
    summary = Summary(path, path.stat().st_size, weights.packed_bytes, weights.float_bytes, None)
    rows = _rows(summary, kinds, parity, student)
    tokens = inputs.alone()
    if not llama_cpp.available():
        rows.append(("llama.cpp", f"not asked: pip install {llama_cpp.RUNTIME}"))
    elif tokens is None or (tokenizer is None and vocabulary(served) != BYTES):
        rows.append(("llama.cpp", "not asked: the file has no tokenizer, since its tokens are no bytes"))
    else:
        rows.append(("llama.cpp", _asked(path, served, tokens[:TEXTS])))
    types = [f"| {markdown(name)} | {kind} |" for name, kind in kinds.items()]
    more = ["## Tensors", "", "| tensor | type |", "|---|---|", *types]
    tell(summary, rows, student, inputs, parity, about, format=GGUF, runtime="llama.cpp", more=more)


def as_served(student: nn.Module) -> nn.Module:
    """The student as llama.cpp computes it, but for activations: with GELU by tanh, on the CPU and in eval mode.

    Raises:
        UsageError: when no file can be made of it.
    """
    served = gguf_student(student)
    for block in served.modules():
        if isinstance(block, GPTBlock):
            block.gelu = "tanh"
    return served


def tokenizer_of(data: Any, network: nn.Module) -> str | None:
    """The setting ``tokenizer`` of a data module, where it is one that :func:`~lqkd.export.to_gguf` takes.

    A warning says it of another, such as an object: the file has none then.

    Args:
        data: of the training.
        network: what was trained.

    Raises:
        UsageError: for another, when the network has as many tokens as there are bytes, whose file would say bytes.
    """
    found = getattr(data, "tokenizer", None)
    if found is None or isinstance(found, str):
        return found
    told = f"the tokenizer of {type(data).__name__} is of type {type(found).__name__}"
    helps = "where it is a folder, a .gguf file or a name, as lqkd.data.TextFiles has it, the file gets it"
    if vocabulary(network) == BYTES:
        raise UsageError(f"{told}, and the file would say that its {BYTES} tokens are bytes: {helps}")
    rank_zero_warn(f"{told}, of which no file is made: the GGUF file has none, and takes numbers of tokens; {helps}")
    return None


def prove(
    path: Path,
    served: nn.Module,
    student: nn.Module,
    inputs: Inputs,
    test: Iterable[Any] = (),
    task: Task | None = None,
) -> Parity:
    """Compare the network that is read from a file with the student, to the last bit of its logits.

    Args:
        path: the file.
        served: the student as :func:`as_served` gives it.
        student: as it was trained.
        inputs: texts.
        test: batches of the task, on which all three are measured.
        task: None for the classification of images.
    """
    return compared(from_gguf(path), served, student, inputs, test, task)


def _asked(path: Path, served: nn.Module, tokens: Tensor) -> str:
    try:
        return str(llama_cpp.compare(path, served, tokens))
    except Exception as error:  # of any type: the file is proven without it
        return f"not asked: {first_line(error)}"


def _rows(summary: Summary, kinds: dict[str, str], parity: Parity, student: nn.Module) -> list[tuple[str, str]]:
    metric, counts = parity.metric or "", Counter(kinds.values())
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    rows = [
        ("format", GGUF),
        size_row(summary),
        ("tensors", f"{types}; each decodes to the bits that were trained"),
        *measured_rows(parity),
    ]
    approximated = all(block.gelu == "tanh" for block in student.modules() if isinstance(block, GPTBlock))
    if not approximated and parity.exported is not None and parity.trained is not None:
        change = change_shown(metric, parity.exported - parity.trained)
        rows.append(("GELU", f"by tanh in llama.cpp: {change}; GPT(gelu='tanh') trains what is computed"))
    if parity.agreement_with_trained is not None:
        rows.append((f"same {parity.answer} as trained", f"{parity.agreement_with_trained:.3%}"))
    return rows
