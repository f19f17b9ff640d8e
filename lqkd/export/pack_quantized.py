"""A language model as a folder of compressed-tensors, written from the codes and steps that were trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lqkd.errors import ParityError, UsageError
from lqkd.export.deploy import deployable_copy
from lqkd.export.language_weights import check_unfolded, check_weights_alone, quantized_weights
from lqkd.models.hugging_face import reading
from lqkd.quantization import Quantizer
from lqkd.quantization.codes import check_finite, check_fitted
from lqkd.quantization.layers import QuantizedLayer, QuantLinear
from lqkd.quantization.quantizers.lsq import LSQ
from lqkd.utils.files import atomic_folder, write_json, write_safetensors

COMPRESSED = "compressed-tensors"
"""The name of the format."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PACKED = "pack-quantized"
"""What compressed-tensors calls integers that are packed into words of 32 bits."""
GROUPS = (32, 64, 128)
"""Of what sizes its groups are; vLLM's kernels have these."""
_WIDTHS = (4, 8)
"""Bits of codes that vLLM's kernels read."""
_OWN = "lqkd"
_SAVED = (
    *(CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    "chat_template.jinja",
)
"""Names of files that transformers writes of a network and a tokenizer."""
"""What the configuration says of the folder's origin."""


def require() -> None:
    """Say what to install where it is missing.

    Raises:
        UsageError: then.
    """
    for needed in ("transformers", "compressed_tensors"):
        if find_spec(needed) is None:
            raise UsageError(f"--format {COMPRESSED} needs {needed}: pip install 'lqkd[hf]'")


def to_compressed_tensors(
    model: nn.Module, folder: str | Path, *, about: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> dict[int, int]:
    """Write a language model of transformers as a folder that ``from_pretrained`` loads, and prove what it holds.

    Weights of linear layers are written as their codes, 4 or 8 bits in words of 32, and float32 steps, one for a group
    of 32, 64 or 128 neighbours on the input axis or one for a row (``pack-quantized``, symmetric); nothing is quantised
    again. Everything else is float32: what is quantised otherwise, such as an embedding, has the values of its grid.
    The folder is then read by the package compressed-tensors: codes and steps must be those of the student, and decode
    to the bits of the weights that it computes with.

    Args:
        model: of :func:`~lqkd.models.causal_lm`, with ``q4_0``, ``q8_0`` or ``lsq`` of 3 to 8 bits and activations in
            float; it is left alone.
        folder: complete or not there; one that this function has written is replaced.
        about: what ``config.json`` shall say of the origin, JSON values, under ``lqkd``.
        tokenizer: of Hugging Face, as :class:`~lqkd.data.TextFiles` takes it, which is saved beside; None for none.

    Returns:
        Bits to the number of layers whose codes take as many.

    Raises:
        UsageError: when transformers has no such network, the format does not have a grid, the training has failed, or
            the folder is somebody else's.
        ParityError: when the folder decodes to something else; nothing is written then.
    """
    require()
    student = compressed_student(model)
    check_replaceable(Path(folder))
    tensors, groups = _encoded(student)
    with atomic_folder(folder) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        write_json(temporary / CONFIG, _config(student, groups, about or {}))
        _save_more(student, tokenizer, temporary)
        check_compressed(temporary, student)
    return {bits: sum(len(places) for (own, _), places in groups.items() if own == bits) for bits, _ in sorted(groups)}


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what this format has not written.

    Raises:
        UsageError: then.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        own = _OWN in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        own = False
    foreign = [path.name for path in folder.iterdir() if own and not _is_ours(path)] if folder.is_dir() else []
    if foreign:
        raise UsageError(
            f"{str(folder)!r} has {foreign[0]!r}, which --format {COMPRESSED} has not written: move it away"
        )
    if not own:
        raise UsageError(f"{str(folder)!r} exists and is no folder of --format {COMPRESSED}: choose another")


def _is_ours(path: Path) -> bool:
    """Whether a file has the name of one that transformers saves of a network and a tokenizer."""
    return path.name in _SAVED or (path.suffix == ".safetensors" and path.name.startswith("model-"))


def compressed_student(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that a folder is made of.

    Raises:
        UsageError: when none can be.
    """
    student = deployable_copy(model)
    check_compressed_grids(student)
    return student


def check_compressed_grids(student: nn.Module) -> None:
    """Refuse networks and grids that such a folder does not have, whatever quantizers know yet.

    Raises:
        UsageError: for the first one.
    """
    _check_class(student)
    for name, layer, quantizer in quantized_weights(student):
        check_unfolded(name, layer, f"a folder of --format {COMPRESSED}")
        if isinstance(layer, QuantLinear):
            _check_grid(quantizer, name)
    check_weights_alone(
        student,
        f"a folder of --format {COMPRESSED} does not have here: give it activation_bits: 32 in a rule, or the recipe "
        "32 activation bits and last_layer_bits: null",
    )
    if not any(isinstance(layer, QuantLinear) and layer.weight_quantizer for layer in student.modules()):
        raise UsageError(f"--format {COMPRESSED} is not possible where no linear layer has a weight below 32 bits")


def _check_class(student: nn.Module) -> None:
    """Refuse what transformers would not build from a configuration with the same layers in the same places.

    Raises:
        UsageError: then.
    """
    kind = type(student)
    if not kind.__module__.startswith("transformers."):
        raise UsageError(
            f"--format {COMPRESSED} is not possible for {kind.__name__}, which transformers has no architecture for: "
            "gguf and nbits have lqkd.models.GPT"
        )
    with torch.device("meta"):
        plain = dict(kind(cast(Any, student).config).named_modules())
    for name, layer in student.named_modules():
        quantized = isinstance(layer, QuantLinear) and layer.weight_quantizer is not None
        if quantized and not isinstance(plain.get(name), nn.Linear):
            raise UsageError(
                f"--format {COMPRESSED} is not possible for {kind.__name__}: its {name} is no linear layer in "
                f"transformers but a {type(plain.get(name)).__name__}"
            )


def _check_grid(quantizer: Quantizer, name: str) -> None:
    kind, size = type(quantizer).__name__, quantizer.group_size
    symmetric = isinstance(quantizer, LSQ) and quantizer.code_range()[0] < 0
    if not symmetric or quantizer.bits not in range(3, 9):
        raise UsageError(
            f"the weight of {name} is on the grid of {kind} with {quantizer.bits} bits, and {COMPRESSED} has 4 and 8, "
            "symmetric: train with quantization.bits=q4_0 or q8_0, or lsq of 3 to 8 bits; nbits has 2 bits of lsq in "
            "groups, gguf three values (tq2_0)"
        )
    if size not in (None, *GROUPS):
        raise UsageError(
            f"the weight of {name} has groups of {size}, and {COMPRESSED} those of {', '.join(map(str, GROUPS))}, or "
            "none"
        )


Groups = dict[tuple[int, int | None], list[str]]
"""Bits and size of a group, None for a row, to the layers that have these."""


@torch.no_grad()
def _encoded(student: nn.Module) -> tuple[dict[str, Tensor], Groups]:
    """The tensors of the folder, and which layers are packed."""
    tensors: dict[str, Tensor] = {}
    groups: Groups = {}
    for name, layer, key, values in _parameters(student):
        quantizer = getattr(layer, "weight_quantizer", None)
        if key == "weight" and quantizer is not None and _is_packed(student, layer):
            codes, scales = _codes_and_scales(quantizer, cast(Tensor, layer.weight), name)
            bits = _width(quantizer)
            tensors[f"{name}.weight_packed"] = _pack(codes, bits)
            tensors[f"{name}.weight_scale"] = scales
            tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)
            groups.setdefault((bits, quantizer.group_size), []).append(name)
            continue
        if key == "weight" and isinstance(quantizer, Quantizer):
            check_fitted(quantizer, name)
        check_finite(values, f"{name}.{key}", "number")
        tensors[f"{name}.{key}"] = values
    return tensors, groups


def _parameters(student: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Place, layer, name and values of every parameter, of a shared one once, and of a quantised one on its grid."""
    seen: set[int] = set()
    for place, module in student.named_modules():
        if isinstance(module, Quantizer):
            continue
        own = {**dict(module.named_parameters(recurse=False)), **_kept_buffers(module)}
        for key, values in own.items():
            if id(values) not in seen:
                seen.add(id(values))
                on_grid = key == "weight" and isinstance(module, QuantizedLayer)
                yield place, module, key, (cast(QuantizedLayer, module).quantized_weight() if on_grid else values)


def _kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    left = module._non_persistent_buffers_set
    return {key: values for key, values in module.named_buffers(recurse=False) if key not in left}


def _is_packed(student: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer's weight is written as codes: of a linear layer that shares it with no other."""
    if not isinstance(layer, QuantLinear) or layer.weight_quantizer is None:
        return False
    return not any(other is not layer and getattr(other, "weight", None) is layer.weight for other in student.modules())


def _width(quantizer: Quantizer) -> int:
    return next(width for width in _WIDTHS if width >= quantizer.bits)


def _codes_and_scales(quantizer: Quantizer, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int32 around 0, and steps (N, groups) float32.

    Raises:
        UsageError: when the training has failed.
    """
    check_fitted(quantizer, name)
    check_finite(weight, name, "weight")
    check_finite(cast(LSQ, quantizer).scale, name, "scale")
    steps = cast(LSQ, quantizer).step()
    rows = len(weight)
    return quantizer.codes(weight), steps.reshape(rows, -1) if steps.numel() > 1 else steps.reshape(1, 1).repeat(
        rows, 1
    )


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) from ``-2**(bits - 1)`` on as int32 words (N, ceil(K bits / 32)), the first in the lowest bits."""
    places = 32 // bits
    padded = nn.functional.pad(codes.to(torch.int64) + 2 ** (bits - 1), (0, -codes.shape[1] % places))
    apart = padded.view(len(codes), -1, places).numpy().astype(np.uint32)
    words = np.bitwise_or.reduce(apart << (bits * np.arange(places, dtype=np.uint32)), axis=-1)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def _config(student: nn.Module, groups: Groups, about: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``: that of the network, how it is quantised, and where it comes from."""
    packed = {name for places in groups.values() for name in places}
    linear = [name for name, layer in student.named_modules() if isinstance(layer, nn.Linear)]
    config = cast(Any, student).config
    quantization = {
        "quant_method": COMPRESSED,
        "format": _PACKED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": {
                # By class where all are alike, as others write it; by name otherwise.
                "targets": ["Linear"] if len(groups) == 1 else places,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for index, ((bits, size), places) in enumerate(groups.items())
        },
        "ignore": [name for name in linear if name not in packed],
        "kv_cache_scheme": None,
    }
    return {
        **json.loads(config.to_json_string(use_diff=False)),
        "architectures": [type(student).__name__],
        "dtype": "float32",
        "use_cache": True,
        "quantization_config": quantization,
        _OWN: {"version": metadata.version("lqkd"), **about},
    }


def _save_more(student: nn.Module, tokenizer: str | None, folder: Path) -> None:
    generation = getattr(student, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        from lqkd.data.tokenized import Tokenizer

        Tokenizer(tokenizer).save(folder)


@torch.no_grad()
def check_compressed(folder: str | Path, model: nn.Module) -> None:
    """Read a folder by the package compressed-tensors and compare it with what ``model`` computes with.

    Raises:
        ParityError: when a tensor is missing, codes or steps are others, or decode to other bits.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    found = load_file(Path(folder) / WEIGHTS)
    said = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    schemes = list(QuantizationConfig.model_validate(said).config_groups.values())
    expected, groups = _encoded(model)
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise ParityError(f"the folder and the student differ in the tensors that they have: {', '.join(odd[:3])}")
    for ((bits, _), names), scheme in zip(groups.items(), schemes, strict=True):
        for name in names:
            layer = cast(QuantizedLayer, model.get_submodule(name))
            own = {key: found[f"{name}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
            codes, scales = _codes_and_scales(cast(Quantizer, layer.weight_quantizer), layer.weight, name)
            unpacked = unpack_from_int32(own["weight_packed"], bits, own["weight_shape"])
            decoded = BaseCompressor.get_value_from_registry(_PACKED).decompress(own, scheme)["weight"]
            for what, ours, theirs in (
                ("codes", codes.to(torch.int8), unpacked),
                ("steps", scales, own["weight_scale"]),
                ("weights", layer.quantized_weight(), decoded),
            ):
                if not _same(ours, theirs):
                    raise ParityError(f"{name} of the folder has other {what} than the student computes with")
    for name, values in expected.items():
        if not _same(values, found[name]):
            raise ParityError(f"tensor {name} of the folder has other numbers than the student computes with")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether both have the same bits."""
    alike = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return alike and ours.detach().contiguous().numpy().tobytes() == theirs.contiguous().numpy().tobytes()


def from_compressed_tensors(folder: str | Path) -> nn.Module:
    """The network of a folder, as transformers reads it: weights are decoded when it is first called.

    Raises:
        UsageError: when it cannot be read.
    """
    require()
    import transformers

    with reading(str(folder), "folder", "language model"), redirect_stderr(StringIO()):
        network = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return cast(nn.Module, network.eval())
