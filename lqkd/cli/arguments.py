"""The arguments of the verbs that are none of Lightning's.

They are read before PyTorch is loaded, so that help and mistakes are told at once; help is made of the docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lqkd.cli.verb_parser import argument, read, read_known
from lqkd.errors import UsageError
from lqkd.pipelines.asked import Asked
from lqkd.runs.folder import check_resumable
from lqkd.tasks.values import MONITOR


@dataclass(frozen=True)
class Distill:
    """Make a low-bit student for a folder of images or texts: train it in floating point where its weights do not know
    them, distil it at few bits, export it as ONNX or GGUF, verified, and write a page. Every choice is printed and
    becomes a configuration that fit takes. The same command goes on after any interruption."""

    folder: str
    """images by class (CLASS/IMAGE), images/ and masks/, boxes as VOC's or COCO's, or texts (.txt, .md, .jsonl); or
    train/, val/ and test/ with these"""
    student: str | None = argument(None, metavar="NETWORK", shown="by the folder")
    """of torchvision, timm, hf-hub:OWNER/NAME, small_fcos, gpt, a YAML file"""
    bits: str | None = argument(None, shown="w4a4, of texts q4_0")
    """of weights and activations: w8a8, w4a4, w2a2, q4_0, ..."""
    teacher: str | None = argument(None, metavar="NETWORK", shown="the student in float")
    """network, likewise, or a run that has trained one"""
    student_weights: str | None = argument(None, metavar="FILE", shown="what is published, else random")
    """file, builtin:NAME, or pretrained for published ones"""
    teacher_weights: str | None = argument(None, metavar="FILE", shown="likewise")
    """likewise"""
    epochs: int | None = argument(None, metavar="N", shown="by the number of images")
    """of each training"""
    image_size: int | None = argument(None, metavar="PIXELS", shown="by the images")
    """side of what networks see"""
    batch_size: int | None = argument(None, metavar="N", shown="by the number of images")
    """images of a step"""
    out: str | None = argument(None, metavar="FOLDER", shown="runs/FOLDER_STUDENT_BITS")
    """new or empty, or to go on in"""


@dataclass(frozen=True)
class Export:
    """Export the student of a run from its best checkpoint, verify the file against PyTorch on the test split and write
    a model card beside it."""

    run: str
    """run folder"""
    format: str = argument("portable", metavar="F")
    """openvino litert executorch coreml ncnn tensorrt power_of_two packed4 packed2 qonnx torch gguf
    nbits compressed-tensors"""
    output: str | None = argument(None, metavar="FILE", shown="student.onnx in the run folder")
    """file to write"""
    hub: str | None = argument(None, metavar="FOLDER", shown="none")
    """folder for the Hugging Face Hub instead: card, config, safetensors and ONNX"""
    overwrite: bool = argument(False)
    """replace a file that exists"""
    latency: bool = argument(False)
    """also time it against float32 ONNX and PyTorch on this CPU, for some seconds"""
    frames: bool = argument(False)
    """take a camera's frames, bytes (B, H, W, C), and prepare them inside the file"""
    batch: int | None = argument(None, metavar="N", shown="any number")
    """samples that an ONNX file takes at a time"""
    allow_code: bool = argument(False)
    """run the classes that the folder of somebody else names"""


@dataclass(frozen=True)
class Predict:
    """Print the classes of image files, or write what another task predicts for them into a folder. Images are prepared
    as validation prepares them; those of another size are resized. A language model continues a --prompt. predict
    --config CONFIG is another verb, which writes a table of what a run predicts for its own test split: see predict
    --config CONFIG --help."""

    run: str
    """run folder, or file that export wrote (.onnx or .pt2; of texts .gguf or .nbits.onnx)"""
    images: tuple[str, ...] = ()
    """image files of any size"""
    prompt: tuple[str, ...] = argument((), metavar="TEXT")
    """texts to continue, of a language model"""
    tokens: int | None = argument(None, metavar="N", shown="64")
    """to write after a prompt, at most"""
    temperature: float | None = argument(None, metavar="T", shown="0")
    """of what is written: 0 takes the most probable token, above it tokens are drawn"""
    seed: int | None = argument(None, metavar="N", shown="0")
    """of what is drawn"""
    top_k: int | None = argument(None, metavar="K", shown="1, of a prompt all")
    """classes for each image; or so many tokens to draw from"""
    output: str | None = argument(None, metavar="FOLDER", shown="needed by these alone")
    """folder for masks (.png) or arrays (.npy), of other tasks"""
    json: bool = argument(False)
    """print a JSON list, one entry for each image"""
    allow_code: bool = argument(False)
    """run the classes that the folder of somebody else names"""


