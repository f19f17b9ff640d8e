"""Language models are trained, distilled, resumed and asked like any other network."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

import benchmarks.language_bits
import lqkd
from lqkd import DistillModule, FrozenTeacher, Recipe
from lqkd.cli import main
from lqkd.data import PythonTopics
from lqkd.errors import UsageError
from lqkd.losses import CAKLD, ForwardKL, HintonKL
from lqkd.models import GPT
from lqkd.regularizers import SampleWeight
from lqkd.runs import BestAndLast
from lqkd.tasks import CausalLM
from lqkd.teachers.cache import TeacherCache
from tests.conftest import parameters_of
from tests.integration.test_exact_resume import StopAt

CONFIG = str(Path(__file__).parents[2] / "configs" / "language" / "quickstart.yaml")


def gpt(width: int = 16, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(context=16, width=width, depth=1, heads=2)


def student(**settings: Any) -> DistillModule:
    torch.manual_seed(1)
    return DistillModule(
        FrozenTeacher(gpt(24, seed=2)),
        gpt(),
        student_optimizer=lambda p: torch.optim.AdamW(p, lr=0.005),
        task=CausalLM(bytes_per_token=1),
        **{"distillation_loss": HintonKL(), "regularizer": SampleWeight(hidden=4), "quantization": Recipe("w4a8")}
        | settings,
    )


def text() -> PythonTopics:
    return PythonTopics(context=16, batch_size=16, limit_train=96, seed=0)


@pytest.fixture
def trainer(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    return lambda **settings: make_trainer(**{"limit_val_batches": 2, "max_epochs": 2} | settings)


def test_tokens_weighed_by_a_regularizer_are_learned_the_same_from_a_cache(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ends = []
    for cache in (None, TeacherCache(str(tmp_path), dtype="float32"), TeacherCache(str(tmp_path), dtype="float32")):
        module = student(teacher_cache=cache)
        trainer().fit(module, datamodule=text())
        ends.append(parameters_of(module))
    assert all(torch.equal(ends[0], end) for end in ends)


def test_a_cache_of_the_first_words_of_a_token_trains_as_the_teacher_itself(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ends = []
    for cache in (None, *[TeacherCache(str(tmp_path), dtype="float32", top_k=8)] * 2):
        module = student(teacher_cache=cache, distillation_loss=ForwardKL(top_k=8), regularizer=None)
        trainer(max_steps=3, limit_test_batches=1).fit(module, datamodule=text())
        ends.append(parameters_of(module))
    live, written, read = ends
    assert torch.equal(written, read)
    torch.testing.assert_close(read, live, rtol=1e-3, atol=1e-3)  # rounding moves AdamW's first steps
    with pytest.raises(UsageError, match=r"top_k=256 .* less than the number of classes, which is 256"):
        trainer().fit(student(teacher_cache=TeacherCache(str(tmp_path), top_k=256)), datamodule=text())


def test_a_resumed_training_ends_with_the_same_bits(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    whole, resumed = student(), student()
    trainer().fit(whole, datamodule=text())
    saving = {"enable_checkpointing": True, "callbacks": [BestAndLast(tmp_path, every_n_steps=1), StopAt(1, 3)]}
    with pytest.raises(InterruptedError):
        trainer(**saving).fit(student(), datamodule=text())
    saving["callbacks"] = [BestAndLast(tmp_path, every_n_steps=1)]
    trainer(**saving).fit(resumed, datamodule=text(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


def test_what_gptq_reaches_is_measured_and_leaves_no_trace(
    trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ends, references = [], []
    for batches in (0, 20):
        module = student(gptq_batches=batches, quantization=Recipe("w2a8", weight_quantizer="seq", group_size=8))
        trainer(max_steps=2, limit_test_batches=1).fit(module, datamodule=text())
        ends.append(parameters_of(module))
        references.append(module.references)
    assert torch.equal(*ends)
    assert "on 6 training batches, all that an epoch has, of gptq_batches=20; the others" in caplog.text
    without, measured = references
    assert without["student_gptq"] is None
    assert without["student_start"] == measured["student_start"] != measured["student_gptq"]
    refused = student(gptq_batches=1, quantization=Recipe("ternary", last_layer_bits=None))
    with pytest.raises(UsageError, match="gptq_batches=1 is not possible: GPTQ is not possible for TWN"):
        trainer(limit_test_batches=1).fit(refused, datamodule=text())


def test_a_table_of_runs_that_are_not_there_says_what_writes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["language_bits", "--runs", "missing.csv"])
    with pytest.raises(SystemExit):
        benchmarks.language_bits.main()
    assert "missing.csv is not there: python -m lqkd compare --config configs/studies/" in capsys.readouterr().err


def test_a_divergence_by_rows_is_learned_with_a_weight_for_each_token(trainer: Callable[..., Trainer]) -> None:
    module = student(distillation_loss=CAKLD())
    before = parameters_of(module.distillation).clone()
    trainer(max_steps=2).fit(module, datamodule=text())
    assert not torch.equal(parameters_of(module.distillation), before)


def test_a_gradient_is_clipped_by_its_length_without_the_steps_of_blocks(trainer: Callable[..., Trainer]) -> None:
    module = DistillModule(
        FrozenTeacher(gpt(24, seed=2)),
        gpt(32),
        quantization=Recipe(bits="q4_0"),
        distillation_loss=HintonKL(),
        student_optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        gradient_clip_val=0.01,
        task=CausalLM(),
    )
    before = {name: value.detach().clone() for name, value in module.student.named_parameters()}
    trainer(max_steps=1).fit(module, datamodule=text())
    after = dict(module.student.named_parameters())
    moved = [after[name] - value for name, value in before.items() if not name.endswith("quantizer.scale")]
    assert torch.cat([each.detach().flatten() for each in moved]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_command_line_trains_asks_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brief = ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "192", "--trainer.limit_val_batches", "2"]
    brief += ["--run.root", str(tmp_path)]
    assert main(["fit", "--config", CONFIG, *brief]) == 0
    run = tmp_path / "language_quickstart" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["metric"], summary["mode"]) == ("val/loss", "min")
    assert (summary["weight_bits"], summary["activation_bits"]) == ("2 (8 in 3 layers)", "32")
    assert summary["teacher"] < summary["student_start"]
    assert summary["val"] < summary["student_start"]
    assert main(["predict", "--config", str(run / "config.yaml")]) == 0
    with open(run / "predictions.csv", newline="") as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    assert sum(losses) / len(losses) == pytest.approx(summary["test"], rel=1e-4)
    capsys.readouterr()
    assert main(["report", str(run)]) == 0


@dataclass
class Output:
    """As transformers' networks return them."""

    loss: Tensor | None
    logits: Tensor


