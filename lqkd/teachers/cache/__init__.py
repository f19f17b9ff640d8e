"""Teacher answers that are stored once and replayed by later epochs, runs and methods."""

from __future__ import annotations

from lqkd.teachers.cache.cache import OpenCache, TeacherCache
from lqkd.teachers.cache.codec import TeacherOutputs

__all__ = ["OpenCache", "TeacherCache", "TeacherOutputs"]
