"""The command line as a person meets it: help, suggestions, colours, Ctrl-C, and a run folder that is moved."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from lqkd.cli import main
from lqkd.cli.overview import EXIT_STATUS, VERBS
from lqkd.data import Digits
from tests.forked import Forks

ROOT = Path(__file__).parents[2]
SHIPPED = str(ROOT / "configs" / "regularizer.yaml")
WEIGHTS = ROOT / "lqkd" / "weights"
ALL = [verb for group in VERBS.values() for verb in group]
SHORT = ["--trainer.max_epochs", "1", "--data.init_args.limit_train", "128"]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 0
    return capsys.readouterr().out


# ---- help


def test_help_names_every_verb_and_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    assert len(ALL) == 12
    for word in [*ALL, *map(str, EXIT_STATUS)]:
        assert re.search(rf"^  {word} +\w", text, flags=re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


def test_the_exit_statuses_of_help_are_those_of_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## ")[0]
    assert {int(number) for number in re.findall(r"\b(\d+) (?:done|an|a|Ctrl-C|SIGTERM)\b", page)} == set(EXIT_STATUS)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("model.init_args.quantization.residual_bits", "residual_bits"),
        ("model.quantization.first_layer_bits", "first_layer_bits"),
        ("model.quantization.weight_quantizer", "weight_quantizer"),
        ("model.teacher.init_args.weights", "weights"),
    ],
)
def test_null_is_no_value_at_any_depth(capsys: pytest.CaptureFixture[str], setting: str, key: str) -> None:
    given = ("--model.quantization.residual_bits", "8", "--model.quantization.weight_quantizer", "lsq")
    config = shown(capsys, "fit", "--config", SHIPPED, *given, f"--{setting}", "null", "--print_config")
    assert re.search(rf"^ +{key}: null$", config, flags=re.MULTILINE)


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_help_of_a_training_verb_has_a_line_for_each_option_with_its_default(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = shown(capsys, verb, "--help").splitlines()
    options = [line for line in lines if line.startswith("  --")]
    assert len(lines) < 90
    assert max(map(len, lines)) <= 120
    assert any(
        line.startswith("  --run.root ") and line.endswith("folder of all runs. (default: runs)") for line in lines
    )
    assert [line for line in options if not re.search(r"--\S+ +\S.*", line)] == []
    explained = ("  --help", "  --config", "  --print_config")
    assert [line for line in options if "(default: " not in line and not line.startswith(explained)] == []
    assert [line for line in lines if line.endswith(":")] == [
        *("options:", "trainer (Lightning's):", "model:", "data:", "run (its folder):", "checkpoint:")
    ]


def test_help_of_a_class_tells_its_settings_by_their_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fit", "--data.help", "lqkd.data.Digits")
    assert re.search(r"--data.batch_size +Training images per process and step. \(default: 64\)", text)


@pytest.mark.parametrize("verb", [verb for verb in ALL if verb not in ("fit", "validate", "test")])
def test_help_of_every_other_verb_explains_each_of_its_arguments(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = shown(capsys, verb, "--help")
    options = [re.sub(r"\n +", " ", entry) for entry in re.findall(r"^  --.*(?:\n {10,}.*)*", text, flags=re.MULTILINE)]
    assert [line for line in options if not re.search(r"  +\S.*\((default: .+|must be given)\)$", line)] == []
    assert text.startswith(f"usage: python -m lqkd {verb}")
    arguments = re.findall(r"^  (\S.*(?:\n {10,}.*)*)", text.partition("\n\n")[2], flags=re.MULTILINE)
    assert arguments
    assert all(re.search(r"\S(  +|\n +)\w", argument) for argument in arguments)


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--trainer.max_epoch", "3"], "trainer.max_epochs"),
        (["--model.regularizer.gaurd", "none"], "guard"),
        (["--model.quantisation.bits", "w4a4"], "quantization.bits"),
        (["--model.student_optimizer.lrr", "3"], "lr"),
        (["--model.regularizer", "lqkd.regularizers.SampleWeigth"], "SampleWeight"),
        (["--config", "run.yaml"], "run.name"),
        (["--config", "bits.yaml"], "bits"),
        (["--config", "data.yaml"], "batch_size"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(
    arguments: list[str],
    meant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("run: {nam: mine}")
    Path("bits.yaml").write_text("model: {init_args: {quantization: {bit: w4a4}}}")
    Path("data.yaml").write_text("data: {init_args: {batchsize: 3}}")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", SHIPPED, *arguments])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lqkd: error: ")]
    assert f": did you mean {meant}?" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["feature.weight", "2"], "model.distillation.feature: the following arguments are required: loss (see"),
        (["logits", "null"], "model.distillation: Not a valid subclass of Term. Got value: None (see"),
    ],
)
def test_a_mistake_in_a_named_term_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = arguments
    config = str(Path(SHIPPED).with_name("several_terms.yaml"))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", config, f"--model.init_args.distillation.{name}", value])
    assert f"lqkd: error: {told}" in capsys.readouterr().err


def test_a_setting_like_none_suggests_nothing_but_the_help_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", SHIPPED, "--model.init_args.qqqqq", "3"])
    err = capsys.readouterr().err
    assert "did you mean" not in err
    assert "(see python -m lqkd fit --help)" in err


@pytest.mark.parametrize("arguments", [["fit"], ["test", "--trainer.accelerator", "cpu"]])
def test_a_verb_without_a_config_is_told_to_give_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert f"{arguments[0]} needs a configuration: give --config FILE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["resume"], ["export"], ["predict"]])
def test_the_folder_of_an_experiment_suggests_the_run_in_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "student" / "version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    assert main([*command, str(run.parent), *(["x.png"] if command == ["predict"] else [])]) == 2
    assert f": did you mean {run}?" in capsys.readouterr().err


def test_prediction_by_a_run_that_was_stopped_tells_how_to_finish_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["predict", str(tmp_path), "x.png"]) == 2
    assert f"has not ended: finish it first with python -m lqkd resume {tmp_path}" in capsys.readouterr().err


def test_an_unknown_verb_or_option_of_a_verb_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot", "runs"]) == 2
    assert "verb 'exprot' is unknown: did you mean export?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", "runs", "--laten"])
    assert "unrecognized arguments: --laten: did you mean latency?" in capsys.readouterr().err


# ---- terminals


def on_a_terminal(lqkd: Forks, arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command prints on a terminal."""
    ours, theirs = pty.openpty()
    printed: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                printed.append(data)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    terminal = f"t = os.open({os.ttyname(theirs)!r}, os.O_RDWR | os.O_NOCTTY)\nos.dup2(t, 1), os.dup2(t, 2)\n"
    before = f"os.chdir({str(folder)!r})\n{terminal}"
    assert lqkd.run(*arguments, before=before, environment={"TERM": "xterm-256color", **environment}) == 0
    os.close(theirs)
    reader.join(timeout=10)
    return b"".join(printed).decode(errors="replace")


COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7])(?:;[\d;]*)?m")


@pytest.mark.slow
def test_a_terminal_has_a_bar_and_colours_which_no_color_turns_off(lqkd: Forks, tmp_path: Path) -> None:
    fit = ["fit", "--config", SHIPPED, *SHORT]
    coloured = on_a_terminal(lqkd, fit, tmp_path, {"NO_COLOR": ""})
    plain = on_a_terminal(lqkd, fit, tmp_path, {"NO_COLOR": "1"})
    assert COLOUR.search(coloured)
    assert not COLOUR.search(plain)
    assert all("epoch 1/1" in text and "0:00:0" in text for text in (coloured, plain))


@pytest.mark.slow
def test_a_file_gets_lines_without_bars_and_escapes(lqkd: Forks, tmp_path: Path) -> None:
    assert lqkd.run("fit", "--config", SHIPPED, *SHORT, "--run.root", str(tmp_path)) == 0
    text = lqkd.log.read_text()
    assert "epoch 1/1" in text
    assert not re.search(r"[\x1b\r]", text)


# ---- Ctrl-C


@pytest.mark.slow
def test_ctrl_c_outside_of_a_training_is_one_line(lqkd: Forks, tmp_path: Path) -> None:
    def interrupt(pid: int) -> None:
        time.sleep(1.0)
        os.kill(pid, signal.SIGINT)

    before = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores it
    bits = ",".join(f"w{weights}a{inputs}" for weights in range(2, 9) for inputs in range(2, 9))  # for some seconds
    asked = ("sensitivity", SHIPPED, "--bits", bits, "--output", str(tmp_path / "ranking"))
    status = lqkd.run(*asked, before=before, meanwhile=interrupt)
    assert status == 130
    assert "lqkd: interrupted; no file is half-written" in lqkd.log.read_text()
    assert "Traceback" not in lqkd.log.read_text()


