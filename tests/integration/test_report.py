"""The report of a study and of a run."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lqkd.cli import main

ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
LAYERS = """layer   kind         W      A      parameters  note
conv1   Conv2d       8      8      72          weight LSQ per channel, input LSQ per tensor
conv2   Conv2d       2      2      1,152       weight LSQ per channel, input LSQ per tensor
bn1     BatchNorm2d  float  float  16          floating point: no quantised layer of this kind
not quantised: functional add at layer1.0
"""


def write_run(folder: Path, accuracy: float, size: int, verdict: str = "healthy") -> None:
    """What a run of two epochs leaves that a report reads."""
    (folder / "regularizer").mkdir(parents=True)
    summary: dict[str, Any] = {
        "seed": 0,
        "versions": {"python": "3.11", "torch": "2.9"},
        "machine": "x86_64, cpu, 1 threads",
        "val": accuracy,
        "test": accuracy - 0.02,
        "weight_bits": "2 (8 in 1 layers)",
        "activation_bits": "2 (8 in 1 layers)",
        "packed_bytes": size,
        "train_seconds": 3.2,
        "teacher": 0.97,
        "student_float": 0.96,
        "regularizer": {"verdict": verdict, "sentence": "The regularizer's weights differ."},
        "warnings": ["a warning <b>to keep</b>"],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = ["epoch,step,train/loss,train/task,train/distill,val/acc", ",0,,,,", "0,9,1.5,0.5,1.0,"]
    rows += [f"0,19,1.3,0.5,0.8,{accuracy - 0.1}", f"1,39,0.9,0.3,0.6,{accuracy - 0.01}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    (folder / "layers.txt").write_text(LAYERS)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    Image.new("RGB", (300, 200), (30, 90, 150)).save(folder / "regularizer" / "weights.png")


def write_study(folder: Path) -> Path:
    """Two variants with two seeds each, and one that failed."""
    names = {"task_only": 0.90, "kl": 0.93, "broken": 0.0}
    (folder / "variants").mkdir(parents=True)
    described = {"name": "small", "base": "b.yaml", "seeds": [0, 1], "variants": {name: {} for name in names}}
    (folder / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    for name, accuracy in names.items():
        (folder / "variants" / f"{name}.yaml").write_text("trainer: {max_epochs: 2}\n")
        for seed in (0, 1):
            outcome = folder / "outcomes" / name / f"seed_{seed}.json"
            outcome.parent.mkdir(parents=True, exist_ok=True)
            told = {"status": "failed", "message": "weights='x' do not exist"} if name == "broken" else None
            outcome.write_text(json.dumps((told or {"status": "finished", "message": ""}) | {"seconds": 3}))
            if name == "broken":
                log = folder / "logs" / name / f"seed_{seed}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text("lqkd: error: weights='x' do not exist\n")
            else:
                write_run(folder / "runs" / name / f"seed_{seed}", accuracy + 0.01 * seed, 10_000)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_tables_of_a_study_hold_every_variant_and_every_run(study: Path) -> None:
    assert main(["report", str(study)]) == 0
    table = {row["variant"]: row for row in rows(study / "table.csv")}
    assert float(table["kl"]["test_difference_mean"]) == pytest.approx(0.03)
    assert table["broken"]["test_seeds"] == "0"
    runs = rows(study / "runs.csv")
    assert [row["status"] for row in runs] == ["finished"] * 4 + ["failed"] * 2
    assert float(runs[0]["val_last"]) == pytest.approx(0.89)


def test_markdown_has_the_accuracies_the_failures_and_the_versions(study: Path) -> None:
    main(["report", str(study)])
    text = (study / "report.md").read_text()
    assert re.search(r"\| kl +\| 93.50 ± 0.71 \| \+3.00 \[\+3.00, \+3.00\].* \| 2 finished +\|\n", text)
    assert "- broken seed 0 failed: weights='x' do not exist" in text
    assert "- 4 runs: x86_64, cpu, 1 threads; python 3.11, torch 2.9" in text


def test_tables_and_pages_say_in_words_how_the_runs_of_each_variant_ended(study: Path) -> None:
    shutil.rmtree(study / "runs" / "kl" / "seed_1")
    write_run(study / "runs" / "kl" / "seed_1", 0.94, 10_000, verdict="collapsed")
    (study / "outcomes" / "task_only" / "seed_1.json").unlink()
    assert main(["report", str(study)]) == 0
    page, text = ((study / name).read_text() for name in ("report.html", "report.md"))
    for words in ("1 finished; 1 stopped", "2 finished, 1 with a collapsed regularizer", "2 failed"):
        assert f"<td>{words}</td>" in page
        assert words in text
    assert "3 of 6 runs finished (3 finished, 1 with a collapsed regularizer; 1 stopped; 2 failed)" in page
    assert "<td>finished, regularizer collapsed</td>" in page
    table = {row["variant"]: row for row in rows(study / "table.csv")}
    keys = ("runs_finished", "runs_stopped", "runs_failed", "runs_diverged", "regularizer_collapsed")
    assert [[table[name][key] for key in keys] for name in ("task_only", "kl", "broken")] == [
        ["1", "1", "0", "0", "0"], ["2", "0", "0", "0", "1"], ["0", "0", "2", "0", "0"]
    ]  # fmt: skip
    assert [row["verdict"] for row in rows(study / "runs.csv")] == ["", "", "", "collapsed", "", ""]


def test_the_teacher_and_the_student_in_float_have_rows_below_the_variants(study: Path) -> None:
    main(["report", str(study)])
    text, table = (study / "report.md").read_text(), {row["variant"]: row for row in rows(study / "table.csv")}
    assert re.search(r"\| the teacher +\| n/a .*\| 97.00 ± 0.00 \| n/a", text)
    assert re.search(r"\| the student in float +\| n/a .*\| 96.00 ± 0.00 \| n/a", text)
    assert float(table["the teacher"]["test_mean"]) == pytest.approx(0.97)
    assert "the student in float" in (study / "report.html").read_text()


def test_two_teachers_of_a_study_have_a_row_each_with_the_variants_they_taught(study: Path) -> None:
    summary = study / "runs" / "kl" / "seed_0" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"teacher": 0.99}))
    main(["report", str(study)])
    table = {row["variant"]: row for row in rows(study / "table.csv")}
    assert {"the teacher of kl", "the teacher of task_only", "the student in float"} <= table.keys()


def test_the_page_needs_nothing_else_and_shows_what_a_run_says_as_text(study: Path) -> None:
    main(["report", str(study)])
    page = (study / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "a warning &lt;b&gt;to keep&lt;/b&gt;" in page


def test_a_latency_that_an_export_measured_gets_a_plot(study: Path) -> None:
    main(["report", str(study)])
    assert "latency" not in (study / "report.html").read_text()
    latency: dict[str, Any] = {"rounds": 17, "threads": 1, "batch": 1, "machine": "Some CPU (avx512_vnni)"}
    latency |= {"milliseconds": {"float32 ONNX": 9.0, "student.onnx (portable)": 1.5, "float32 PyTorch": 4.0}}
    latency |= {"peak_bytes": {"float32 ONNX": 90_100_000, "student.onnx (portable)": 80_200_000}}
    latency |= {"versions": {"onnxruntime": "1.32.0"}}
    exported = {"file": "student.onnx", "latency": latency, "file_bytes": 12_345, "packed_bytes": 9_000}
    exported |= {
        "multiplications": 40_600_000,
        "bit_operations": 5,
        "float_bit_operations": 1000,
        "float_bytes": 70_700,
    }
    layer = {"name": "conv1", "weight_bits": 4, "activation_bits": 3, "weights": 1152, "packed_bytes": 576}
    exported |= {"layers": [layer | {"multiplications": 1234, "bit_operations": 14_808, "share": 0.125}]}
    (study / "runs" / "kl" / "seed_0" / "student.onnx.report.json").write_text(json.dumps(exported))
    main(["report", str(study)])
    assert "latency of an image" not in (study / "report.html").read_text()  # one time is nothing to trade
    slower = latency["milliseconds"] | {"student.onnx (portable)": 2.5}
    again = exported | {"latency": latency | {"milliseconds": slower}}
    (study / "runs" / "task_only" / "seed_0" / "student.onnx.report.json").write_text(json.dumps(again))
    main(["report", str(study)])
    page = " ".join((study / "report.html").read_text().split())
    assert "float: 96 at 6 times the latency of an image of kl, 91.5" in page
    for cell in (
        "student.onnx",
        "12.3",
        "9.0",
        "40.6",
        "0.50",
        "70.7",
        "1.50",
        "float32 ONNX: 9.00; float32 PyTorch: 4.00",
    ):
        assert f">{cell}</td>" in page
    for cell in ("80.2", "float32 ONNX: 90.1", "576", "1,234", "14,808", "12.5"):
        assert f">{cell}</td>" in page
    assert "Cost of each layer of task_only seed 0: student.onnx, kl seed 0: student.onnx" in page
    assert "Median of 17 alternated runs, threads: 1, images in a run: 1, Some CPU (avx512_vnni), onnxruntime" in page


def test_a_run_alone_has_a_report(study: Path) -> None:
    run = study / "runs" / "kl" / "seed_0"
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "1 of 1 runs finished" in page
    assert "Layers of kl/seed_0" in page
    assert "W2 A2: accuracy 91.00%, 5.00 points worse than in float (96.00%)" in page
    assert '<th scope="row">trained, W2 A2</th><td>91.00%</td><td>10.0 kB</td>' in page


def test_verdicts_come_first_and_no_spoiled_variant_looks_like_the_others(study: Path) -> None:
    for seed in (0, 1):
        shutil.rmtree(study / "runs" / "kl" / f"seed_{seed}")
        write_run(study / "runs" / "kl" / f"seed_{seed}", 0.93 + 0.01 * seed, 10_000, verdict="collapsed")
    assert main(["report", str(study)]) == 0
    page = (study / "report.html").read_text()
    first = page[page.index("<header>") : page.index("</header>")]
    told = dict(re.findall(r'class="finding (\w+)"><h3><span>(\w+)', first))
    assert told == {"good": "task_only", "doubtful": "kl", "bad": "broken"}
    assert re.findall(r'<span class="badge \w+">.*?</span> (.+?)</span>', first) == ["finished", "collapsed", "failed"]
    assert "Best is kl: accuracy 91.50 ± 0.71 % on the test split; better than task_only beyond chance: +3.00" in first
    assert "weights=&#39;x&#39; do not exist" in first
    assert re.findall(r'<tr class="(\w+)"><th scope="row">(\w+)', page) == [
        ("good", "task_only"), ("doubtful", "kl"), ("bad", "broken")
    ]  # fmt: skip


def test_settings_that_differ_stand_beside_each_other(study: Path) -> None:
    settings = {"trainer": {"max_epochs": 2}, "model": {"init_args": {"balance": {"class_path": "a.B"}}}}
    (study / "variants" / "kl.yaml").write_text(yaml.safe_dump(settings))
    assert main(["report", str(study)]) == 0
    page = (study / "report.html").read_text()
    assert '<th scope="row">model.balance</th><td>-</td><td>B</td><td>-</td>' in page
    assert '<th scope="row">trainer.max_epochs</th>' not in page


def test_figures_are_files_too_light_and_dark_where_that_is_asked(study: Path) -> None:
    assert main(["report", str(study), "--figures"]) == 0
    names = {path.name for path in (study / "figures").iterdir()}
    assert {"values.svg", "values.png", "values_dark.png", "differences.png"} <= names
    corners = [Image.open(study / "figures" / name).getpixel((0, 0)) for name in ("values.png", "values_dark.png")]
    assert corners == [(255, 255, 255), (13, 17, 23)]


def test_every_named_loss_has_its_curve_in_the_report_of_a_run(study: Path) -> None:
    run = next(study.rglob("summary.json")).parent
    table = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(
        table.replace("train/distill", "train/hints").replace("train/loss", "balance/hints")
    )
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Distillation loss hints in training" in page
    assert "Distillation loss in training" not in page


def test_another_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is neither a run folder (with config.yaml) nor that of a study" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_one_line(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(kind, os.strerror(kind), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)  # permissions do not stop root
    assert main(["report", str(study)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lqkd: error: '{study}/")
    assert error.endswith(f"cannot be used: {os.strerror(kind)}\n")
    assert len(error.splitlines()) == 1


def test_other_failures_of_the_system_are_not_hidden(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        main(["report", str(study)])


def test_a_study_below_a_file_is_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "b.yaml").write_text("trainer: {max_epochs: 2}\n")
    assert main(["compare", "--config", str(study / "study.yaml"), "--root", str(study / "b.yaml")]) == 2
    assert capsys.readouterr().err == f"lqkd: error: '{study}/b.yaml/small' cannot be used: Not a directory\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "{["),
        ("config.yaml", "[1]"),
        ("summary.json", "{"),
        ("summary.json", "[1]"),
        ("student.onnx.report.json", "{"),
        ("student.onnx.report.json", "{}"),
        ("student.onnx.report.json", '{"latency": 3}'),
        ("summary.json", '{"packed_bytes": "many"}'),
        ("summary.json", '{"val": NaN}'),
        ("summary.json", '{"test": [1]}'),
        ("summary.json", '{"warnings": 5}'),
        ("summary.json", "[" * 100_000),
        ("metrics.csv", "epoch,step,val/acc\nnone,1,2\n"),
        ("metrics.csv", "epoch,step,val/acc\n0,1,0.5,6,7\n"),
        ("metrics.csv", "step\n1\n"),
        ("config.yaml", ALIASES),
        ("regularizer/weights.png", "root:x:0:0"),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(
    study: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    run = study / "runs" / "kl" / "seed_0"
    (run / name).write_text(text)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lqkd: error: ")
    assert str(run / name) in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("regularizer/secret.png", None),
        ("config.yaml", "password: secret"),
        ("summary.json", '{"machine": "secret"}'),
        ("metrics.csv", "secret\n"),
        ("layers.txt", "secret\n"),
        ("student.onnx.report.json", '{"file": "secret"}'),
    ],
)
def test_a_link_out_of_a_run_folder_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None
) -> None:
    run = study / "runs" / "kl" / "seed_0"
    if content is None:
        Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    else:
        (tmp_path / "outside.png").write_text(content)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "outside.png")
    assert main(["report", str(run)]) == 2
    told = f"{str(run / name)!r} is a link that leads out of {str(run)!r}: only files in the folder are read"
    assert capsys.readouterr().err == f"lqkd: error: {told}\n"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["runs/kl/seed_0", "logs", "outcomes", "variants/kl.yaml"])
def test_a_link_out_of_a_study_is_refused(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (study / name).rename(tmp_path / "outside")
    (study / name).symlink_to(tmp_path / "outside")
    assert main(["report", str(study)]) == 2
    assert "is a link that leads out of" in capsys.readouterr().err


def test_a_link_within_the_folder_and_one_to_it_are_followed(study: Path, tmp_path: Path) -> None:
    run = study / "runs" / "kl" / "seed_0"
    (run / "regularizer" / "again.png").symlink_to("weights.png")
    (tmp_path / "link").symlink_to(run)
    assert main(["report", str(tmp_path / "link")]) == 0
    assert "again of " in (run / "report.html").read_text()


def test_markdown_and_tables_show_what_a_run_says_as_text(study: Path) -> None:
    run = study / "runs" / "kl" / "seed_0"
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"machine": "<script>alert(1)</script> [x](http://a)", "weight_bits": "=1+1"}
    (run / "summary.json").write_text(json.dumps(summary))
    outcome = study / "outcomes" / "broken" / "seed_0.json"
    outcome.write_text(json.dumps({"status": "failed", "message": "=cmd\x1b[2J<b>\n# new"}))
    assert main(["report", str(study)]) == 0
    text = (study / "report.md").read_text()
    assert "<" not in text
    assert "\x1b" not in text
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; [x\](http://a)" in text
    runs = {(row["variant"], row["seed"]): row for row in rows(study / "runs.csv")}
    assert runs["kl", "0"]["weight_bits"] == "'=1+1"
    assert runs["broken", "0"]["message"] == r"'=cmd\x1b[2J<b>\n# new"


def test_a_folder_whose_name_looks_like_a_formula_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "a$b$" / "$^$", 0.9, 10)
    assert main(["report", str(tmp_path / "a$b$" / "$^$")]) == 0
