"""Trainings whose networks are compiled: the numbers of eager ones, and what cannot be compiled is said."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from lqkd.callbacks import BitWidthScheduler, OscillationFreezing, Stage
from lqkd.cli import main
from lqkd.errors import UsageError
from lqkd.losses import HintonKL, Hints
from lqkd.modules import ClassifierModule, DistillModule, Tap, Term, compilation
from lqkd.modules.compilation import CompiledCall
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.teachers import FrozenTeacher
from lqkd.teachers.cache import TeacherCache
from tests.conftest import digits, distiller, parameters_of
from tests.recorder import Recorder

MakeTrainer = Callable[..., Trainer]
LOGGER = "lightning.pytorch.utilities.rank_zero"


def small(width: int = 4) -> nn.Sequential:
    """Tapped at 2 and 5; tracing a ResNet takes ten seconds."""
    first = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    second = [nn.Conv2d(width, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(72, 10))


def terms() -> dict[str, Any]:
    """KL and hints at two taps."""
    taps = [Tap("2", "2"), Tap("5", "5")]
    return {
        "student": small(),
        "teacher": None,
        "regularizer": None,
        "teachers": {"large": FrozenTeacher(small(8), minimum_accuracy=0.0, precision="fp32")},
        "distillation": {"logits": Term(HintonKL(), "large"), "features": Term(Hints(), "large", taps=taps)},
    }


def plain() -> dict[str, Any]:
    """One term, without taps."""
    teacher = FrozenTeacher(small(), minimum_accuracy=0.0, precision="fp32")
    return {"teacher": teacher, "teachers": None, "distillation": None}


def of_sizes(*sizes: int) -> DataLoader:
    """Batches of so many samples."""
    batches = [(torch.randn(size, 1, 8, 8), torch.randint(10, (size,))) for size in sizes]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train(
    make: MakeTrainer,
    *callbacks: Callback,
    batches: int = 4,
    epochs: int = 1,
    until: int | None = None,
    data: DataLoader | None = None,
    ckpt_path: str | None = None,
    **arguments: Any,
) -> tuple[DistillModule, list[float]]:
    """A module that was trained, and the loss of each batch; ``until``, an epoch, stops the training there."""
    torch.manual_seed(1)
    module = distiller(**terms() | arguments)
    recorder = Recorder(lambda trainer, module: float(trainer.callback_metrics["train/loss"]))
    stop = [Stop(until)] if until is not None else []
    trainer = make(callbacks=[*callbacks, recorder, *stop], max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, data or digits(batches), ckpt_path=ckpt_path, weights_only=True)
    return module, recorder.seen


class Stop(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, and run without code being generated, which takes most of the time."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    counters.clear()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if text.startswith("compile: ")]


def test_a_compiled_training_has_the_losses_and_weights_of_an_eager_one(
    traced: None, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """KL and hints at taps, batch norm, and a teacher that answers, then one that has answered into a cache."""
    eager, expected = train(make_trainer)
    for networks in (2, 1):
        before = counters["stats"]["unique_graphs"]
        cache = TeacherCache(str(tmp_path), dtype="float32")
        module, losses = train(make_trainer, compile=True, teacher_cache=cache)
        assert counters["stats"]["unique_graphs"] - before == networks
        assert losses == expected
        assert torch.equal(parameters_of(module.student), parameters_of(eager.student))
        assert not any(m._forward_hooks for network in (module.student, *module.teachers()) for m in network.modules())


def test_a_batch_of_another_size_runs_eagerly_and_that_is_told_once(
    traced: None, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", LOGGER):
        module, _ = train(make_trainer, data=of_sizes(16, 16, 8), epochs=2, compile=True, **plain())
    first, second = told(caplog)
    assert first.startswith("compile: teacher and student, in a step that took ")
    assert second == "compile: a batch of 8x1x8x8 runs eagerly, as every one that is not of 16x1x8x8 does"
    assert counters["stats"]["unique_graphs"] == 2
    assert module.compilation.seconds > 0
    assert not [text for text in module.warnings if "compile" in text]


def test_mostly_eager_batches_are_a_warning(traced: None, make_trainer: MakeTrainer) -> None:
    module, _ = train(make_trainer, data=of_sizes(16, 8, 4), compile=True, **plain())
    assert module.warnings[-1].startswith("compile: 2 of 3 batches of the teacher ran eagerly")


def test_a_switch_of_bits_compiles_the_student_once_more(
    traced: None, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    def run(compile: bool) -> list[float]:
        return train(make_trainer, BitWidthScheduler([Stage("w8a8", until_step=2)]), batches=6, compile=compile)[1]

    expected = run(False)
    with caplog.at_level("INFO", LOGGER):
        assert run(True) == expected
    assert [text.partition(", in")[0] for text in told(caplog)] == [
        "compile: the augmentation runs eagerly: on a CPU it takes longer compiled",
        "compile: teacher large and student",
        "compile: student",
    ]


def test_weights_are_frozen_in_a_compiled_student(traced: None, make_trainer: MakeTrainer) -> None:
    def run(compile: bool) -> tuple[Tensor, int]:
        freezing = OscillationFreezing(0.005, 0.005)
        module, _ = train(make_trainer, freezing, batches=7, compile=compile, student_optimizer=fast)
        return parameters_of(module.student), sum(int(s.tensors["frozen"].sum()) for s in freezing._states.values())

    (expected, frozen), (weights, also) = run(False), run(True)
    assert also == frozen > 0
    assert torch.equal(weights, expected)


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


class Looks(Callback):
    """Adds a hook to the student after the second batch."""

    def __init__(self) -> None:
        self.calls = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            pl_module.student[3].register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.calls += 1


def test_a_hook_that_comes_later_is_called(traced: None, make_trainer: MakeTrainer) -> None:
    looks = Looks()
    train(make_trainer, looks, compile=True)
    assert looks.calls >= 2


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_breaks_the_graph_is_one_sentence_that_says_where(traced: None, make_trainer: MakeTrainer) -> None:
    with pytest.raises(
        UsageError, match=r"the student is no single graph \(.*test_compilation.py.*in forward\)"
    ) as told:
        train(make_trainer, compile=True, student=nn.Sequential(small(), Asks()), **plain())
    assert "\n" not in str(told.value)


class Refuses(nn.Module):
    """Has a mistake of its own, in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and len(x) > 2:
            raise ValueError("my own mistake")
        return x


