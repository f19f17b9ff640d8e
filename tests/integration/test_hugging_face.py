"""A language model of Hugging Face from the command line: from a folder and a text to a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import benchmarks.smollm2
import benchmarks.whole_text
import lqkd
from lqkd import DistillModule, FrozenTeacher, Recipe
from lqkd.cli import main
from lqkd.export import from_gguf
from lqkd.losses import AttentionRelations, CosineDistance
from lqkd.models import causal_lm
from lqkd.modules import Tap, Term
from lqkd.quantization import initialize_quantizers
from lqkd.runs import load_student
from lqkd.tasks import CausalLM
from tests.hugging_face import language_model, llama

FILES = {
    "gguf": "student.gguf",
    "nbits": "student.nbits.onnx",
    "compressed-tensors": "student.compressed-tensors",
}
CONFIG = str(Path(__file__).parents[2] / "configs" / "language" / "smollm2.yaml")


def fit(tmp_path: Path, *more: str) -> int:
    folder = str(tmp_path / "model")
    arguments = ["--model.student.init_args.pretrained", folder, "--data.init_args.tokenizer", folder]
    arguments += ["--model.teacher.init_args.network.init_args.pretrained", folder, "--run.root", str(tmp_path)]
    arguments += ["--data.init_args.root", str(tmp_path / "text.txt"), "--data.init_args.context", "16"]
    arguments += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.limit_test_batches", "2"]
    return main(["fit", "--config", CONFIG, *arguments, *more])


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LQKD_CACHE", str(tmp_path / "cache"))
    language_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"the quick brown fox {number} jumps\n" for number in range(1500)))
    return tmp_path


@pytest.mark.slow
def test_a_folder_and_a_text_become_a_file_that_holds_the_student(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(text, "--model.balance.init_args.task", "1") == 0
    run = text / "smollm2_q4_0" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["weight_bits"], summary["activation_bits"]) == ("4 (8 in 2 layers)", "32")
    for name, file in FILES.items():
        assert main(["export", str(run), "--format", name]) == 0
        report = json.loads((run / f"{file}.report.json").read_text())
        assert report["measured"]["value"] == pytest.approx(summary["test"], rel=1e-5)  # on as many batches
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(from_gguf(run / "student.gguf")(tokens).logits, load_student(run)(tokens).logits)
    assert "nats a token against" in (run / "student.gguf.md").read_text()  # llama.cpp was asked
    written = []
    for source in (run, run / "student.gguf", run / "student.nbits.onnx"):
        capsys.readouterr()
        assert main(["predict", str(source), "--prompt", "the quick", "--tokens", "12"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0].startswith("the quick")
    assert len(written[0]) > 12
    assert written[0] == written[1] == written[2]
    files = text / "files"
    wanted = ["--pretrained", str(text / "model"), "--windows", "4", "--gptq", "2", "--out", str(files)]
    monkeypatch.setattr("sys.argv", ["smollm2", str(run), *wanted, "--formats", "gguf"])
    benchmarks.smollm2.main()
    begun = (files / "table.csv").read_text().splitlines()
    written = (files / "student.gguf").stat().st_mtime_ns
    monkeypatch.setattr("sys.argv", ["smollm2", str(run), *wanted])
    benchmarks.smollm2.main()  # which ends otherwise where a file has another perplexity
    lines = (files / "table.csv").read_text().splitlines()
    assert lines[: len(begun)] == begun
    assert (files / "student.gguf").stat().st_mtime_ns == written
    same = {row["network"]: row["first token as trained"] for row in csv.DictReader(lines)}
    assert [same[f"of the file, {name}"] for name in FILES] == ["100.000%"] * 3
    assert len(same) == 11
    (files / "student.nbits.onnx").unlink()
    (files / "first_tokens.npy").unlink()
    monkeypatch.setattr("sys.argv", ["smollm2", str(run), *wanted, "--formats", "nbits", "--gptq", "0"])
    benchmarks.smollm2.main()
    assert (files / "student.nbits.onnx").is_file()
    assert sorted((files / "table.csv").read_text().splitlines()) == sorted(lines)  # those of other options stay
    monkeypatch.setattr("sys.argv", ["smollm2", str(run), *wanted, "--windows", "3"])
    with pytest.raises(SystemExit, match="of another student or network, or of other windows"):
        benchmarks.smollm2.main()
    monkeypatch.setattr("sys.argv", ["smollm2", str(run), *wanted])
    checkpoint = run / "checkpoints" / "best.ckpt"
    torch.save(torch.load(checkpoint, weights_only=True) | {"epoch": 7}, checkpoint)  # trained again at its place
    with pytest.raises(SystemExit, match=r"student.gguf' is of an earlier student: .* or delete it"):
        benchmarks.smollm2.main()
    for file in FILES.values():
        (files / file).rename(files / f"earlier_{file}")
    with pytest.raises(SystemExit, match="of another student or network, or of other windows"):
        benchmarks.smollm2.main()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("--data.init_args.context", "512", "texts of 512 tokens are longer than the 256 that it was made for"),
        ("--data.init_args.tokenizer", "{other}", "the data have 350 tokens, and logits are of fewer"),
        ("--model.quantization.group_size", "48", "group_size=48 is not possible with bits='q4_0'"),
    ],
)
def test_a_mistake_is_one_sentence(
    setting: str, value: str, message: str, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(text / "model")
    other.add_tokens([f"word{number}" for number in range(350 - len(other))])
    other.save_pretrained(text / "other")
    assert fit(text, setting, value.format(other=text / "other")) == 2
    assert message in capsys.readouterr().err
    assert not (text / "smollm2_q4_0").exists() or not any((text / "smollm2_q4_0").rglob("*.ckpt"))


def test_perplexity_is_that_of_transformers(text: Path) -> None:
    from lqkd.data import TextFiles
    from lqkd.tasks import CausalLM

    data = TextFiles(root=str(text / "text.txt"), tokenizer=str(text / "model"), context=16, seed=0)
    data.setup()
    network, task = causal_lm(str(text / "model")), CausalLM()
    metrics, losses = task.metrics(), []
    with torch.no_grad():
        for batch in data.test_dataloader():
            seen = data.preprocess(batch, train=False, epoch=0)
            logits = network(seen.tokens).logits
            task.update(metrics, logits, seen)
            losses += [network(row[None], labels=row[None]).loss.double() for row in seen.tokens]
    expected = float(torch.stack(losses).mean().exp())
    assert float(metrics.compute()["perplexity"]) == pytest.approx(expected, rel=1e-5)


def test_a_whole_text_is_measured_by_both_and_gone_on_with(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(by: str, *more: str) -> str:
        given = ["--by", by, "--out", str(text / "out"), "--context", "128", "--pretrained", str(text / "model"), *more]
        monkeypatch.setattr("sys.argv", ["whole_text", str(text / "text.txt"), *given])
        benchmarks.whole_text.main()
        return capsys.readouterr().out

    assert "nothing is compared" in evaluate("lqkd", "--windows", "4")
    begun = (text / "out" / "lqkd_128.csv").read_text()
    assert "8 of 8 windows" in evaluate("lqkd", "--windows", "8")
    table = text / "out" / "lqkd_128.csv"
    written = table.read_text()
    assert written.startswith(begun)
    assert evaluate("transformers", "--windows", "8").endswith("they are no more than 0.1% apart\n")
    assert "4 windows: perplexity" in evaluate("lqkd", "--windows", "4")  # the first of those that there are
    assert table.read_text() == written
    for mistake, message in ((("--windows", "3"), "give --windows 2 or 4"), (("--context", "10000000"), "fewer than")):
        with pytest.raises(SystemExit, match=message):
            evaluate("lqkd", *mistake)
    rows = written.splitlines()
    first, windows, nats, rest = rows[1].split(",", 3)
    table.write_text("\n".join([rows[0], f"{first},{windows},{float(nats) * 1.1},{rest}", *rows[2:]]) + "\n")
    with pytest.raises(SystemExit, match=r"they are more than 0.1% apart"):
        evaluate("transformers", "--windows", "8")
    llama(text / "model", vocab_size=300, max_position_embeddings=256, initializer_range=0.2)  # with the same tokenizer
    with pytest.raises(SystemExit, match=r"lqkd_128.csv is of another network or of other windows"):
        evaluate("lqkd", "--windows", "8")


def test_what_is_inside_of_a_llama_is_distilled_with_heads_that_share_keys(tmp_path: Path) -> None:
    for name, width in (("large", 96), ("small", 64)):
        llama(tmp_path / name, hidden_size=width, initializer_range=0.1)
    attention = [f"model.layers.1.self_attn.{letter}_proj" for letter in "qkv"]
    terms = {
        "hidden": Term(CosineDistance(), taps=[Tap("model.layers.0", "model.layers.0")]),
        "attention": Term(AttentionRelations(8), taps=[Tap(name, name) for name in attention]),
    }
    module = DistillModule(
        FrozenTeacher(causal_lm(str(tmp_path / "large"))),
        causal_lm(str(tmp_path / "small")),
        task=CausalLM(),
        quantization=Recipe("w4a32"),
        distillation=terms,
        gradient_checkpointing=True,
    )
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    batch = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": mask}
    module._connect(batch)
    initialize_quantizers(module.student.train(), batch["input_ids"])
    losses = module.losses(batch)
    losses.loss.backward()
    assert all(0 < float(losses.by_name[name].detach()) < 10 for name in terms)
    layers = [module.student.get_submodule(name) for name in attention]
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)
    batch["input_ids"] = torch.where(mask == 1, batch["input_ids"], 60)
    for name, value in module.losses(batch).by_name.items():
        torch.testing.assert_close(value, losses.by_name[name])


def test_a_class_for_each_text_is_distilled_as_batches_of_transformers_have_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, intermediate_size=64, num_labels=3)
    )
    texts = torch.randint(32, (256, 12))
    texts[:, 0] %= 3
    rows = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text[0]} for text in texts]
    loader = torch.utils.data.DataLoader(rows, batch_size=32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(3):
        for batch in loader:
            network(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    student = lqkd.distill(network, None, loader, loader, bits="w4a8", epochs=1, folder=tmp_path / "run")
    assert student.summary["metric"] == "val/acc"
    assert student.summary["val"] > 0.9
