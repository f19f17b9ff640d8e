"""Records what the short runs give on this machine: ``python -m tests.golden.regenerate``.

Where the file already has this machine, a difference from it is a change of results: say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.forked import forks
from tests.golden.exact import KEPT, RUNS, machine, trained

if __name__ == "__main__":
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    with TemporaryDirectory() as folder, forks(Path(folder) / "log.txt") as process:
        for name in RUNS:
            (Path(folder) / name).mkdir()
            kept.setdefault(machine(), {})[name] = trained(name, Path(folder) / name, process)
    lines = [
        f"{json.dumps(where)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items()) + "\n}"
        for where, runs in kept.items()
    ]
    KEPT.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
