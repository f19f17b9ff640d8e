"""Frozen teachers: one, several, as fast as their answers allow, and their answers stored."""

from __future__ import annotations

from lqkd.teachers.ensemble import TeacherEnsemble
from lqkd.teachers.frozen import FrozenTeacher

__all__ = ["FrozenTeacher", "TeacherEnsemble"]
