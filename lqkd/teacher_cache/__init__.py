"""Teacher answers that are stored once and replayed by later epochs, runs and methods."""

from __future__ import annotations

from lqkd.teacher_cache.cache import OpenCache, TeacherCache
from lqkd.teacher_cache.codec import Answers

__all__ = ["Answers", "OpenCache", "TeacherCache"]