@pytest.mark.parametrize("verb", ["sensitivity", "export"])
def test_ctrl_c_while_images_are_read_is_one_line(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", SHIPPED, *SHORT, "--run.root", str(tmp_path), "--run.version", "a"]) == 0

    def interrupted(data: Digits) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "val_dataloader", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main([verb, str(tmp_path / "regularizer" / "a")]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first on
    assert "lqkd: interrupted; no file is half-written" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_are_loaded_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.linalg":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Interrupt())
from lqkd.cli import main
sys.exit(main(["sensitivity", {SHIPPED!r}, "--output", {str(tmp_path)!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (128 + number, 1)
    assert ended.stderr.endswith("; no file is half-written, and the same command starts again\n")


PLACES = {
    "before the run begins": "lqkd.runs.lightning_cli.record_start",
    "while teacher and student are measured": "lqkd.modules.distill.measure",
    "while pictures are drawn": "lqkd.callbacks.regularizer.pictures.pictures",
    "while the run is tested": "lqkd.data.Digits.test_dataloader",
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_outside_of_the_steps_is_told_with_what_goes_on(
    lqkd: Forks, place: str, number: signal.Signals, tmp_path: Path
) -> None:
    """And what it advises works."""
    module, _, name = PLACES[place].rpartition(".")
    before = (
        "import signal, pkgutil\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"setattr(pkgutil.resolve_name({module!r}), {name!r}, lambda *_, **__: os.kill(os.getpid(), {int(number)}))\n"
    )
    command = ["fit", "--config", SHIPPED, *SHORT, "--run.root", str(tmp_path), "--run.version", "a"]
    run = tmp_path / "regularizer" / "a"
    assert lqkd.run(*command, before=before) == 128 + number, lqkd.log.read_text()
    (told,) = [line for line in lqkd.log.read_text().splitlines() if line.startswith("lqkd: ")]
    again = place == "before the run begins"
    assert told.endswith("and the same command starts again" if again else f"; go on with: python -m lqkd resume {run}")
    assert lqkd.run(*(command if again else ["resume", str(run)])) == 0, lqkd.log.read_text()
    assert lqkd.run("resume", str(run)) == 0
    assert f"{run} is finished" in lqkd.log.read_text()


# ---- what reads the output


def test_a_reader_of_the_output_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as output:
        command = [sys.executable, "-m", "lqkd", "--help"]
        ended = subprocess.run(command, check=False, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (141, "")


# ---- the run folder


@pytest.mark.slow
def test_a_run_that_was_moved_away_from_all_it_came_from_still_works(lqkd: Forks, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    for name in ("digits_teacher", "digits_student"):
        shutil.copy(WEIGHTS / f"{name}.safetensors", before)
    weights = ["--model.teacher.weights", "digits_teacher.safetensors"]
    weights += ["--model.init_args.student_weights", "digits_student.safetensors"]
    there = f"os.chdir({str(before)!r})"
    assert lqkd.run("fit", "--config", SHIPPED, *SHORT, *weights, before=there) == 0, lqkd.log.read_text()
    after.mkdir()
    shutil.move(before / "runs" / "regularizer" / "version_0", after / "mine")
    (before / "digits_student.safetensors").unlink()
    shutil.move(before / "digits_teacher.safetensors", after)
    shutil.rmtree(before)
    Image.new("L", (8, 8)).save(after / "image.png")
    for command in (
        ["test", "--config", "mine/config.yaml"],
        ["resume", "mine"],
        ["export", "mine"],
        ["predict", "mine", "image.png"],
        ["sensitivity", "mine", "--bits", "4", "--batches", "1"],
        ["report", "mine"],
        ["resume", "mine", "--trainer.max_epochs", "2"],
    ):
        status = lqkd.run(*command, before=f"os.chdir({str(after)!r})")
        assert status == 0, f"{command}\n{lqkd.log.read_text()}"
    assert not before.exists()
    assert not (after / "runs").exists()


@pytest.mark.slow
def test_a_run_that_was_deleted_leaves_nothing_that_stops_the_next(lqkd: Forks, tmp_path: Path) -> None:
    fit = ["fit", "--config", SHIPPED, *SHORT]
    for _ in range(2):
        assert lqkd.run(*fit, before=f"os.chdir({str(tmp_path)!r})") == 0
        shutil.rmtree(tmp_path / "runs" / "regularizer" / "version_0")
    assert list(tmp_path.rglob("*.*")) == []