def test_a_mistake_in_a_network_is_told_as_it_is(traced: None, make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"^my own mistake$"):
        train(make_trainer, compile=True, student=nn.Sequential(small(), Refuses()), **plain())


def test_a_training_that_failed_leaves_nothing_that_the_next_one_meets_or_that_cannot_be_pickled(
    traced: None, make_trainer: MakeTrainer
) -> None:
    arguments = terms() | plain() | {"student": nn.Sequential(small(), Refuses())}
    module = distiller(compile=True, **arguments)
    for _ in range(2):
        with pytest.raises(ValueError, match="my own mistake"):
            make_trainer().fit(module, datamodule=digits())
    assert not pickle.loads(pickle.dumps(module.compilation))._calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compile": "fast"}, "compile='fast' is not possible: it is true, false or cuda_graphs"),
        ({"compile": "cuda_graphs"}, "compile='cuda_graphs' is not possible on a cpu device: use true, or"),
        (
            {
                "compile": True,
                "quantization": Recipe("w1a4", weight_quantizer="irnet", first_layer_bits=None, last_layer_bits=None),
            },
            "compile=True is not possible with quantizer IRNet, which changes in every step",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(make_trainer: MakeTrainer, arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(make_trainer, **arguments)


def test_a_compiled_training_resumes_bit_for_bit(traced: None, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole, _ = train(make_trainer, epochs=2, compile=True)
    keeper = ModelCheckpoint(tmp_path / "kept", save_last=True)
    train(make_trainer, keeper, epochs=2, until=1, compile=True)
    resumed, _ = train(make_trainer, epochs=2, compile=True, ckpt_path=keeper.last_model_path)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


def test_a_float_training_is_compiled_too(traced: None, make_trainer: MakeTrainer) -> None:
    def run(compile: bool) -> Tensor:
        torch.manual_seed(1)
        module = ClassifierModule(small(), compile=compile)
        make_trainer().fit(module, datamodule=digits(3))
        return parameters_of(module)

    expected = run(False)
    assert counters["stats"]["unique_graphs"] == 0
    assert torch.equal(run(True), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_generated_code_has_the_gradients_of_eager_operations_and_repeats_itself(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the tolerance of docs/settings.md. The largest value of the batch that quantizers are fitted to lies at the
    end of an 8-bit grid, where rounding decides whether it clips: gradients are compared on another, in float64."""
    eager, _ = quantize_model(small(), Recipe("w4a4"))
    eager.double().train()
    initialize_quantizers(eager, torch.randn(16, 1, 8, 8).double())
    student, images = copy.deepcopy(eager), torch.randn(16, 1, 8, 8).double()
    for called in (eager, CompiledCall(student, "student")):
        called(images).square().sum().backward()
    for (name, theirs), ours in zip(eager.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10, msg=name)
    monkeypatch.setenv("LQKD_COMPILE", "1")  # with the kernels in C++, as users train
    _, expected = train(make_trainer, batches=8)
    weights = [Recorder(lambda trainer, module: parameters_of(module.student)) for _ in range(2)]
    for recorder in weights:
        _, losses = train(make_trainer, recorder, batches=8, compile=True)
        assert losses[0] == pytest.approx(expected[0], rel=1e-5)
        assert losses == pytest.approx(expected, rel=0.03)
    assert torch.equal(weights[0].seen[-1], weights[1].seen[-1])


@pytest.mark.slow
def test_a_setting_in_yaml_compiles_a_run_of_the_command_line(traced: None, tmp_path: Path) -> None:
    (tmp_path / "compile.yaml").write_text("model:\n  compile: true\n")
    command = ["fit", "--config", "configs/regularizer.yaml", "--config", str(tmp_path / "compile.yaml")]
    command += [
        "--run.root",
        str(tmp_path / "runs"),
        "--trainer.max_epochs",
        "1",
        "--data.init_args.limit_train",
        "256",
    ]
    assert main(command) == 0
    (folder,) = (tmp_path / "runs" / "regularizer").iterdir()
    assert json.loads((folder / "summary.json").read_text())["compile_seconds"] > 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["compile"] is True


@pytest.mark.slow  # compiles twice
def test_a_compiled_weight_is_on_the_grid_of_the_file(compiled_kernels: None) -> None:
    """A compiler that leaves out the way to float16 and back gives steps that no file holds."""
    network, _ = quantize_model(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), Recipe("q4_0", last_layer_bits=8))
    initialize_quantizers(network, torch.randn(4, 64))
    layers: Any = list(network)
    for layer in layers:
        with torch.no_grad():
            layer.weight_quantizer.scale.uniform_(0.5, 1.5)
        compiled = torch.compile(lambda layer=layer: layer.quantized_weight() * 1.0, fullgraph=True)()
        assert torch.equal(compiled, layer.quantized_weight())
