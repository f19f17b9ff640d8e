"""``summary.json`` and the network itself: what a run leaves behind for people and for later tools."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lqkd.callbacks.folder import run_folder_of
from lqkd.callbacks.regularizer.monitor import RegularizerMonitor
from lqkd.data.text import tokenizer_said
from lqkd.modules import DistillModule
from lqkd.modules.base import TaskModule
from lqkd.modules.references import REFERENCES
from lqkd.quantization import bit_operations, size
from lqkd.quantization.layers import QuantizedLayer
from lqkd.runs.artifact import keep_artifact
from lqkd.runs.checkpoint import BestAndLast
from lqkd.runs.folder import NETWORKS, SUMMARY
from lqkd.runs.logger import flush_table
from lqkd.utils.files import finite, write_json, write_safetensors


class RunSummary(Callback):
    """Writes ``summary.json`` and ``student.safetensors`` (``network.safetensors`` in float training).

    Both describe the checkpoint that is the best on the validation split by the task's metric. The summary is written
    when training ends and completed when a test has run; ``finished`` says whether anything is still to come. Both are
    removed when a training goes on that had ended. Values that are not known or not finite are null; a warning names
    the latter.
    """

    def __init__(self) -> None:
        self.train_seconds = 0.0
        self.images = 0
        self.values: dict[str, Any] = {}
        self._balance: dict[str, float] = {}
        self._started: float | None = None  # within an epoch
        self._validation_started = 0.0
        self._validated_step = -1

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return {"train_seconds": self.train_seconds + running, "images": self.images, "balance": self._balance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_seconds, self.images = state_dict["train_seconds"], state_dict["images"]
        self._balance = state_dict.get("balance", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = _now(pl_module)  # a training that is resumed within an epoch does not start it again
        self._forget_end(trainer)

    @rank_zero_only
    def _forget_end(self, trainer: Trainer) -> None:
        """Remove what tells of a training that had ended: it will be of another state."""
        folder = run_folder_of(trainer)
        for name in (SUMMARY, *NETWORKS):
            if folder is not None:
                (folder / name).unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = _now(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = _now(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._started is not None:
            self._started += _now(pl_module) - self._validation_started  # validation is no training time
        if not trainer.sanity_checking:
            self._validated_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._started is not None
        self.train_seconds += _now(pl_module) - self._started
        self._started = None
        self._balance = _balance(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.images += _samples(pl_module, batch) * trainer.world_size

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, TaskModule):
            self.values = self._collect(trainer, pl_module)
            self._write(trainer)
            self._write_network(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.values:  # a test alone describes no run
            return
        score = trainer.callback_metrics.get(f"test/{self.values['metric'].removeprefix('val/')}")
        measured = math.nan if score is None else float(score)
        self.values["test"] = None if math.isnan(measured) else measured  # as it is of a split without labels
        self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Nothing follows any more: neither training nor a test."""
        if self.values and not self.values["finished"]:
            self.values["finished"] = True
            flush_table(trainer)  # first, so that a run that says it is finished has all its metrics
            self._write(trainer)
            self._tell_loggers(trainer)

    def _collect(self, trainer: Trainer, module: TaskModule) -> dict[str, Any]:
        network = module.product()
        best = self._best_score(trainer, module)
        measured = size(network)
        inputs = module.example_inputs()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitor = next((c for c in callbacks if isinstance(c, RegularizerMonitor)), None)
        distills = isinstance(module, DistillModule)
        values: dict[str, Any] = {
            "seed": _seed(),
            "versions": _versions(),
            "machine": f"{platform.machine()}, {module.device.type}, {torch.get_num_threads()} threads",
        }
        values |= module.references if isinstance(module, DistillModule) else dict.fromkeys(REFERENCES)
        weight_bits, activation_bits = _bits(network)
        values |= {
            "metric": module.task.monitor,
            "mode": module.task.mode,
            "val": best,
            "test": None,
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "parameters": measured.parameters,
            "packed_bytes": measured.packed_bytes,
            "float_bytes": measured.float_bytes,
            "bit_operations": None
            if inputs is None
            else bit_operations(network, *inputs.args, keywords=inputs.keywords),
            "images_per_second": round(self.images / self.train_seconds, 1) if self.train_seconds else None,
            "train_seconds": round(self.train_seconds, 2),
            "compile_seconds": round(module.compilation.seconds, 2) or None,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "regularizer": monitor.summary() if monitor is not None and distills else None,
            "balance": self._balance if distills else None,
            "trust": module.trust or None if isinstance(module, DistillModule) else None,
            "finished": False,
            "warnings": [text for source in (module, *callbacks) for text in getattr(source, "warnings", [])],
        }
        return values

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        folder = run_folder_of(trainer)
        if folder is None:
            return
        lost: list[str] = []
        values = finite(self.values, lost)
        if lost:
            values["warnings"].append(f"null stands for numbers that are not finite: {', '.join(lost)}")
        write_json(folder / SUMMARY, values)

    @rank_zero_only
    def _tell_loggers(self, trainer: Trainer) -> None:
        """Give W&B what the summary says, by name, and TensorBoard the result beside the run's hyper-parameters."""
        plain: dict[str, Any] = {
            key: value for key, value in self.values.items() if isinstance(value, int | float | str)
        }
        reached, folder = plain.get("test", plain.get("val")), run_folder_of(trainer)
        for logger in trainer.loggers:
            if folder is not None:
                keep_artifact(logger, folder, finite(plain, []))
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update({f"summary/{key}": value for key, value in plain.items()})
            if isinstance(logger, TensorBoardLogger) and reached is not None:
                logger.log_metrics({"hp_metric": reached}, step=trainer.global_step)

    @rank_zero_only
    def _write_network(self, trainer: Trainer, module: TaskModule) -> None:
        folder = run_folder_of(trainer)
        if folder is None:
            return
        name = "student" if isinstance(module, DistillModule) else "network"
        state = best_state(trainer, name) or module.product().state_dict()
        data = getattr(trainer, "datamodule", None)
        described: dict[str, Any] = {
            "lqkd": metadata.version("lqkd"),
            "val": self.values["val"],
            "class_names": list(getattr(data, "class_names", ())),
            "mean": list(getattr(data, "mean", ())),
            "std": list(getattr(data, "std", ())),
            "image_shape": list(getattr(data, "image_shape", ())),
            "resize_size": getattr(data, "resize_size", None),
            **({"whole": True} if getattr(data, "whole_images", False) else {}),
            name: module.hparams.get(name),
            "quantization": _recipe(module),
            "task": module.hparams.get("task"),
            **tokenizer_said(data),
        }
        texts = {key: json.dumps(value) for key, value in finite(described).items()}
        write_safetensors(folder / f"{name}.safetensors", state, texts)

    def _best_score(self, trainer: Trainer, module: TaskModule) -> float | None:
        """Of the checkpoint that is the best; without one, of the weights that training ended with."""
        checkpoint = best_checkpoint(trainer)
        score = None if checkpoint is None else checkpoint.best_model_score
        if score is None and self._validated_step == trainer.global_step:
            score = trainer.callback_metrics.get(module.task.monitor)
        return None if score is None else float(score)


