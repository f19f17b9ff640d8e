"""What README and docs/ print works: commands and Python run, YAML is accepted, and nothing is left out in silence."""

from __future__ import annotations

import glob
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from lqkd.cli.arguments import of
from lqkd.models import CifarResNet
from tests.documentation import COMMANDS, LANGUAGES, PAGES, ROOT, Block, Command, blocks, commands, files, read_blocks
from tests.forked import Forks
from tests.hugging_face import language_model
from tests.photographs import write_photographs

TRAINED_ELSEWHERE = {"docs/extending.md", "docs/choosing.md"}
"""Pages whose files test_extending.py trains with."""
LIGHTNINGS = ("fit", "validate", "test", "predict")


def used_by_commands() -> set[str]:
    """Every word of the commands that run."""
    return {word for b in blocks(*COMMANDS) if b.reason is None for c in commands(b) for word in c.words}


# ---- the pages themselves


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert [str(b) for b in blocks() if b.language not in LANGUAGES] == []
    assert all(b.reason is None for b in blocks("python", "yaml"))
    assert len(blocks(*COMMANDS)) > 20


def test_no_block_escapes_the_reader() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("\n```") == 2 * len(list(read_blocks(page))), page
        assert not re.search(r"^(    |\t)(python|pip|lqkd) ", text, flags=re.MULTILINE), f"{page}: fence its commands"
        assert text.count("<!-- not run") == sum(b.reason is not None for b in read_blocks(page)), page


def test_the_first_two_blocks_of_readme_are_the_two_commands() -> None:
    assert [b.text.strip() for b in blocks("bash") if b.page == "README.md"][:2] == [
        "pip install -e . && python -m lqkd fit --config configs/quickstart.yaml",
        'pip install -e ".[dev]" && pytest',
    ]


def test_a_reason_belongs_to_the_block_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.documentation.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs SLURM -->\n```bash\nA=1 srun python -m x \\\n  y && z # why\n```\n\n```\nls\n```\n"
    )
    first, second = read_blocks(page)
    assert (first.reason, first.line, second.reason, second.language) == ("needs SLURM", 2, None, "")
    assert list(commands(first)) == [Command({"A": "1"}, ["srun", "python", "-m", "x", "y"]), Command({}, ["z"])]


# ---- the folder in which they run


def python(lqkd: Forks, folder: Path, arguments: list[str], environment: dict[str, str] | None = None) -> int:
    """Run ``python ARGUMENTS`` in a folder and return its exit status; what it prints is in ``lqkd.log``."""
    where = f"import sys, runpy\nos.chdir({str(folder)!r})\nsys.path.insert(0, '')\n"
    if arguments[:2] == ["-m", "lqkd"]:
        return lqkd.run(*arguments[2:], before=where, environment=environment)
    if arguments[0] == "-m":
        run, arguments = f"runpy.run_module({arguments[1]!r}, run_name='__main__', alter_sys=True)", arguments[2:]
    else:
        run, arguments = f"runpy.run_path({arguments[0]!r}, run_name='__main__')", arguments[1:]
    return lqkd.run(*arguments, before=f"{where}{run}\nsys.exit(0)", environment=environment)