class Named(nn.Module):
    """A network that is called as transformers' are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gpt = gpt(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        return Output(None, self.gpt(input_ids))


def test_a_student_is_taken_away_on_the_grid_that_it_was_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    network = GPT(context=16, width=32, depth=1, heads=2, gelu="tanh")
    rows = torch.utils.data.DataLoader(counted(64), batch_size=16)
    made = lqkd.distill(
        network, None, rows, rows, test=rows, task=CausalLM(), bits="q4_0", epochs=1, folder=tmp_path / "run"
    )
    assert (made.summary["weight_bits"], made.summary["activation_bits"]) == ("4 (8 in 3 layers)", "32")
    file = made.export(format="gguf")
    assert torch.equal(lqkd.export.from_gguf(file)(counted()), made.network(counted()))
    report = json.loads((made.folder / "student.gguf.report.json").read_text())
    assert report["measured"]["value"] == pytest.approx(made.summary["test"], rel=1e-5)
    assert "each decodes to the bits that were trained" in (made.folder / "student.gguf.md").read_text()
    with pytest.raises(UsageError, match="has a grid per 32 inputs, which an integer layer does not have"):
        made.export()
    made.module.trainer.datamodule.tokenizer = object()
    with pytest.raises(UsageError, match="of type object, and the file would say that its 256 tokens are bytes"):
        made.export(format="gguf", overwrite=True)


def counted(texts: int = 2) -> Tensor:
    return torch.arange(16) + torch.arange(texts)[:, None] % 40 + 60


def test_padded_dicts_and_dataclasses_go_through_the_one_call(tmp_path: Path) -> None:
    counted = torch.arange(16).expand(48, 16)
    lengths = torch.arange(48)[:, None] % 13 + 4
    rows = [
        {"input_ids": tokens, "attention_mask": mask}
        for tokens, mask in zip(counted * (counted < lengths), (counted < lengths).long(), strict=True)
    ]
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    teacher, task = Named(24), CausalLM()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.01)
    for _ in range(6):
        for batch in loader:
            task.loss(teacher(**batch).logits, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = lqkd.distill(Named(16), teacher, loader, loader, bits="w4a8", epochs=1, folder=tmp_path / "run")
    assert isinstance(found.task, CausalLM)
    assert found.summary["val"] < found.summary["student_start"]
    with pytest.raises(UsageError, match=r"embedding 'gpt\.token' cannot be exported"):
        found.export()


def test_a_window_that_is_longer_than_the_networks_is_one_sentence(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(UsageError) as error:
        trainer().fit(student(), datamodule=PythonTopics(context=32, seed=0))
    assert "the teacher cannot take int64 inputs of 32 from the data" in str(error.value)
    assert "texts are longer than it knows positions" in str(error.value)