@dataclass(frozen=True)
class Sensitivity:
    """Quantise each layer of a network alone, without training, and rank the layers by what the loss on the validation
    split says. Test data are not used."""

    run: str
    """run folder, whose best checkpoint gives the float weights; or a config, before any training"""
    bits: str = argument("8,4,2")
    """bits to try: 4 is short for w4a4"""
    budget: str | None = argument(None, shown="none")
    """also find bits under size=120kB, size=12%, bops=2.5G or bops=3% (of float)"""
    batches: int = argument(16, metavar="N")
    """validation batches, spread over the split"""
    output: str | None = argument(None, metavar="FOLDER", shown="the run folder")
    """folder for what is written"""
    overwrite: bool = argument(False)
    """replace an earlier ranking"""
    allow_code: bool = argument(False)
    """run the classes that the folder of somebody else names"""


@dataclass(frozen=True)
class Report:
    """Write report.html, one page that needs no network, report.md, table.csv and runs.csv into the folder of a run or
    a study."""

    folder: Path
    """run folder, or folder of a study, finished or not"""
    figures: bool = argument(False)
    """write its figures to figures/ too, as SVG and PNG, light and dark"""


@dataclass(frozen=True)
class Compare:
    """Train every variant of a study with every seed and compare them pair by pair. Runs that are finished are kept,
    stopped ones go on: start it again after any interruption."""

    config: Path = field(kw_only=True)
    """study file, e.g. configs/studies/quickstart.yaml"""
    root: str | None = argument(None, shown="the study file's")
    """folder of all studies"""
    name: str | None = argument(None, shown="the study file's")
    """name of the study and its folder"""
    seeds: tuple[int, ...] | None = argument(None, metavar="N", shown="the study file's")
    """of the runs"""
    set: tuple[str, ...] = argument((), metavar="K=V")
    """settings of all variants, e.g. trainer.max_epochs=5"""
    retry_failed: bool = argument(False)
    """train runs again that failed"""


@dataclass(frozen=True)
class MakeShards:
    """Pack folders of images, one for each class, into tar shards for lqkd.data.StreamedImageNet, in the format of
    WebDataset, with an index beside them."""

    source: Path
    """folder with train/CLASS/IMAGE and val/CLASS/IMAGE"""
    dest: Path
    """folder for the shards, without any"""
    shard_mb: int = argument(512, metavar="MB")
    """size of a shard"""


