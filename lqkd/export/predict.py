"""What a network says about image files, from a run or an exported file: class names and confidence, or arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lqkd.data.preprocessing import Preprocessing
from lqkd.errors import UsageError, first_line
from lqkd.models.finite import not_finite
from lqkd.models.outputs import Asked
from lqkd.runs.provenance import check_code, outdated
from lqkd.runs.student import describe_student, load_student
from lqkd.tasks import Classification, Task
from lqkd.tasks.predictions import by_sample, write_array
from lqkd.utils.escaping import terminal
from lqkd.utils.progress import track
from lqkd.utils.schema import EXPORTED_FILE, check

BATCH = 32
"""Images that are held in memory at once."""


@dataclass(frozen=True)
class Predictor:
    """A network with all that is needed to ask it about image files.

    Attributes:
        network: (B, C, H, W) float32 to what the network returns.
        task: what it was trained for.
        preprocessing: of image files.
        class_names: in the order of the logits; empty when they have none.
        source: the file that it is from, for messages.
    """

    network: Callable[[Tensor], Any]
    task: Task
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    source: str

    def predict(self, images: np.ndarray) -> Tensor:
        """What the task predicts for images (B, C, H, W): (B, ...).

        Raises:
            UsageError: when the network does not take such images, or its logits are not those of the classes, or not
                finite, or the task predicts no tensor.
        """
        tensor = torch.from_numpy(images)
        try:
            returned = self.network(tensor)
        except Exception as error:  # PyTorch and the runtimes raise many types
            shape = "x".join(map(str, images.shape[1:]))
            raise UsageError(
                f"the network of {self.source!r} does not take the images of {shape} that the file says it takes "
                f"({first_line(error)})"
            ) from error
        try:
            outputs = self.task.outputs(returned, Asked("network", len(images)))
        except UsageError as error:
            raise UsageError(f"{self.source!r} contradicts itself: {error}") from error
        if isinstance(outputs, Tensor):
            self._check(outputs)
            outputs = outputs.double()
        return by_sample(self.task, self.task.predictions(outputs, tensor), len(images))

    def _check(self, outputs: Tensor) -> None:
        classes = len(self.class_names)
        if self.task.confidences and classes and outputs.shape[1:] != (classes,):
            raise UsageError(
                f"{self.source!r} contradicts itself: {classes} class names, and outputs of shape "
                f"{tuple(outputs.shape)}"
            )
        if not outputs.isfinite().all():
            raise UsageError(
                f"the network of {self.source!r} answers with logits that are not finite: its training diverged, or "
                "the file is damaged"
            )

    def classes(self, confidences: Tensor, top_k: int) -> list[dict[str, Any]]:
        """The ``top_k`` classes, the most confident first, of the confidences (C,) of one image."""
        best = confidences.argsort(descending=True, stable=True)[:top_k].tolist()
        names = self.class_names or tuple(map(str, range(len(confidences))))
        return [{"class": names[i], "index": i, "confidence": float(confidences[i])} for i in best]


def predict(
    run: str | Path,
    images: Sequence[str],
    *,
    top_k: int | None = None,
    output: str | Path | None = None,
    allow_code: bool = False,
) -> Iterator[dict[str, Any]]:
    """What a network says about image files, one after the other.

    Args:
        run: run folder, or a file that export wrote (.onnx or .pt2).
        images: image files of any size.
        top_k: classes for each image, >= 1; None for one.
        output: folder for the predictions of a task that gives no confidences of classes: for each image a file of its
            name, a mask of classes as .png, everything else as .npy, and beside objects the image with boxes as .png.
        allow_code: whether classes of a folder that somebody else made may be run.

    Returns:
        For each image ``image``, its path, and ``predictions``, a list of ``class``, ``index`` and ``confidence``, the
        most probable first, or ``output``, the file that was written, and of objects ``picture``; or ``error``, what is
        wrong with the image.

    Raises:
        UsageError: after a user's mistake about the run, the file or the folder.
    """
    top_k = 1 if top_k is None else top_k
    if top_k < 1:
        raise UsageError(f"--top-k {top_k} is not possible: it must be at least 1")
    predictor = load_predictor(run, allow_code)
    folder = _folder(predictor, images, output)
    for path, found in track(_predictions(predictor, images), "reading images", len(images)):
        if isinstance(found, UsageError):
            yield {"image": path, "error": str(found)}
        elif folder is None:
            yield {"image": path, "predictions": predictor.classes(found, top_k)}
        else:
            written = {"output": str(write_array(found, folder, Path(path).stem))}
            picture = _with_boxes(predictor, path, found, folder)
            yield {"image": path, **written, **({} if picture is None else {"picture": str(picture)})}


def _with_boxes(predictor: Predictor, path: str, objects: Tensor, folder: Path) -> Path | None:
    """Write the image with boxes around its objects (K, 6), which are in pixels of what the network sees.

    None for a task without objects.
    """
    from lqkd.tasks import BoxDetection  # which loads torchmetrics

    if not isinstance(predictor.task, BoxDetection):
        return None
    from lqkd.tasks.object_pictures import drawn_over
    from lqkd.utils.figures import write_image

    prepared, target = predictor.preprocessing, folder / f"{Path(path).stem}.png"
    photograph = prepared.pixels(path)
    seen = photograph if prepared.whole else prepared.resized(photograph)
    names = predictor.class_names or predictor.task.names
    write_image(target, drawn_over(seen, objects, prepared.size, names))
    return target


def _folder(predictor: Predictor, images: Sequence[str], given: str | Path | None) -> Path | None:
    """Where predictions are written; None for classes, which are not.

    Raises:
        UsageError: when it is missing or in the way of something.
    """
    name = type(predictor.task).__name__
    if predictor.task.confidences:
        if given is not None:
            raise UsageError(f"--output {str(given)!r} is not possible: task {name} gives classes, which are printed")
        return None
    if given is None:
        raise UsageError(f"--output is missing: task {name} gives an array for each image, which needs a folder")
    folder, stems = Path(given), [Path(path).stem for path in images]
    if twice := [stem for stem in stems if stems.count(stem) > 1]:
        raise UsageError(f"two images are called {twice[0]!r}, and their predictions would be: ask about one at a time")
    there = [folder / f"{stem}{suffix}" for stem in stems for suffix in (".png", ".npy")]
    if found := next((path for path in there if path.exists()), None):
        raise UsageError(f"{str(found)!r} exists: choose another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {str(given)!r} is not a folder that can be made ({error.strerror})") from error
    return folder


def _predictions(predictor: Predictor, paths: Sequence[str]) -> Iterator[tuple[str, Tensor | UsageError]]:
    """Path and what is predicted for it, or what is wrong with it, in the order given."""
    for start in range(0, len(paths), BATCH):
        read: list[np.ndarray | UsageError] = []
        for path in paths[start : start + BATCH]:
            try:
                read.append(predictor.preprocessing.read(path))
            except UsageError as error:
                read.append(error)
        images = [image for image in read if not isinstance(image, UsageError)]
        predicted = iter(predictor.predict(np.stack(images)) if images else ())
        for path, image in zip(paths[start : start + BATCH], read, strict=True):
            yield path, image if isinstance(image, UsageError) else next(predicted)


def load_predictor(path: str | Path, allow_code: bool = False) -> Predictor:
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
        student, described = load_student(file, allow_code), describe_student(file)
        shape = described.get("image_shape") or [None]
        preprocessing = {**described, "channels": shape[0], "size": shape[1:]}
        return _predictor(student, preprocessing, described, file, allow_code)
    if not file.is_file():
        raise UsageError(f"{str(path)!r} does not exist: give a run folder, or a file that export wrote")
    network, described = (_onnx if file.suffix == ".onnx" else _program)(file)
    old = outdated(file, described)
    if old is not None:
        print(f"lqkd: warning: {terminal(old)}", file=sys.stderr)
    return _predictor(network, described.get("preprocessing") or {}, described, file, allow_code)


def _predictor(
    network: Any, preprocessing: dict[str, Any], described: dict[str, Any], file: Path, allow_code: bool
) -> Predictor:
    task = task_of(described, file, allow_code)
    if "tokenizer" in described:
        raise UsageError(f"{str(file)!r} is a language model, which takes no images: give --prompt TEXT")
    names = tuple(str(name) for name in described.get("class_names") or ())
    if len(taken := list(described.get("inputs") or ())) > 1:
        raise UsageError(f"predict asks about image files, and {str(file)!r} takes {', '.join(taken)}")
    prepared = Preprocessing.of(preprocessing, str(file))
    return Predictor(torch.inference_mode()(network), task, prepared, names, str(file))


def task_of(described: dict[str, Any], source: Path, allow_code: bool) -> Task:
    """What the network of a file was trained for, by what the file says about itself; an old file says nothing.

    Raises:
        UsageError: when it names code that is not allowed, or what cannot be built.
    """
    from jsonargparse import ArgumentParser

    settings = described.get("task")
    if settings is None:
        return Classification()
    check_code({"task": settings}, source, allow_code)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    try:
        return cast(Task, parser.instantiate_classes(parser.parse_object({"task": settings})).task)
    except Exception as error:  # the parser and a task's own constructor raise many types
        cause = error.__cause__ if isinstance(error.__cause__, UsageError) else error
        raise UsageError(f"the task of {str(source)!r} cannot be built ({first_line(cause)})") from error


def _onnx(file: Path) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    from lqkd.export import require

    require()
    from lqkd.export import metadata
    from lqkd.export.deploy import OUTPUT
    from lqkd.export.fixed_batch import in_batches
    from lqkd.export.frames import FRAMES
    from lqkd.export.runtimes import Runner
    from lqkd.models.outputs import returned_by

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
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value  # 0 for any number
    frames = model.graph.input[0].name == FRAMES
    if frames:  # the file prepares pixels itself, from what they are before mean and std
        held = described.get("preprocessing") or {}
        channels = held.get("channels", 0)
        described["preprocessing"] = {**held, "mean": [0.0] * channels, "std": [1.0] * channels}

    def network(images: Tensor) -> Any:
        given = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous() if frames else images
        found = in_batches(runner, given.numpy(), batch) if batch else runner(given.numpy())
        return returned_by({name: torch.from_numpy(found[name]) for name in runner.outputs}, OUTPUT)

    return network, described


def _program(file: Path) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    from lqkd.export.program import load_program

    try:
        program, described = load_program(file)
    except Exception as error:  # a damaged file raises many types
        raise UsageError(f"{str(file)!r} is not a program of lqkd export ({first_line(error)})") from error
    check(described, EXPORTED_FILE, str(file))
    if (told := not_finite(program.state_dict, ())) is not None:
        raise UsageError(f"{str(file)!r} is damaged: {told}")
    return program.module(), described
