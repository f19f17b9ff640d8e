"""Lightning's verbs ``fit``, ``validate``, ``test`` and ``predict``, in run folders."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lqkd.callbacks import ProgressBar, RegularizerMonitor
from lqkd.callbacks.box_pictures import BoxPictures
from lqkd.callbacks.predictions import Predictions
from lqkd.data import DetectionFolder, ImageFolder, SegmentationFolder
from lqkd.data.reading import collation_problem
from lqkd.errors import DivergenceError, FullDiskError, LostProcessError, Stopped, UsageError, first_line
from lqkd.models.finite import not_finite
from lqkd.models.weight_files import weights_exist
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.modules.devices import check_devices
from lqkd.modules.optimizers import SETTINGS_IN_CHECKPOINT
from lqkd.modules.trainer_checks import check_trainer_numbers, check_trainer_settings
from lqkd.runs import BestAndLast, RunLogger, RunSummary
from lqkd.runs.description import Description
from lqkd.runs.folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    SPLIT,
    SUMMARY,
    RunSettings,
    check_seed,
    claim,
    forget_claimed,
    lock,
    release,
    remove_partial_files,
    restarted,
)
from lqkd.runs.logger import LogEveryEpoch
from lqkd.runs.outcome import print_outcome
from lqkd.runs.parser import OneLineParser, of_constructor
from lqkd.runs.provenance import foreign_code, remember_code
from lqkd.runs.quiet import quiet
from lqkd.runs.resume import Resumption, check_place, differences, find, limits, record_start
from lqkd.runs.resume_state import LIMITS
from lqkd.runs.stopping import StopOnSignal, how_to_resume, lost_a_process
from lqkd.runs.summary import best_checkpoint
from lqkd.tasks import BoxDetection, Classification, Task
from lqkd.utils.files import write_text
from lqkd.utils.yaml_text import load_yaml

_MORE = (
    "Settings of a model, data or another class: fit --model.help lqkd.modules.DistillModule, fit --data.help "
    "lqkd.data.Digits; all values of a config: fit --config CONFIG --print_config. --allow-code runs what the run "
    "folder of somebody else names."
)
_ABOUT = {
    "fit": {
        "description": "Train as a config says, in a new run folder, and test the best checkpoint.",
        "epilog": _MORE,
    },
    "validate": {
        "description": "Measure the best checkpoint beside a config on its validation split.",
        "epilog": _MORE,
    },
    "test": {"description": "Measure the best checkpoint beside a config on its test split.", "epilog": _MORE},
    "predict": {
        "description": "Write what a run predicts for its own test split into predictions.csv, and arrays beside it.",
        "epilog": _MORE,
    },
}
"""What the help of Lightning's verbs says."""
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LqkdCLI(LightningCLI):
    """LightningCLI with a folder for every run.

    ``fit`` claims a new run folder, keeps its config, checkpoints, metrics and summary there and ends with a test of
    the checkpoint that was best on the validation split. The other verbs read a run folder and never write to it,
    but for ``predict``, which adds ``predictions.csv`` and what it names. Settings from the command line and the config
    win over those in a checkpoint.

    Args:
        args: the verb and what follows it.
        resumption: the run that ``fit`` goes on with instead of claiming a folder; a run that torchrun or SLURM has
            started once more finds it itself.
        of_distillation: callbacks for a DistillModule besides those that every run has.
        outcome: whether ``fit`` ends with a table of what it came to.
        seed: the default of ``seed_everything``; False seeds nothing.
        parser_kwargs: arguments of the parser; what each verb's help says by default.
    """

    run_folder: Path | None = None
    locked: int | None = None

    def __init__(
        self,
        args: list[str],
        resumption: Resumption | None = None,
        of_distillation: Sequence[Callback] = (),
        outcome: bool = True,
        seed: int | bool = 0,
        parser_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.resumption = resumption
        self.of_distillation = list(of_distillation)
        self.outcome = outcome
        self.by_request = resumption is not None
        self.verb = args[0]
        torch.set_float32_matmul_precision("high")
        try:
            with quiet():
                super().__init__(
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_callback=None,
                    auto_configure_optimizers=False,
                    seed_everything_default=seed,
                    parser_class=OneLineParser,
                    parser_kwargs={self.verb: _ABOUT[self.verb]} if parser_kwargs is None else parser_kwargs,
                    args=args,
                )
        except (KeyboardInterrupt, Stopped) as stop:
            if not getattr(stop, "message", ""):  # before the verb began: the same command starts again
                self._release()
            raise
        finally:
            if self.locked is not None:
                os.close(self.locked)
            if getattr(rank_zero_only, "rank", 0) == 0:
                forget_claimed()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's knows no instance
        """The verb that is run alone: each parser is built at every start, and looked through for every setting."""
        return {self.verb: super().subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=RunSettings, default=RunSettings(), help="Where the run keeps what it makes.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if isinstance(parser, OneLineParser):
            parser.verb = self.verb  # whose help an error points to
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and seed is not None:
            check_seed("seed_everything", seed)

    # ---- before anything is built

    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        _check_loggers(trainer.logger)
        if self.subcommand == "fit":
            check_trainer_numbers(trainer)
        if issubclass(_class_of(self._get(self.config, "model")), DistillModule):
            check_trainer_settings(trainer)
        self.config_text = self._config_text()
        self.config_dump = self._settings()  # what checkpoints keep; Lightning would dump once more
        if self.subcommand == "fit":
            self._remember_code()
        if self.config[self.subcommand].get("ckpt_path") is not None:
            self._do_without_files_of_weights()

    def _settings(self) -> Any:
        return load_yaml(self.config_text, CONFIG)

    def _remember_code(self) -> None:
        """Note what this run names, but for what a folder named before that it goes on in."""
        settings: Any = self._settings()
        if self.resumption is not None:
            kept = load_yaml((self.resumption.folder / CONFIG).read_text(encoding="utf-8"), CONFIG)
            settings = sorted(foreign_code(settings) - foreign_code(kept))
        remember_code(settings)

    def _do_without_files_of_weights(self) -> None:
        """The checkpoint has the weights: a run may have been moved away from the files that it started from."""
        models = [self._get(self.config, "model"), self.config_dump["model"]]
        if self.subcommand != "fit":
            forget_weights(models)  # the teacher's, too, who is not asked
            return
        for key in ("student_weights", "weights"):
            source = models[0].get("init_args", {}).get(key)
            if isinstance(source, str) and not weights_exist(source):
                rank_zero_info(f"{key}={source!r} are no longer there: the checkpoint has the weights")
                for model in models:
                    model["init_args"][key] = None

    def _config_text(self) -> str:
        """The configuration of this run as it is kept: complete, and without the checkpoint it may start from."""
        config = self.config[self.subcommand].clone()
        config.pop("config", None)
        config["ckpt_path"] = None
        return self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)  # parsing validated it

    def _parse_ckpt_path(self) -> None:
        """Choose the checkpoint; unlike Lightning's, never take settings from it, only say where they differ."""
        if not self.config.get("subcommand"):
            return
        verb = self.config.subcommand
        config = self.config[verb]
        if verb == "fit":
            self._find_resumption(config)
        if config.get("ckpt_path") is None and verb != "fit":
            config["ckpt_path"] = self._best_beside_config(config)
        path = config.get("ckpt_path")
        if path is None:
            return
        if not Path(path).is_file():
            raise UsageError(f"ckpt_path={str(path)!r} does not exist: give a .ckpt file of a run folder")
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu")
            saved = dict(checkpoint.get("hyper_parameters", {})) if "pytorch-lightning_version" in checkpoint else None
            diverged = not_finite(checkpoint["state_dict"], ()) if saved is not None and verb != "fit" else None
        except Exception as error:  # a damaged or foreign file raises many types
            raise UsageError(
                f"ckpt_path={str(path)!r} is not a checkpoint that can be read ({first_line(error)})"
            ) from error
        if saved is None:
            raise UsageError(f"ckpt_path={str(path)!r} is not a checkpoint of a training: give a .ckpt of a run folder")
        if diverged is not None:
            raise UsageError(f"ckpt_path={str(path)!r} is of a training that diverged: {diverged}")
        current = load_yaml(self._parser(verb).dump(config, skip_none=False), CONFIG)["model"]
        current = {"_class_path": current["class_path"], **current.get("init_args", {})}
        saved.pop("_instantiator", None)
        for key, line in differences(saved, current):
            if verb == "fit" and key in SETTINGS_IN_CHECKPOINT:
                raise UsageError(f"{line}: the checkpoint holds its state, so a resumed run must keep it")
            rank_zero_info(f"differs from the checkpoint: {line}")

    def _find_resumption(self, config: Any) -> None:
        if self.resumption is None and (folder := restarted(RunSettings(**config["run"].as_dict()))) is not None:
            self.resumption = find(folder)
        if self.resumption is not None:
            check_place(self.resumption.folder, config["run"])
            if self.resumption.checkpoint is not None:
                config["ckpt_path"] = str(self.resumption.checkpoint)
            rank_zero_info(str(self.resumption))

    def _best_beside_config(self, config: Any) -> str | None:
        for source in config.get("config") or ():
            best = Path(str(source)).resolve().parent / CHECKPOINTS / BEST
            if best.is_file():
                rank_zero_info(f"using the best checkpoint of the run: {best}")
                return str(best)
        raise UsageError("ckpt_path is missing: give one, or a --config that lies in a run folder with checkpoints")

    # ---- building

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:
            told = of_constructor(error)
            if told is None:
                raise
            raise UsageError(told) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        assert self.subcommand is not None
        config = self._get(self.config_init, "trainer")
        check_devices(config)
        given = config.logger if isinstance(config.logger, list) else [config.logger]
        loggers = [logger for logger in given if logger is not None and not isinstance(logger, bool)]
        callbacks = list(config.callbacks or [])
        writes = self.subcommand == "fit" and not config.fast_dev_run
        if writes:
            loggers = self._open_run_folder(loggers)
        if config.log_every_n_steps is None:
            callbacks.append(LogEveryEpoch())
            warnings.filterwarnings("ignore", message=r".*is smaller than the logging interval")
        callbacks += [d for d in self._default_callbacks(config) if not any(isinstance(c, type(d)) for c in callbacks)]
        # The header of a run says more than Lightning's table of modules, which is for those who ask for it.
        table = {"enable_model_summary": False} if config.enable_model_summary is None else {}
        try:
            return super().instantiate_trainer(
                **{"logger": loggers if writes else False, "callbacks": callbacks, **table, **kwargs}
            )
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            self._release()
            raise UsageError(f"the Trainer refuses these settings: {first_line(error)}") from error

    def _open_run_folder(self, loggers: list[Any]) -> list[Any]:
        """Claim a new folder, or take that of the run to resume; all loggers, those given writing into it."""
        if self.resumption is None:
            folder = claim(self._get(self.config_init, "run"), self.config_text)
        else:
            folder = self.resumption.folder
        if getattr(rank_zero_only, "rank", 0) == 0:
            self.locked = lock(folder)
            remove_partial_files(folder)
        self.run_folder = folder
        for logger in loggers:
            _move_into(logger, folder)
        record_start(folder, self.resumption, self.config_text, loggers)
        return [RunLogger(folder, rows=None if self.resumption is None else self.resumption.rows), *loggers]

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "predict" and self.trainer.world_size > 1:
            raise UsageError(f"trainer.devices={self.trainer.world_size} is not possible for predict: use one device")
        try:
            super()._run_subcommand(subcommand)
        except UsageError:
            self._release()
            raise
        except MisconfigurationException as error:  # which some of its settings and callbacks raise here only
            self._release()
            raise UsageError(f"Lightning refuses these settings: {first_line(error)}") from error
        except OSError as error:
            if error.errno in _FULL_DISK and self.run_folder is not None:
                name = error.filename or error.filename2
                place = f" while writing {name}" if name else ""
                raise FullDiskError(
                    f"{error.strerror}{place}: what was saved before is whole; make room, then {self._how_to_go_on()}"
                ) from error
            raise
        except (RuntimeError, TypeError, LookupError) as error:
            problem = collation_problem(error)  # of a later batch, or without a training
            if problem is not None:
                raise UsageError(f"a DataLoader cannot make a batch: {problem}") from error
            if isinstance(error, DivergenceError) or not lost_a_process(error):
                raise
            raise LostProcessError(
                f"another process of this training has ended or hangs ({first_line(error)}): what it printed says why; "
                f"{self._how_to_go_on()}"
            ) from error
        except KeyboardInterrupt as interrupt:  # a second one, while the first ends the training
            raise Stopped(signal.SIGINT, f"interrupted; {self._how_to_go_on()}") from interrupt
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException) or (isinstance(stop, Stopped) and not stop.message):
                raise Stopped(signal.SIGTERM, f"stopped by SIGTERM; {self._how_to_go_on()}") from stop
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise Stopped(signal.SIGINT, f"interrupted; {self._how_to_go_on()}") from stop
            raise

    def _how_to_go_on(self) -> str:
        """The command that goes on: the same once more while the settings that it gave are not in the run's folder."""
        config = None if self.run_folder is None else self.run_folder / CONFIG
        kept = config is not None and config.is_file() and config.read_text(encoding="utf-8") == self.config_text
        return how_to_resume(self.run_folder if kept else None)

    def _release(self) -> None:
        """Remove a run folder in which nothing has happened yet."""
        if self.run_folder is None or self.resumption is not None or getattr(rank_zero_only, "rank", 0) != 0:
            return
        release(self.run_folder)

    def _default_callbacks(self, config: Any) -> list[Callback]:
        callbacks: list[Callback] = [RunSummary()]
        if isinstance(self.model, DistillModule):
            callbacks.insert(0, RegularizerMonitor())
            callbacks += self.of_distillation
        if isinstance(_task_of(self.model), BoxDetection):
            callbacks.append(BoxPictures())
        if config.enable_progress_bar is not False:
            callbacks.append(ProgressBar())
        if self.run_folder is not None:
            trainer = self._settings()["trainer"]
            finished = self.resumption.finished(trainer) if self.resumption is not None and self.by_request else None
            callbacks.append(_KeepRun(self.config_text, limits(trainer), finished))
            callbacks.append(StopOnSignal())
            if config.enable_checkpointing is not False:
                every = self._get(self.config_init, "run").save_every_n_steps
                folder = self.run_folder / CHECKPOINTS
                task = _task_of(self.model)
                validates = config.limit_val_batches != 0
                callbacks.append(BestAndLast(folder, validates, every, task.monitor, task.mode))
        return callbacks

    # ---- after the verbs

    def after_fit(self) -> None:
        if self.run_folder is None:
            return
        if self.datamodule is not None and is_overridden("test_dataloader", self.datamodule, LightningDataModule):
            checkpoint = best_checkpoint(self.trainer)
            best = (checkpoint.best_model_path or None) if checkpoint is not None else None
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunSummary):
                callback.finish(self.trainer)
        if self.outcome and (self.run_folder / SUMMARY).is_file():  # a module that is not lqkd's leaves none
            print_outcome(self.run_folder)

    def predict(self, model: TaskModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Predict and write ``predictions.csv`` into the run folder of the checkpoint; see :class:`Predictions`.

        Predictions that are arrays go into its folder ``predictions``.

        Raises:
            UsageError: when the data have no test split.
        """
        if not is_overridden("predict_dataloader", datamodule, LightningDataModule):
            if not is_overridden("test_dataloader", datamodule, LightningDataModule):
                raise UsageError("data has no test split to predict: give the DataModule a test_dataloader")
            datamodule.predict_dataloader = lambda: _test_batches(datamodule)  # type: ignore[method-assign]
        checkpoint = Path(str(kwargs.get("ckpt_path"))).resolve()
        folder = checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else Path.cwd()
        predictions = Predictions(_task_of(model), folder / "predictions")
        self.trainer.callbacks.append(predictions)  # type: ignore[attr-defined]
        self.trainer.predict(model, datamodule=datamodule, **{**kwargs, "return_predictions": False})
        files = datamodule.test_files() if hasattr(datamodule, "test_files") else ()
        predictions.write(folder / "predictions.csv", files)


class _KeepRun(Description):
    """Also keeps the run's configuration and split of images, and in every checkpoint how much was asked for.

    Args:
        config_text: the configuration.
        asked: :func:`lqkd.runs.resume.limits` of it, which every checkpoint keeps.
        finished: a sentence when it asks for nothing that is not done.

    Raises:
        UsageError: before anything is trained, when all is done: settings would have no effect.
    """

    def __init__(self, config_text: str, asked: dict[str, Any], finished: str | None) -> None:
        super().__init__()
        self.config_text = config_text
        self.asked = asked
        self.finished = finished

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[LIMITS] = self.asked

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.finished is not None:
            raise UsageError(f"settings have no effect unless they ask for more training: {self.finished}")
        super().on_fit_start(trainer, pl_module)
        self._keep_split(trainer)

    @rank_zero_only
    def _keep_split(self, trainer: Trainer) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, (DetectionFolder, ImageFolder, SegmentationFolder)):
            data.write_split(self._folder(trainer) / SPLIT)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Settings that a resumed run changes are kept once its state has been restored: they are possible."""
        write_text(self._folder(trainer) / CONFIG, self.config_text)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return next(logger.run_folder for logger in trainer.loggers if isinstance(logger, RunLogger))


def _task_of(model: Any) -> Task:
    """What a module was trained for; images are classified by one that is not lqkd's."""
    return model.task if isinstance(model, TaskModule) else Classification()


def _test_batches(datamodule: LightningDataModule) -> Iterator[Any]:
    """No DataLoader, which Lightning would build anew for predictions, out of arguments that it may not know."""
    datamodule.setup("test")
    return iter(datamodule.test_dataloader())


def forget_weights(settings: Any) -> None:
    """Set to null whatever names a file of weights, in place."""
    if isinstance(settings, list):
        for entry in settings:
            forget_weights(entry)
    elif isinstance(settings, (Namespace, dict)):
        for key, value in list(vars(settings).items() if isinstance(settings, Namespace) else settings.items()):
            if key in ("weights", "student_weights") and isinstance(value, str):
                settings[key] = None
            else:
                forget_weights(value)


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
