"""What exports leave in a run folder: the cost of every exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lqkd.errors import UsageError
from lqkd.origin import REPORTS
from lqkd.study.results import read_json


@dataclass(frozen=True)
class ExportedFile:
    """The cost of a file that ``lqkd export`` wrote.

    Attributes:
        name: of the file.
        file_bytes, packed_bytes: of the file, and of its weights in theory.
        multiplications: multiplications and additions for an image.
        float_share: its bit operations over those of the network in float32.
        milliseconds: name of each network that was timed to its time for an image; empty without ``--latency``.
    """

    name: str
    file_bytes: int
    packed_bytes: int
    multiplications: int
    float_share: float
    milliseconds: dict[str, float]

    @property
    def latency(self) -> float | None:
        """Its own milliseconds for an image."""
        return next((time for name, time in self.milliseconds.items() if name.startswith(self.name)), None)

    @property
    def others(self) -> dict[str, float]:
        """The milliseconds of all other networks."""
        return {name: time for name, time in self.milliseconds.items() if not name.startswith(self.name)}


def read_exports(folder: Path) -> list[ExportedFile]:
    """All exported files of a run, by name.

    Raises:
        UsageError: when a report is damaged.
    """
    found = []
    for path in sorted(folder.glob(REPORTS)):
        report = read_json(path)
        try:
            times = (report["latency"] or {}).get("milliseconds", {})
            found.append(
                ExportedFile(
                    str(report["file"]),
                    int(report["file_bytes"]),
                    int(report["packed_bytes"]),
                    int(report["multiplications"]),
                    report["bit_operations"] / report["float_bit_operations"],
                    {name: float(time) for name, time in times.items()},
                )
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise UsageError(f"{str(path)!r} is damaged: it is not what export writes") from error
    return found
