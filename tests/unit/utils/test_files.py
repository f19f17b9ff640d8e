"""Files that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lqkd.utils.files import atomic_path, finite, write_json, write_safetensors, write_text


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_final_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("text")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "text"


def test_values_that_json_does_not_know_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_numbers_that_json_does_not_know_become_null_and_are_named() -> None:
    lost: list[str] = []
    value = {"a": {"b": float("nan"), "c": 1.5}, "d": [1, float("-inf")], "e": "nan"}
    assert finite(value, lost) == {"a": {"b": None, "c": 1.5}, "d": [1, None], "e": "nan"}
    assert lost == ["a.b", "d.1"]


WRITES = """
import sys, torch
from lqkd.utils.files import write_safetensors
tensors = {name: torch.full((3,), float(ord(name))) for name in "bac"}
write_safetensors(sys.argv[1], tensors, {name: name.upper() for name in ("w", "é", "v", "z", "y")})
"""


def test_tensors_written_in_different_processes_are_the_same_file(tmp_path: Path) -> None:
    """The library itself orders the metadata by a number that each process draws."""
    sums = set()
    for index in range(3):
        subprocess.run([sys.executable, "-c", WRITES, str(tmp_path / f"{index}.safetensors")], check=True)
        sums.add(hashlib.sha256((tmp_path / f"{index}.safetensors").read_bytes()).hexdigest())
    assert len(sums) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as stored:
        assert {key: float(stored.get_tensor(key).sum()) for key in stored.keys()} == {"a": 291, "b": 294, "c": 297}  # noqa: SIM118
        assert stored.metadata() == {"v": "V", "w": "W", "y": "Y", "z": "Z", "é": "É"}


def test_a_shared_tensor_is_written_under_each_of_its_names(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    write_safetensors(tmp_path / "a.safetensors", {"one": shared, "two": shared[:2]})
    header = (tmp_path / "a.safetensors").read_bytes()
    assert list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])) == ["one", "two"]
