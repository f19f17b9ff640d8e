"""The command line: one file a verb, which reads arguments and calls the library."""

from __future__ import annotations

from lqkd.cli.main import main

__all__ = ["main"]