def _recipe(module: TaskModule) -> Any:
    """The settings with which the student is quantised again: those that were given, or the task has made of them."""
    given = module.hparams.get("quantization")
    if not isinstance(module, DistillModule) or given is None:
        return given
    return asdict(module.quantization) if module.completed else given


def _samples(module: LightningModule, batch: Any) -> int:
    """Of a training batch."""
    if isinstance(module, TaskModule):
        return module.samples_in_batch
    return len(batch if isinstance(batch, Tensor) else batch[0])


def _now(module: LightningModule) -> float:
    """Seconds on a steady clock, once the device has done all that it was given."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def best_checkpoint(trainer: Trainer) -> BestAndLast | None:
    """The callback that keeps the run's best checkpoint, whatever other checkpoints a user keeps."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestAndLast)), None)


def best_state(trainer: Trainer, name: str) -> dict[str, Tensor] | None:
    """Of the module's attribute ``name``, in the run's best checkpoint, on the CPU; None without a checkpoint."""
    checkpoint = best_checkpoint(trainer)
    if checkpoint is None or not checkpoint.best_model_path:
        return None
    state = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _bits(network: torch.nn.Module) -> tuple[str | None, str | None]:
    """Distinct bits of weights and activations of quantised layers, e.g. ("4 (8 in 2 layers)", ...).

    32 is floating point, beside what else of a layer is quantised; None twice where nothing is.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, QuantizedLayer)]
    weights = [32 if layer.weight_quantizer is None else layer.weight_quantizer.bits for layer in layers]
    takers = [layer for layer in layers if layer.quantizes_input]
    inputs = [32 if layer.input_quantizer is None else layer.input_quantizer.bits for layer in takers]

    def describe(bits: list[int]) -> str:
        common = max(sorted(set(bits)), key=bits.count)
        others = [f"{b} in {bits.count(b)}" for b in sorted(set(bits)) if b != common]
        return str(common) + (f" ({', '.join(others)} layers)" if others else "")

    if not layers:
        return None, None
    return describe(weights), describe(inputs) if inputs else "32"


def _balance(trainer: Trainer) -> dict[str, float]:
    prefix = "balance/"
    metrics = trainer.callback_metrics
    return {key.removeprefix(prefix): float(value) for key, value in metrics.items() if key.startswith(prefix)}


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return None if seed is None else int(seed)


def _versions() -> dict[str, str]:
    packages = ("lqkd", "torch", "torchvision", "lightning", "torchmetrics", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