@pytest.fixture(scope="module")
def prepared(lqkd: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: configs, the files that they print, images, data and one run with its export."""
    place = tmp_path_factory.mktemp("documentation")
    shutil.copytree(ROOT / "configs", place / "configs")
    shutil.copytree(ROOT / "docs", place / "docs")
    for name, text in files().items():
        (place / name).write_text(text, encoding="utf-8")
    rng = np.random.default_rng(0)
    for name, brightness in (("day", 190), ("night", 60)):
        (place / "photographs" / name).mkdir(parents=True)
        for number in range(15):
            pixels = (brightness + rng.integers(-50, 50, (30, 40, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photographs" / name / f"{number}.jpg")
    write_photographs(place / "pairs")
    (place / "shakespeare.txt").write_text("".join(f"Line {n} of a play.\n" for n in range(3000)), encoding="utf-8")
    language_model(place / "my_model")
    for name in ("IMAGE.png", "cat.jpg", "dog.png"):
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / name)
    for root, test, classes in (("DIR", "test", 10), ("DIR100", "test", 100), ("SOURCE", "val", 2)):
        for folder in (place / root / split / f"{c:03d}" for split in ("train", test) for c in range(classes)):
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (32, 32), (20 * number, 100, 100)).save(folder / f"{number}.png")
    (place / "FOLDER" / "weights").mkdir(parents=True)
    for depth in (20, 56):
        for classes in (10, 100):
            weights = CifarResNet(depth, num_classes=classes).state_dict()
            save_file(weights, place / "FOLDER" / "weights" / f"cifar{classes}_resnet{depth}.safetensors")
    fit = ["-m", "lqkd", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_epochs", "2"]
    assert python(lqkd, place, fit) == 0, lqkd.log.read_text()
    export = ["-m", "lqkd", "export", "runs/quickstart/version_0", "--output", "student.onnx"]
    assert python(lqkd, place, export) == 0, lqkd.log.read_text()
    return place


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "folder"))


def shortened(arguments: list[str]) -> list[str]:
    """The same command with fewer steps, and smaller images where a page leaves their size to lqkd."""
    verb = arguments[0]
    given = " ".join(arguments)
    if verb == "resume" and len(arguments) > 2:
        return [*arguments, "--trainer.max_epochs", "3"]
    if verb == "compare":
        few = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
        return [*arguments, "--seeds", "0", "--set", *few]
    if verb == "distill":
        return [*arguments, "--epochs", "1", "--image-size", "32"]
    few: list[str] = []
    if verb != "fit" or "--print_config" in given or "--help" in given:
        pass
    elif "--ckpt_path" in given:
        few = ["--trainer.max_epochs", "4"]
    elif "cifar" in given:
        few = ["--trainer.fast_dev_run", "true", "--data.init_args.batch_size", "4"]
    elif any(name in given for name in ("segmentation_", "teacher.yaml", "student.yaml")) and "configs/" not in given:
        few = ["--trainer.max_epochs", "4"]  # from which a teacher is better than chance
    elif any(name in given for name in ("quickstart", "regularizer.yaml", "language")):
        few = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
    if "configs/detection/quickstart" in given:
        few += ["--data.init_args.scenes", "100"]
    return [*arguments, *few]


# ---- commands


def name_of(block: Block) -> str:
    return f"{block}-{block.text.splitlines()[0][:60]}"


RUN = {b.text: b for b in blocks(*COMMANDS) if b.reason is None}
"""Blocks that run; those that two pages have in common run once."""


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN.values(), ids=name_of)
def test_the_commands_of_a_block_run_one_after_the_other(block: Block, lqkd: Forks, folder: Path) -> None:
    for command in commands(block):
        assert command.words[0] == "python", f"{block}: {command.words[0]} is not run by this test"
        words = [word for given in command.words[1:] for word in (sorted(glob.glob(given, root_dir=folder)) or [given])]
        if words[:2] == ["-m", "lqkd"]:
            words = ["-m", "lqkd", *shortened(words[2:])]
        assert python(lqkd, folder, words, command.environment) == 0, f"{block}: {words}\n{lqkd.log.read_text()}"


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks(*COMMANDS) if b.reason is not None], ids=name_of)
def test_a_block_that_cannot_run_is_one_that_would(block: Block, lqkd: Forks, prepared: Path) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for command in commands(block):
        if command.module == "lqkd" and command.arguments[0] == "wandb-report":
            of("wandb-report", command.arguments[1:])
        elif command.module == "lqkd":
            assert command.arguments[0] in LIGHTNINGS, f"{block}: run it"
            arguments = ["-m", "lqkd", *command.arguments, "--print_config"]
            assert python(lqkd, prepared, arguments) == 0, f"{block}: {lqkd.log.read_text()}"
        elif command.module is not None:
            source = (ROOT / f"{command.module.replace('.', '/')}.py").read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in command.arguments if word.startswith("--"))


# ---- Python and YAML


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in blocks("python") if b.page not in TRAINED_ELSEWHERE], ids=str)
def test_a_python_example_runs(block: Block, lqkd: Forks, folder: Path) -> None:
    (folder / "example.py").write_text(block.text, encoding="utf-8")
    assert python(lqkd, folder, ["example.py"]) == 0, f"{block}: {lqkd.log.read_text()}"


def is_of_a_study(text: str) -> bool:
    return bool({"variants", "launcher"} & yaml.safe_load(text).keys())


FRAGMENTS = [
    b
    for b in blocks("yaml")
    if b.page not in TRAINED_ELSEWHERE
    and not is_of_a_study(b.text)
    and b.file not in used_by_commands()
    and not b.reason
]


@pytest.mark.parametrize("block", FRAGMENTS, ids=str)
def test_a_yaml_example_that_no_command_names_goes_with_the_quickstart(
    block: Block, lqkd: Forks, tmp_path: Path
) -> None:
    (tmp_path / "example.yaml").write_text(block.text, encoding="utf-8")
    both = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", "example.yaml"]
    arguments = ["-m", "lqkd", "fit", *both, "--trainer.fast_dev_run", "true"]
    assert python(lqkd, tmp_path, arguments, {"WANDB_MODE": "offline"}) == 0, f"{block}: {lqkd.log.read_text()}"


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if is_of_a_study(b.text)], ids=str)
def test_a_yaml_example_of_a_study_is_accepted(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    study = yaml.safe_load(files()["my_study.yaml"]) | yaml.safe_load(block.text)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    of("compare", ["--config", "study.yaml"])
