"""The command line: ``python -m lqkd fit | validate | test | predict | sensitivity | export``."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lqkd.callbacks import AtomicCheckpointIO, BestAndLast, ProgressBar, RegularizerMonitor, RunLogger, RunSummary
from lqkd.callbacks.checkpoint import BEST
from lqkd.callbacks.run_summary import SUMMARY, best_checkpoint
from lqkd.errors import UsageError, first_line
from lqkd.files import atomic_path, write_text
from lqkd.modules import DistillModule
from lqkd.modules.base import ImageClassifier
from lqkd.modules.optimizers import SETTINGS_IN_CHECKPOINT
from lqkd.modules.trainer_checks import check_trainer_settings
from lqkd.parser import OneLineParser
from lqkd.run_folder import RunSettings, claim

CONFIG = "config.yaml"
LAYERS = "layers.txt"
CHECKPOINTS = "checkpoints"
DESCRIPTION = (
    "Distil networks into low-bit ones through a learnable regularizer. Besides the subcommands below, "
    "'sensitivity RUN' ranks the layers of a run by what few bits cost each, 'export RUN' writes its student as an "
    "integer ONNX file, and 'predict RUN IMAGE...' tells the classes of image files (see sensitivity --help, "
    "export --help, predict RUN --help)."
)


class LqkdCLI(LightningCLI):
    """LightningCLI with a folder for every run.

    ``fit`` claims a new run folder, keeps its config, checkpoints, metrics and summary there and ends with a test of
    the checkpoint that was best on the validation split. The other verbs read a run folder and never write to it,
    but for ``predict``, which adds ``predictions.csv``. Settings from the command line and the config win over those
    in a checkpoint.
    """

    run_folder: Path | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=RunSettings, default=RunSettings(), help="Where the run keeps what it makes.")

    # ---- before anything is built

    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        _check_loggers(trainer.logger)
        if issubclass(_class_of(self._get(self.config, "model")), DistillModule):
            check_trainer_settings(trainer.precision, trainer.gradient_clip_val, trainer.accumulate_grad_batches)
        self.config_text = self._config_text()

    def _config_text(self) -> str:
        """The configuration of this run as it is kept: complete, and without the checkpoint it may start from."""
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        config["ckpt_path"] = None
        return self._parser(self.subcommand).dump(config, skip_none=False)

    def _parse_ckpt_path(self) -> None:
        """Choose the checkpoint; unlike Lightning's, never take settings from it, only say where they differ."""
        if not self.config.get("subcommand"):
            return
        verb = self.config.subcommand
        config = self.config[verb]
        if config.get("ckpt_path") is None and verb != "fit":
            config["ckpt_path"] = self._best_beside_config(config)
        path = config.get("ckpt_path")
        if path is None:
            return
        if not Path(path).is_file():
            raise UsageError(f"ckpt_path={str(path)!r} does not exist: give a .ckpt file of a run folder")
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
            saved = dict(checkpoint["hyper_parameters"]) if "pytorch-lightning_version" in checkpoint else None
        except Exception as error:  # a damaged or foreign file raises many types
            raise UsageError(
                f"ckpt_path={str(path)!r} is not a checkpoint that can be read ({first_line(error)})"
            ) from error
        if saved is None:
            raise UsageError(f"ckpt_path={str(path)!r} is not a checkpoint of a training: give a .ckpt of a run folder")
        current = yaml.safe_load(self._parser(verb).dump(config, skip_none=False))["model"]
        current = {"_class_path": current["class_path"], **current.get("init_args", {})}
        saved.pop("_instantiator", None)
        for key, line in _differences(saved, current):
            if verb == "fit" and key in SETTINGS_IN_CHECKPOINT:
                raise UsageError(f"{line}: the checkpoint holds its state, so a resumed run must keep it")
            rank_zero_info(f"differs from the checkpoint: {line}")

    def _best_beside_config(self, config: Any) -> str | None:
        for source in config.get("config") or ():
            best = Path(str(source)).resolve().parent / CHECKPOINTS / BEST
            if best.is_file():
                rank_zero_info(f"using the best checkpoint of the run: {best}")
                return str(best)
        raise UsageError("ckpt_path is missing: give one, or a --config that lies in a run folder with checkpoints")

    # ---- building

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.subcommand is not None
        config = self._get(self.config_init, "trainer")
        given = config.logger if isinstance(config.logger, list) else [config.logger]
        loggers = [logger for logger in given if logger is not None and not isinstance(logger, bool)]
        callbacks = list(config.callbacks or [])
        writes = self.subcommand == "fit" and not config.fast_dev_run
        if writes:
            self.run_folder = claim(self._get(self.config_init, "run"))
            for logger in loggers:
                _move_into(logger, self.run_folder)
            loggers = [RunLogger(self.run_folder), *loggers]
        callbacks += [d for d in self._default_callbacks(config) if not any(isinstance(c, type(d)) for c in callbacks)]
        try:
            return super().instantiate_trainer(
                **{"logger": loggers if writes else False, "callbacks": callbacks, **kwargs}
            )
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            self._release()
            raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from error

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "predict" and self.trainer.world_size > 1:
            raise UsageError(f"trainer.devices={self.trainer.world_size} is not possible for predict: use one device")
        try:
            super()._run_subcommand(subcommand)
        except UsageError:
            self._release()
            raise

    def _release(self) -> None:
        """Remove a run folder in which nothing has happened yet."""
        if self.run_folder is None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        if {path.name for path in self.run_folder.rglob("*")} <= {CONFIG, LAYERS}:
            shutil.rmtree(self.run_folder)

    def _default_callbacks(self, config: Any) -> list[Callback]:
        callbacks: list[Callback] = [RunSummary()]
        if isinstance(self.model, DistillModule):
            callbacks.insert(0, RegularizerMonitor())
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        if self.run_folder is not None:
            callbacks.append(_KeepRun(self.config_text))
            if config.enable_checkpointing is not False:
                callbacks.append(BestAndLast(self.run_folder / CHECKPOINTS, validates=config.limit_val_batches != 0))
        return callbacks

    # ---- after the verbs

    def after_fit(self) -> None:
        if self.run_folder is None:
            return
        if self.datamodule is not None and is_overridden("test_dataloader", self.datamodule, LightningDataModule):
            checkpoint = best_checkpoint(self.trainer)
            best = (checkpoint.best_model_path or None) if checkpoint is not None else None
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        _print_summary(self.run_folder)

    def predict(self, model: ImageClassifier, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Predict and write ``predictions.csv`` into the run folder of the checkpoint."""
        batches = self.trainer.predict(model, datamodule=datamodule, **kwargs)
        assert batches is not None
        names = getattr(datamodule, "class_names", ())
        checkpoint = Path(str(kwargs.get("ckpt_path"))).resolve()
        folder = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else Path.cwd()
        _write_predictions(folder / "predictions.csv", [torch.as_tensor(batch) for batch in batches], names)


class _KeepRun(Callback):
    """Makes checkpoints atomic and keeps the run's configuration and list of layers beside them."""

    def __init__(self, config_text: str) -> None:
        self.config_text = config_text

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        logger = next(logger for logger in trainer.loggers if isinstance(logger, RunLogger))
        write_text(logger.folder / CONFIG, self.config_text)
        if isinstance(pl_module, DistillModule):
            write_text(logger.folder / LAYERS, f"{pl_module.coverage}\n")
            print(pl_module.coverage.summary())


def _class_of(config: Any) -> type:
    module, _, name = config["class_path"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _check_loggers(given: Any) -> None:
    for logger in given if isinstance(given, list) else [given]:
        name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
        package = {"WandbLogger": "wandb", "TensorBoardLogger": "tensorboard"}.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise UsageError(f"trainer.logger={name} needs {package}: pip install 'lqkd[{package}]'")


def _move_into(logger: Any, folder: Path) -> None:
    """Let a logger whose ``save_dir`` is left at "." write into the run folder."""
    for attribute in ("_save_dir", "_root_dir"):
        if str(getattr(logger, attribute, "")) == ".":
            setattr(logger, attribute, str(folder))
    options = getattr(logger, "_wandb_init", None)
    if isinstance(options, dict) and str(options.get("dir")) == ".":
        options["dir"] = str(folder)


def _differences(saved: Any, current: Any, prefix: str = "model") -> Iterator[tuple[str, str]]:
    """Name of every setting that differs, and a line that says how."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            yield from _differences(saved.get(key), current.get(key), f"{prefix}.{key}")
    elif saved != current:
        yield prefix, f"{prefix} was {saved!r} and is now {current!r}"


@rank_zero_only
def _write_predictions(target: Path, batches: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    probabilities = torch.cat(list(batches))
    confidence, winner = probabilities.max(dim=1)
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("index", "class", "confidence"))
        for index, (value, label) in enumerate(zip(confidence.tolist(), winner.tolist(), strict=True)):
            writer.writerow((index, names[label] if names else label, f"{value:.6f}"))
    print(f"{len(winner)} predictions written to {target}")


@rank_zero_only
def _print_summary(folder: Path) -> None:
    """The table that ends a run: accuracies on the test split, sizes, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    bits = f"W{summary['weight_bits']} A{summary['activation_bits']}" if summary["weight_bits"] else "float"
    table = Table(title=f"{bits}: accuracy on the test split")
    for column in ("network", "top-1", "size"):
        table.add_column(column, justify="left" if column == "network" else "right")
    float_size, packed_size = (f"{summary[key] / 1000:.1f} kB" for key in ("float_bytes", "packed_bytes"))
    rows = [
        ("teacher", "teacher_accuracy", ""),
        ("student in float", "student_float_accuracy", float_size),
        ("student before training", "student_initial_quantized_accuracy", packed_size),
        ("student" if summary["weight_bits"] else "network", "test_accuracy", packed_size),
    ]
    for name, key, shown_size in rows:
        if summary[key] is not None:
            table.add_row(name, f"{summary[key]:.2%}", shown_size)
    console = Console()
    console.print(table)
    if summary["regularizer"]:
        console.print(summary["regularizer"].get("sentence") or "", soft_wrap=True)
    console.print(f"run folder: {folder}", soft_wrap=True)


def _silence_noise() -> None:
    """Drop messages that are not about the user's run: advertisements, and warnings that lqkd has dealt with."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint need to be provided")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 after a user's mistake, told in one line."""
    torch.set_float32_matmul_precision("high")
    _silence_noise()
    given = sys.argv[1:] if args is None else list(args)
    try:
        if given[:1] == ["sensitivity"]:
            from lqkd import sensitivity  # it reads runs through this module

            sensitivity.main(given[1:])
            return 0
        if given[:1] == ["export"]:
            from lqkd.export import command

            return command.main(given[1:])
        if given[:1] == ["predict"]:
            from lqkd import predict

            if predict.is_ours(given[1:]):
                return predict.main(given[1:])
        LqkdCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=OneLineParser,
            parser_kwargs={"description": DESCRIPTION},
            args=None if args is None else given,
        )
    except ValueError as error:
        usage = _usage_error(error)
        if usage is None:
            raise
        print(f"lqkd: error: {usage}", file=sys.stderr)
        return 2
    return 0


def _usage_error(error: BaseException | None) -> UsageError | None:
    """The user's mistake behind ``error``: the argument parser wraps what a class raises while it is built."""
    while error is not None and not isinstance(error, UsageError):
        error = error.__cause__
    return error
