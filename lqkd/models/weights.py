"""Loading float weights from a file into a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate

from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.models.finite import not_finite
from lqkd.models.torchvision_detector import TorchvisionDetector
from lqkd.models.weight_files import read_weights


def load_weights(network: nn.Module, source: str, replace_head: bool | None = False) -> str | None:
    """Load ``source`` into ``network``, every tensor or none.

    The file may be a checkpoint that holds a state dict among other things, and all names may begin with what a
    wrapper puts before them, such as ``module.`` or ``model.``. Numbers of another floating dtype are converted.

    Args:
        network: the network as it will be used, before quantization.
        source: ``builtin:NAME``, a ``.safetensors`` file, a file of :func:`torch.save` with a state dict, or the
            ``.index.json`` of several; environment variables such as ``$LQKD_DATA`` are replaced.
        replace_head: whether a last layer for another number of classes is left as it is; None where the network must
            know its classes already.

    Returns:
        What was unwrapped and what was left as it is, in a sentence; None when everything was loaded as it was.

    Raises:
        UsageError: when there is no such file, its tensors are not those of ``network``, or one is not finite.

    Examples:
        >>> from lqkd.models import CifarResNet
        >>> network = CifarResNet(depth=14, width=8, in_channels=1)
        >>> load_weights(network, "builtin:digits_teacher") is None  # nothing to tell: all was loaded
        True
    """
    held, told = read_weights(source)
    own = network.state_dict()
    state, unwrapped = _named_as(own, held, source)
    told += unwrapped
    if isinstance(network, TorchvisionDetector):
        state = dict(network.adapted(state))
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in state if key in own and state[key].shape != own[key].shape]
    if not missing and not unexpected and (classes := _classes(state, own, shapes)) is not None:
        layers = " and ".join(sorted({repr(key.rpartition(".")[0]) for key in shapes}))
        differ = f"are for {classes[0]} classes and the network has {classes[1]}"
        if not replace_head:
            raise UsageError(f"weights={source!r} {differ}{_REMEDIES[replace_head].format(layers)}")
        told.append(f"{differ}: its last layer {layers} starts anew")
        state = {key: value for key, value in state.items() if key not in shapes}
        shapes = []
    for problem, keys in (
        ("they lack", missing),
        ("it has no place for", unexpected),
        ("they have another shape for", shapes),
    ):
        if keys:
            kind, more = type(network).__name__, f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UsageError(
                f"weights={source!r} are of another network than {kind}: {problem} {keys[0]!r}{more}; its "
                "arguments (depth, width, num_classes) must be those of the run that wrote the file"
            )
    _check_numbers(state, network, source)
    network.load_state_dict(state, strict=False)
    return f"weights={source!r} {', '.join(told)}" if told else None


_REMEDIES = {
    False: ": give the model replace_head: true to start its last layer {} anew",
    None: ": a teacher must know its classes, so train it first with ClassifierModule, these weights and replace_head: "
    "true",
}
"""What to do about a last layer for other classes."""


def _classes(state: dict[str, Tensor], own: dict[str, Tensor], keys: list[str]) -> tuple[int, int] | None:
    """Numbers of classes in the file and of the network, where ``keys`` differ in nothing else."""
    if not keys or not all(own[key].ndim and own[key].shape[1:] == state[key].shape[1:] for key in keys):
        return None
    numbers = {(len(state[key]), len(own[key])) for key in keys}
    return numbers.pop() if len(numbers) == 1 else None


def _named_as(own: Collection[str], held: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """``held`` without what stands before the names of the network, and a clause that says so.

    That is a prefix that all names have, or below which the whole network lies while other tensors lie beside it.

    Raises:
        UsageError: when the whole network is there more than once, or it is a quantised one.
    """
    quantizers = [key for key in held if key not in own and any(part in key for part in _OF_QUANTIZERS)]
    if quantizers:
        raise UsageError(
            f"weights={source!r} are those of a quantised student (see {quantizers[0]!r}), and a training starts from "
            "weights in floating point: fit --ckpt_path goes on from a checkpoint, predict and export take its run, "
            "and lqkd.load_student a run or its student.safetensors"
        )
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    counts = Counter(prefix for key in held for prefix in _prefixes(key) if key.removeprefix(prefix) in needed)
    whole = [prefix for prefix, count in counts.items() if count == len(needed)]
    if "" in whole or needed & held.keys():
        return dict(held), []
    common = [prefix for prefix in counts if all(key.startswith(prefix) for key in held)]
    if len(whole) > 1:
        names = " and ".join(map(repr, sorted(whole)))
        raise UsageError(f"weights={source!r} hold this network more than once, as {names}: save one of them alone")
    if not (chosen := whole or sorted(common, key=lambda prefix: -counts[prefix])[:1]):
        return dict(held), []
    prefix = chosen[0]
    below = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
    others = len(held) - len(below)
    beside = f" and {others} tensors beside it" if others else ""
    return below, [f"are read without {prefix!r} before their names{beside}"]


_OF_QUANTIZERS = ("weight_quantizer.", "input_quantizer.", "output_quantizer.", "argument_quantizer.")


def _prefixes(key: str) -> list[str]:
    """``""``, ``a.`` and ``a.b.`` of ``a.b.c``."""
    return ["", *accumulate(f"{part}." for part in key.split(".")[:-1])]


def _check_numbers(state: Mapping[str, Tensor], network: nn.Module, source: str) -> None:
    for key, value in network.state_dict().items():
        if value.is_floating_point() and key in state and not state[key].is_floating_point():
            kind = str(state[key].dtype).removeprefix("torch.")
            raise UsageError(f"weights={source!r} hold {kind} numbers for {key!r}: floating point is needed")
    if (told := not_finite(state, dict(network.named_parameters()))) is not None:
        raise UsageError(f"weights={source!r} are of a training that diverged: {told}")
