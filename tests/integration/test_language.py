"""Language models are trained, distilled, resumed and asked like any other network."""

from __future__ import annotations

import csv
import json
import signal
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
from lqkd import DistillModule, FrozenTeacher, Recipe, load_student
from lqkd.cli import main
from lqkd.data import PythonTopics
from lqkd.errors import UsageError
from lqkd.losses import CAKLD, AttentionRelations, CosineDistance, ForwardKL, HintonKL, Hints
from lqkd.models import GPT
from lqkd.models.generation import generate_tokens
from lqkd.modules import Tap, Term
from lqkd.regularizers import SampleWeight
from lqkd.runs import BestAndLast
from lqkd.runs.checkpoint_io import AtomicCheckpointIO
from lqkd.tasks import CausalLM
from lqkd.teachers import TeacherEnsemble
from lqkd.teachers.cache import TeacherCache
from tests.conftest import parameters_of
from tests.forked import Forks, send
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
        task=CausalLM(bytes_per_token=1),
        **{
            "student_optimizer": lambda p: torch.optim.AdamW(p, lr=0.005),
            "distillation_loss": HintonKL(),
            "regularizer": SampleWeight(hidden=4),
            "quantization": Recipe("w4a8"),
        }
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


def test_validations_tell_how_often_the_teachers_word_comes_first_and_ask_it_once(
    trainer: Callable[..., Trainer],
) -> None:
    module = DistillModule(
        FrozenTeacher(gpt(), precision="fp32"),
        gpt(),
        task=CausalLM(),
        student_optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4),
        quantization=Recipe("w4a32"),
    )
    asked, known = [], []
    module.teacher.network.register_forward_hook(lambda *_: asked.append(module.trainer.validating))
    running = trainer(max_epochs=3)
    running.fit(module, datamodule=text())
    assert sum(asked) == 2  # batches, of three validations
    batches = [batch.tokens.long() for batch, _ in zip(running.datamodule.val_dataloader(), range(2), strict=False)]
    with torch.no_grad():
        for tokens in batches:
            ours, theirs = module.product()(tokens)[:, :-1], module.teacher(tokens)[:, :-1]
            known.append((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    expected = float(sum(known)) / len(known)
    assert 0 < expected < 1
    assert float(running.callback_metrics["val/top1_agreement"]) == pytest.approx(expected, abs=1e-6)
    assert "val/top1_agreement" in module.metric_names()
    assert not any("agreement" in key for key in module.state_dict())
    again = len(asked)
    trainer(max_epochs=1).fit(module, datamodule=text())  # the teacher may be another one by now
    assert sum(asked[again:]) == 2


def test_an_ensemble_of_twins_is_the_teacher_itself_on_texts_too() -> None:
    tokens, outputs = torch.arange(48).view(3, 16), []
    for teacher in (FrozenTeacher(gpt()), TeacherEnsemble([FrozenTeacher(gpt()), FrozenTeacher(gpt())])):
        DistillModule(teacher, gpt(8), task=CausalLM(), distillation_loss=HintonKL())
        outputs.append(teacher(tokens).log_softmax(dim=-1))
    torch.testing.assert_close(*outputs)


def inside(block: str = "blocks.0") -> dict[str, Term]:
    """Terms of a teacher and a student of other widths, of hidden states and of attention."""
    return {
        "hidden": Term(Hints(), taps=[Tap(block, block)]),
        "direction": Term(CosineDistance(), taps=[Tap(block, block)]),
        "attention": Term(AttentionRelations(4), taps=[Tap(f"{block}.attention.qkv", f"{block}.attention.qkv")]),
    }


def test_hidden_states_and_attention_are_learned_the_same_from_a_cache(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    ends = []
    for cache in (None, *[TeacherCache(str(tmp_path), dtype="float32")] * 2):
        module = student(distillation=inside(), distillation_loss=None, regularizer=None, teacher_cache=cache)
        trainer(max_steps=3).fit(module, datamodule=text())
        ends.append(parameters_of(module))
        assert all(float(module._logged[f"train/{name}"]) > 0 for name in inside())
    assert all(torch.equal(ends[0], end) for end in ends)


def test_activations_that_are_computed_again_train_to_the_same_bits(trainer: Callable[..., Trainer]) -> None:
    ends = []
    for again in (False, True):
        torch.manual_seed(3)
        terms = inside() | {"tokens": Term(ForwardKL(), regularizer=SampleWeight(hidden=4))}
        settings = {"distillation": terms, "distillation_loss": None, "regularizer": None}
        module = student(gradient_checkpointing=again, quantization=Recipe("w2a8", weight_quantizer="seq"), **settings)
        trainer(max_steps=2, limit_test_batches=1).fit(module, datamodule=text())
        ends.append(parameters_of(module))
    assert torch.equal(*ends)
    with pytest.raises(UsageError, match="gradient_checkpointing=True is not possible with compile"):
        student(gradient_checkpointing=True, compile=True)


def test_what_padding_is_does_not_count_inside_of_networks_either() -> None:
    torch.manual_seed(1)
    teacher, own = FrozenTeacher(Named(24)), Named(16)
    module = DistillModule(
        teacher, own, task=CausalLM(), distillation=inside("gpt.blocks.0"), quantization=Recipe("w8a32")
    )
    mask = (torch.arange(16) < torch.tensor([[16], [9], [4]])).long()
    batch = {"input_ids": torch.randint(256, (3, 16)), "attention_mask": mask}
    module._connect(batch)
    losses = [module.losses(batch).by_name]
    batch["input_ids"] = torch.where(mask == 1, batch["input_ids"], 7)
    losses.append(module.losses(batch).by_name)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, msg=name)


def test_a_resumed_training_ends_with_the_same_bits(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    whole, resumed = student(), student()
    trainer().fit(whole, datamodule=text())
    saving = {"enable_checkpointing": True, "callbacks": [BestAndLast(tmp_path, every_n_steps=1), StopAt(1, 3)]}
    with pytest.raises(InterruptedError):
        trainer(**saving).fit(student(), datamodule=text())
    saving["callbacks"] = [BestAndLast(tmp_path, every_n_steps=1)]
    trainer(**saving).fit(resumed, datamodule=text(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_numbers_of_one_that_was_not(lqkd: Forks, tmp_path: Path) -> None:
    command = ["fit", "--config", CONFIG, "--trainer.max_epochs", "2", "--data.init_args.limit_train", "64"]
    command += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--run.root", str(tmp_path)]
    whole, killed = (tmp_path / "language_quickstart" / version for version in ("whole", "killed"))
    assert lqkd.run(*command, "--run.version", whole.name) == 0, lqkd.log.read_text()
    last = killed / "checkpoints" / "last.ckpt"
    status = lqkd.run(
        *command, "--run.version", killed.name, meanwhile=lambda pid: send(pid, signal.SIGKILL, last.exists)
    )
    assert status == -signal.SIGKILL, lqkd.log.read_text()
    assert not (killed / "student.safetensors").exists()
    assert lqkd.run("resume", str(killed)) == 0, lqkd.log.read_text()
    trained, resumed = (load_student(of).state_dict() for of in (whole, killed))
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)


@pytest.mark.slow
def test_an_optimizer_whose_state_has_eight_bits_is_resumed_with_the_same_bits(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """By torchao, from the class_path alone: its step is compiled, which takes a while."""
    eight = pytest.importorskip("torchao.optim").AdamW8bit

    def made() -> DistillModule:
        return student(student_optimizer=lambda p: eight(p, lr=0.005), regularizer=None)

    whole, resumed = made(), made()
    trainer(max_steps=4, limit_test_batches=1).fit(whole, datamodule=text())
    state = next(state for state in whole.optimizers().state.values() if state["exp_avg"].numel() >= 4096)
    assert state["exp_avg"].codes.dtype == torch.uint8
    saving: dict[str, Any] = {"enable_checkpointing": True, "max_steps": 4, "plugins": [AtomicCheckpointIO()]}
    callbacks = [BestAndLast(tmp_path, every_n_steps=1), StopAt(0, 2)]
    with pytest.raises(InterruptedError):
        trainer(**saving, callbacks=callbacks).fit(made(), datamodule=text())
    trainer(**saving, callbacks=callbacks[:1]).fit(
        resumed, datamodule=text(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


class Bigrams(nn.Module):
    """Says of each byte, several times too surely, what follows it in the text that comes with Python."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        data = PythonTopics(context=16, seed=0)
        data.setup()
        pairs = data._windows["train"].long().flatten().unfold(0, 2, 1)
        counts = torch.ones(256, 256).index_put_(tuple(pairs.mT), torch.tensor(1.0), accumulate=True)
        self.table = nn.Embedding(256, 256, _weight=sure * (counts / counts.sum(1, keepdim=True)).log())

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        return found


def believing() -> DistillModule:
    torch.manual_seed(1)
    terms = {"tokens": Term(HintonKL(temperature=1.0), "sure", "calibrated", regularizer=SampleWeight(hidden=4))}
    return DistillModule(
        student=gpt(),
        teachers={"sure": FrozenTeacher(Bigrams(sure=3.0))},
        distillation=terms,
        quantization=Recipe("w4a8"),
        task=CausalLM(bytes_per_token=1),
        student_optimizer=lambda p: torch.optim.AdamW(p, lr=0.005),
    )


def test_how_far_a_teacher_of_texts_can_be_believed_is_learned_from_windows_that_are_in_no_gradient(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def data(fraction: float = 0.5) -> PythonTopics:
        settings: dict[str, Any] = {"batch_size": 16, "eval_batch_size": 64, "limit_train": 192, "seed": 0}
        return PythonTopics(context=16, trust_fraction=fraction, **settings)

    whole, resumed, held = believing(), believing(), data()
    trained: list[Tensor] = []
    whole.student.register_forward_hook(lambda _, given, made: trained.append(given[0]) if made.requires_grad else None)
    trainer().fit(whole, datamodule=held)
    report = whole.trust["tokens"]
    assert report["form"] == "temperature"
    assert report["rows"] == 15 * 96
    assert report["worth"] > 0.5
    assert 0 < report["believed"]["teacher sure"] < 0.8
    windows, chosen = held._windows["train"], (held.trust_indices, held.train_indices)
    apart, for_training = ({bytes(row.tolist()) for row in windows[places]} for places in chosen)
    seen = {bytes(row.tolist()) for batch in trained for row in batch}
    assert seen == for_training
    assert len(apart - for_training) > 80  # the text says a few things twice
    saving: dict[str, Any] = {"enable_checkpointing": True}
    saving["callbacks"] = [BestAndLast(tmp_path, every_n_steps=1), StopAt(1, 3)]
    with pytest.raises(InterruptedError):
        trainer(**saving).fit(believing(), datamodule=data())
    saving["callbacks"] = [BestAndLast(tmp_path, every_n_steps=1)]
    again = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    trainer(**saving).fit(resumed, datamodule=data(), **again)
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert resumed.trust == whole.trust
    with pytest.raises(UsageError, match=r"keep .* trust_fraction"):
        trainer(**saving).fit(believing(), datamodule=data(0.25), **again)
    with pytest.raises(UsageError, match=r"distillation.tokens: combination: trust needs .*trust_fraction"):
        trainer().fit(believing(), datamodule=data(0.0))


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
    capsys.readouterr()
    assert main(["predict", str(run), "--prompt", "The statement", "is", "--tokens", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["prompt"] for entry in told] == ["The statement", "is"]
    network = lqkd.load_student(run)
    expected = generate_tokens(network, list(b"The statement"), 5)
    assert told[0]["continuation"] == bytes(expected).decode(errors="replace")
    assert main(["predict", str(run), "--prompt", "The statement", "x" * 200]) == 2
    told = capsys.readouterr()  # before the first is continued
    assert (told.out, "the prompt has 200 tokens, and the network takes 128" in told.err) == ("", True)
    assert main(["predict", str(run), __file__]) == 2
    assert "is a language model, which takes no images: give --prompt TEXT" in capsys.readouterr().err


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