@dataclass(frozen=True)
class WandbReport:
    """Save a draft of a W&B report of a project's runs, what the regularizers learned beside the losses and the bits,
    and print its address."""

    project: str
    """ENTITY/PROJECT of W&B: a user or team, and its project"""
    monitor: str = argument(MONITOR, metavar="METRIC")
    """metric that chose the best checkpoints"""
    terms: tuple[str, ...] = argument((), metavar="NAME")
    """distillation terms with names"""


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was stopped or killed, in its own folder, from checkpoints/last.ckpt, or from the start
    when there is none yet. On the CPU the result is bit for bit that of a run that was never stopped. Further arguments
    are settings as fit takes them, e.g. --trainer.max_epochs 60."""

    run: Path
    """a run folder"""
    allow_code: bool = argument(False)
    """run the classes that the folder of somebody else names"""


def of(verb: str, args: Sequence[str]) -> Any:
    """The arguments of ``verb`` as its door in :mod:`lqkd.cli.verbs` takes them.

    Raises:
        UsageError: after a user's mistake.
        SystemExit: after one about the arguments, told in one line (status 2), and after ``--help``.
    """
    if verb == "compare":
        from lqkd.studies.settings import read_settings

        compared = read("compare", Compare, args)
        read_it = read_settings(compared.config, compared.root, compared.name, compared.seeds, compared.set)
        return (*read_it, compared.retry_failed)
    if verb == "distill":
        distilled = read(verb, Distill, args)
        Asked(**{name: value for name, value in vars(distilled).items() if name != "out"})  # refuses what cannot be
        return distilled
    if verb == "report":
        report = read(verb, Report, args)
        _check_exists(report.folder, "the folder of a run or a study")
        return report
    if verb == "wandb-report":
        asked = read(verb, WandbReport, args)
        entity, _, project = asked.project.partition("/")
        if not (entity and project):
            raise UsageError(f"{asked.project!r} names no project of W&B: give ENTITY/PROJECT")
        return entity, project, asked.monitor, asked.terms
    if verb == "make-shards":
        packed = read(verb, MakeShards, args)
        _check_exists(packed.source, "a folder with train/CLASS/IMAGE and val/CLASS/IMAGE")
        if packed.shard_mb < 1:
            raise UsageError(f"--shard-mb {packed.shard_mb} is not possible: it must be at least 1")
        return packed
    kind, wanted = {
        "export": (Export, "the folder of a finished training"),
        "predict": (Predict, "a run folder, or a file that export wrote"),
        "sensitivity": (Sensitivity, "a run folder or a config file"),
    }[verb]
    given: Any = read(verb, kind, args)
    _check_exists(given.run, wanted)
    if verb == "predict":
        _check_asked(given)
    missing = [name for name in ("onnx", "onnxruntime") if verb == "export" and find_spec(name) is None]
    if missing:
        raise UsageError(f"export needs {missing[0]}: pip install 'lqkd[export]'")
    if verb == "export" and given.hub is not None and given.output is not None:
        raise UsageError(f"--output {given.output!r} is not possible with --hub: the file is {given.hub}/model.onnx")
    return given


def _check_asked(given: Predict) -> None:
    """Refuse images beside a prompt, neither of both, and options of the other one."""
    if bool(given.images) == bool(given.prompt):
        what = "both are" if given.images else "neither is"
        raise UsageError(f"predict takes image files, or --prompt TEXT of a language model: {what} given")
    others = ("output",) if given.prompt else ("tokens", "temperature", "seed")
    wrong = next((name for name in others if getattr(given, name) is not None), None)
    if wrong is not None:
        kind = "with --prompt" if given.prompt else "with images: it is for --prompt"
        raise UsageError(f"--{wrong} {getattr(given, wrong)} is not possible {kind}")
    if given.seed is not None and not given.temperature:
        raise UsageError(
            f"--seed {given.seed} does nothing without a temperature, where the most probable token is taken: give a "
            "--temperature above 0 to draw"
        )


def names_images(args: Sequence[str]) -> bool:
    """Whether the arguments of ``predict`` name a run or file, or ask how; those of LightningCLI are all options."""
    options = ("--prompt", "--tokens", "--temperature", "--seed", "--top-k", "--json", "--allow-code", "--help", "-h")
    return bool(args) and (not args[0].startswith("-") or args[0].partition("=")[0] in options)


def of_resume(args: Sequence[str]) -> tuple[Resume, list[str]]:
    """The verb's own arguments, and the settings for ``fit``.

    Raises:
        UsageError: when the folder is no run's, or a setting is not possible.
        SystemExit: as for :func:`of`.
    """
    given, settings = read_known("resume", Resume, args)
    if any(setting.partition("=")[0] == "--ckpt_path" for setting in settings):
        raise UsageError("--ckpt_path is not possible with resume: it goes on from the run's own checkpoints/last.ckpt")
    check_resumable(given.run)
    return given, settings


def _check_exists(given: str | Path, wanted: str) -> None:
    if not Path(given).exists():
        raise UsageError(f"{str(given)!r} does not exist: give {wanted}")
