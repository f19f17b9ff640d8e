"""What a language model writes after a text, from a run or an exported file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqkd.errors import UsageError, first_line
from lqkd.export.predict import task_of
from lqkd.models.generation import check_prompt, generate_tokens, sizes_of
from lqkd.runs.student import describe_student, load_student
from lqkd.tasks import CausalLM, MaskedLM
from lqkd.utils.schema import EXPORTED_FILE, check


@dataclass(frozen=True)
class Writer:
    """A language model with what makes tokens of texts.

    Attributes:
        network: tokens (1, T) to logits.
        text: a :class:`~lqkd.data.tokenized.Tokenizer`, or the bytes.
        known: the number of tokens that a text can have.
        source: the file that it is from, for messages.
    """

    network: Any
    text: Any
    known: int
    source: str

    def checked(self, prompt: str) -> list[int]:
        """The tokens of ``prompt``.

        Raises:
            UsageError: when there are none, more than the network takes, or some that it does not know.
        """
        if not prompt:
            raise UsageError("--prompt '' is empty: give a text to continue")
        tokens: list[int] = self.text.encode(prompt)
        check_prompt(self.network, tokens)
        return tokens

    def continued(self, prompt: str, most: int, **settings: Any) -> str:
        """What comes after ``prompt``; settings as of :func:`~lqkd.models.generation.generate_tokens`.

        Raises:
            UsageError: as there.
        """
        tokens = self.checked(prompt)
        found = generate_tokens(self.network, tokens, most, known=self.known, end=self.text.end, **settings)
        before = self.text.decode(tokens)
        return str(self.text.decode([*tokens, *found])[len(before) :])


def continue_texts(
    run: str | Path,
    prompts: Sequence[str],
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    allow_code: bool = False,
) -> Iterator[dict[str, str]]:
    """What a language model writes after texts, one after the other.

    Args:
        run: run folder, ``student.safetensors``, or a file that export wrote (.gguf or .nbits.onnx).
        prompts: texts.
        tokens: to write, at most, >= 1.
        temperature: 0 for the most probable token each time; above 0 tokens are drawn.
        top_k: draw from so many of the most probable; None for all.
        seed: of what is drawn, the same for every text.
        allow_code: whether classes of a folder that somebody else made may be run.

    Returns:
        For each text ``prompt`` and ``continuation``.

    Raises:
        UsageError: after a user's mistake about the run, the file, a text or a setting.
    """
    writer = load_writer(run, allow_code)
    for prompt in prompts:
        writer.checked(prompt)
    for prompt in prompts:
        found = writer.continued(prompt, tokens, temperature=temperature, top_k=top_k, seed=seed)
        yield {"prompt": prompt, "continuation": found}


def load_writer(path: str | Path, allow_code: bool = False) -> Writer:
    """The language model of a run folder, of ``student.safetensors`` or of a file that ``export`` wrote.

    Args:
        path: of the folder or file.
        allow_code: as for :func:`lqkd.runs.student.load_student`.

    Raises:
        UsageError: when there is no such file, it is damaged, is none of a language model, or does not say how a text
            becomes tokens.
    """
    file = Path(path)
    if file.suffix == ".pt2":
        raise UsageError(
            f"--prompt is not possible with {str(path)!r}: give a run folder, a .gguf or a .nbits.onnx file"
        )
    if file.suffix == ".gguf":
        network, described = _gguf(file)
    elif file.suffix == ".onnx":
        network, described = _onnx(file)
    else:
        network, described = load_student(file, allow_code), describe_student(file)
        task = task_of(described, file, allow_code)
        if not isinstance(task, CausalLM):
            raise UsageError(f"--prompt is not possible with {str(path)!r}, which is no language model: give images")
        if isinstance(task, MaskedLM):
            raise UsageError(
                f"--prompt is not possible with {str(path)!r}, which finds hidden tokens and continues none"
            )
    return _writer(network, described, str(file))


def _writer(network: Any, described: dict[str, Any], source: str) -> Writer:
    from lqkd.data.tokenized import Bytes, Tokenizer

    vocabulary = sizes_of(network).vocabulary
    if "tokenizer" not in described:
        raise UsageError(
            f"{source!r} does not say what makes tokens of texts for it, as a training with lqkd.data.TextFiles does: "
            "ask it from Python, with lqkd.models.generation.generate_tokens"
        )
    setting = described["tokenizer"]
    text = Bytes() if setting is None else Tokenizer(setting)
    known = [size for size in (text.size, vocabulary, described.get("known")) if size is not None]
    return Writer(network, text, min(known), source)


def _gguf(file: Path) -> tuple[Any, dict[str, Any]]:
    """A Llama's tokenizer is in the file, behind whose tokens may be some that only make up its number; that of bytes
    is told in it."""
    from lqkd.export.gguf_file import from_gguf, said_of

    network, said = from_gguf(file), said_of(file)
    if said.get("tokenizer") is not None:
        import gguf

        kinds = gguf.GGUFReader(file).fields[gguf.Keys.Tokenizer.TOKEN_TYPE].contents()
        known = 1 + max(number for number, kind in enumerate(kinds) if kind != gguf.TokenType.UNUSED)
        said |= {"tokenizer": str(file), "known": known}
    return network, said


def _onnx(file: Path) -> tuple[Any, dict[str, Any]]:
    from lqkd.export import require

    require()
    from lqkd.export import metadata
    from lqkd.export.nbits import NBITS, Runtime

    import onnx  # isort: skip

    try:
        described = metadata.read(onnx.load(file))
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not an ONNX file that can be read ({first_line(error)})") from error
    if described.get("format") != NBITS:
        raise UsageError(f"--prompt is not possible with {str(file)!r}: of ONNX files with those of --format nbits")
    check(described, EXPORTED_FILE, str(file))
    return Runtime(file), described
