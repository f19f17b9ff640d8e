"""Class names and confidence for image files, from a run or an exported file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lqkd.data.preprocessing import Preprocessing
from lqkd.errors import UsageError, first_line
from lqkd.models.finite import not_finite
from lqkd.runs.provenance import outdated
from lqkd.runs.student import describe_student, load_student
from lqkd.utils.escaping import terminal
from lqkd.utils.progress import track
from lqkd.utils.schema import EXPORTED_FILE, check

BATCH = 32
"""Images that are held in memory at once."""


@dataclass(frozen=True)
class Classifier:
    """A network with all that is needed to ask it about image files.

    Attributes:
        logits: (B, C, H, W) float32 to (B, classes).
        preprocessing: of image files.
        class_names: in the order of the logits; empty when they have none.
        source: the file that it is from, for messages.
    """

    logits: Callable[[np.ndarray], np.ndarray]
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    source: str

    def predict(self, images: np.ndarray, top_k: int) -> list[list[dict[str, Any]]]:
        """The ``top_k`` classes of each image, the most probable first, with their probability by softmax.

        Raises:
            UsageError: when the network does not take such images, or its logits are not those of the classes, or not
                finite.
        """
        logits = self._checked_logits(images)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [
            [self._entry(int(i), float(row[i])) for i in best] for row, best in zip(probabilities, order, strict=True)
        ]

    def _checked_logits(self, images: np.ndarray) -> np.ndarray:
        try:
            logits = self.logits(images).astype(np.float64)
        except Exception as error:  # PyTorch and the runtimes raise many types
            shape = "x".join(map(str, images.shape[1:]))
            raise UsageError(
                f"the network of {self.source!r} does not take the images of {shape} that the file says it takes "
                f"({first_line(error)})"
            ) from error
        classes = len(self.class_names) or logits.shape[-1]
        if logits.shape != (len(images), classes):
            wanted = f"{classes} class names" if self.class_names else "logits (B, classes)"
            raise UsageError(f"{self.source!r} contradicts itself: {wanted}, and outputs of shape {logits.shape}")
        if not np.isfinite(logits).all():
            raise UsageError(
                f"the network of {self.source!r} answers with logits that are not finite: its training diverged, or "
                "the file is damaged"
            )
        return logits

    def _entry(self, index: int, confidence: float) -> dict[str, Any]:
        name = self.class_names[index] if self.class_names else str(index)
        return {"class": name, "index": index, "confidence": confidence}


def predict(
    run: str | Path, images: Sequence[str], *, top_k: int = 1, allow_code: bool = False
) -> Iterator[dict[str, Any]]:
    """The classes of image files, one after the other.

    Args:
        run: run folder, or a file that export wrote (.onnx or .pt2).
        images: image files of any size.
        top_k: classes for each image, >= 1.
        allow_code: whether classes of a folder that somebody else made may be run.

    Returns:
        For each image ``image``, its path, and ``predictions``, a list of ``class``, ``index`` and ``confidence``, the
        most probable first; or ``error``, what is wrong with the image.

    Raises:
        UsageError: after a user's mistake about the run or the file.
    """
    if top_k < 1:
        raise UsageError(f"--top-k {top_k} is not possible: it must be at least 1")
    classifier = load_classifier(run, allow_code)
    for path, entry in track(_predictions(classifier, images, top_k), "reading images", len(images)):
        yield {"image": path} | ({"error": str(entry)} if isinstance(entry, UsageError) else {"predictions": entry})


def _predictions(
    classifier: Classifier, paths: Sequence[str], top_k: int
) -> Iterator[tuple[str, list[dict[str, Any]] | UsageError]]:
    """Path and its classes, or what is wrong with it, in the order given."""
    for start in range(0, len(paths), BATCH):
        read: list[np.ndarray | UsageError] = []
        for path in paths[start : start + BATCH]:
            try:
                read.append(classifier.preprocessing.read(path))
            except UsageError as error:
                read.append(error)
        images = [image for image in read if not isinstance(image, UsageError)]
        predicted = iter(classifier.predict(np.stack(images), top_k) if images else ())
        for path, image in zip(paths[start : start + BATCH], read, strict=True):
            yield path, image if isinstance(image, UsageError) else next(predicted)


def load_classifier(path: str | Path, allow_code: bool = False) -> Classifier:
    """The network of a run folder, of ``student.safetensors`` or of a file that ``export`` wrote.

    Args:
        path: of the folder or file.
        allow_code: as for :func:`lqkd.runs.student.load_student`.

    Raises:
        UsageError: when there is no such file, it is damaged, does not say how images are prepared, or names code that
            is not allowed.
    """
    file = Path(path)
    if file.suffix not in (".onnx", ".pt2"):
        network, described = load_student(file, allow_code), describe_student(file)
        shape = described.get("image_shape") or [None]
        preprocessing = {**described, "channels": shape[0], "size": shape[1:]}
        return _classifier(_in_torch(network), preprocessing, described, file)
    if not file.is_file():
        raise UsageError(f"{str(path)!r} does not exist: give a run folder, or a file that export wrote")
    logits, described = (_onnx if file.suffix == ".onnx" else _program)(file)
    old = outdated(file, described)
    if old is not None:
        print(f"lqkd: warning: {terminal(old)}", file=sys.stderr)
    return _classifier(logits, described.get("preprocessing") or {}, described, file)


def _classifier(logits: Any, preprocessing: dict[str, Any], described: dict[str, Any], file: Path) -> Classifier:
    names = tuple(str(name) for name in described.get("class_names") or ())
    return Classifier(logits, Preprocessing.of(preprocessing, str(file)), names, str(file))


def _in_torch(network: Any) -> Callable[[np.ndarray], np.ndarray]:
    def logits(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).float().numpy()

    return logits


def _onnx(file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    from lqkd.export import require

    require()
    from lqkd.export import metadata
    from lqkd.export.emitter import OUTPUT
    from lqkd.export.runtimes import Runner

    import onnx  # isort: skip

    try:
        model = onnx.load(file)
        described = metadata.read(model)
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not an ONNX file that can be read ({first_line(error)})") from error
    if "version" not in described:
        raise UsageError(
            f"{str(file)!r} was not written by lqkd export: it does not say how images are prepared for it"
        )
    check(described, EXPORTED_FILE, str(file))
    for tensor in model.graph.initializer:  # integer kernels make ordinary numbers out of a step that is none
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UsageError(f"{str(file)!r} is damaged: {tensor.name!r} is not finite")
    runner = Runner(model, optimised=True)
    return lambda images: runner(images)[OUTPUT], described


def _program(file: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, Any]]:
    from lqkd.export.program import load_program

    try:
        program, described = load_program(file)
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not a program of lqkd export ({first_line(error)})") from error
    check(described, EXPORTED_FILE, str(file))
    if (told := not_finite(program.state_dict, ())) is not None:
        raise UsageError(f"{str(file)!r} is damaged: {told}")
    return _in_torch(program.module()), described
