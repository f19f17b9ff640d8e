"""Freed memory is kept for the next step, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lqkd.utils import memory

STEPS = """
import ctypes, resource
from lqkd.utils.memory import keep_freed_memory

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes, library.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def pages_that_are_new():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [library.malloc(2**26) for _ in range(3)]
    for pointer in held:
        library.memset(pointer, 1, 2**26)
    for pointer in held:
        library.free(pointer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = keep_freed_memory()
pages_that_are_new()
print(done, pages_that_are_new())
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the GNU C library is that of Linux")


def second_step(**environment: str) -> tuple[bool, int]:
    call = [sys.executable, "-c", STEPS]
    done = subprocess.run(call, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    kept, pages = done.stdout.split()
    return kept == "True", int(pages)


def test_a_second_step_finds_the_memory_of_the_first() -> None:
    kept, pages = second_step()
    assert kept
    assert pages < 100


def test_a_choice_of_the_environment_stands() -> None:
    kept, pages = second_step(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert pages > 100
    assert not second_step(GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0]


def test_memory_in_large_pages_is_kept_as_well() -> None:
    kept, pages = second_step(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    assert kept
    assert pages < 100


def test_an_older_library_gets_the_most_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which refuses to keep more than half of a heap."""
    asked: dict[int, int] = {}

    class Older:
        def __init__(self, name: None) -> None: ...

        def mallopt(self, option: int, value: int) -> int:
            if value > 2**25:
                return 0
            asked[option] = value
            return 1

    monkeypatch.setattr("ctypes.CDLL", Older)
    for name in memory._CHOICES:
        monkeypatch.delenv(name, raising=False)
    assert memory.keep_freed_memory()
    assert asked == {memory._MMAP_THRESHOLD: 2**25, memory._TRIM_THRESHOLD: -1}
