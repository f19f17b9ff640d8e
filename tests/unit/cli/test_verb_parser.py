"""A verb's arguments are the fields of a dataclass, its help their docstrings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from lqkd.cli import arguments
from lqkd.cli.verb_parser import VerbParser, argument, read, read_known
from lqkd.errors import UsageError


@dataclass(frozen=True)
class Brew:
    """Make tea of
    leaves."""

    pot: Path
    """where it is made"""
    leaves: tuple[str, ...]
    """any number of them"""
    water: float = field(kw_only=True)
    """litres, 100% of the pot"""
    steep_for: int = argument(3, metavar="MINUTES")
    """minutes, which are
    counted"""
    sugar: str | None = argument(None, shown="as the guest likes")
    """how much"""
    cups: tuple[int, ...] | None = argument(None, shown="all")
    """numbers of cups"""
    stir: bool = argument(False)
    """with a spoon"""


def test_values_have_the_types_of_their_fields() -> None:
    given = read("brew", Brew, ["kettle", "green", "black", "--water", "1.5", "--cups", "1", "2", "--stir"])
    assert given == Brew(Path("kettle"), ("green", "black"), water=1.5, cups=(1, 2), stir=True)


def test_an_option_of_several_values_that_is_given_twice_has_all_of_them() -> None:
    given = read("brew", Brew, ["kettle", "green", "--water", "1", "--cups", "1", "2", "--cups", "3"])
    assert given.cups == (1, 2, 3)
    asked = arguments.Predict("run", prompt=("a", "b"))
    assert read("predict", arguments.Predict, ["run", "--prompt", "a", "--prompt", "b"]) == asked


def test_help_is_made_of_docstrings_and_shows_every_default() -> None:
    text = " ".join(VerbParser("brew", Brew).format_help().split())
    assert "] POT LEAVES [LEAVES ...] Make tea of leaves. positional" in text
    for line in (
        "POT where it is made",
        "LEAVES any number of them",
        "--water WATER litres, 100% of the pot (must be given)",
        "--steep-for MINUTES minutes, which are counted (default: 3)",
        "--sugar SUGAR how much (default: as the guest likes)",
        "--stir with a spoon (default: false)",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["kettle", "green"], "the following arguments are required: --water"),
        (
            ["--water", "1", "--cups", "2"],
            "the following arguments are required: POT, LEAVES (before --cups, which takes all that follows)",
        ),
        (["kettle", "green", "--water", "1", "--sugr", "2"], "unrecognized arguments: --sugr 2: did you mean sugar?"),
        (["kettle", "green", "--water", "much"], "argument --water: invalid float value: 'much'"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_two(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        read("brew", Brew, given)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"lqkd: error: {told} (see python -m lqkd brew --help)\n"


def test_arguments_that_are_for_others_are_handed_back() -> None:
    given, others = read_known("resume", arguments.Resume, ["runs/a", "--trainer.max_epochs", "60"])
    assert (given.run, others) == (Path("runs/a"), ["--trainer.max_epochs", "60"])


@pytest.mark.parametrize(
    "kind",
    [
        arguments.Export,
        arguments.Predict,
        arguments.Sensitivity,
        arguments.Report,
        arguments.Compare,
        arguments.Resume,
    ],
)
def test_every_argument_of_a_verb_has_a_docstring_and_no_default_goes_untold(kind: type) -> None:
    text = " ".join(VerbParser("verb", kind).format_help().split())  # however it is wrapped
    options = [each for each in fields(kind) if each.kw_only]
    assert text.count("(default: ") + text.count("(must be given)") == len(options)
    assert "(default: None)" not in text


def test_images_may_follow_options_and_a_prompt_stands_in_their_place(tmp_path: Path) -> None:
    given = arguments.of("predict", [str(tmp_path), "--json", "cat.jpg", "dog.jpg"])
    assert (given.images, given.prompt, given.json) == (("cat.jpg", "dog.jpg"), (), True)
    given = arguments.of("predict", [str(tmp_path), "--prompt", "The cat", "A dog", "--tokens", "5"])
    assert (given.images, given.prompt, given.tokens) == ((), ("The cat", "A dog"), 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "predict takes image files, or --prompt TEXT of a language model: neither is given"),
        (["cat.jpg", "--prompt", "a"], "both are given"),
        (["cat.jpg", "--tokens", "5"], "--tokens 5 is not possible with images"),
        (["--prompt", "a", "--seed", "3"], "--seed 3 does nothing without a temperature"),
        (["--prompt", "a", "--seed", "3", "--temperature", "0"], "--seed 3 does nothing without a temperature"),
        (["--prompt", "a", "--output", "masks"], "--output masks is not possible with --prompt"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(given: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        arguments.of("predict", [str(tmp_path), *given])
