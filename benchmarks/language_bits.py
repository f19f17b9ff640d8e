"""What training on few bits is worth beside what none reaches: the table of ``configs/studies/language_bits.yaml``.

The network in float, its weights rounded to the grids on which the students start, and calibrated on them by GPTQ
(whose damping the validation split chooses), on the text's test split; beside them the runs of the study, as it wrote
them. In bits a byte, less is better. Of weights of three values a second table says what of the learned weights helps:
every way of weighing KL, paired by seed with the weights as they are learned and with the best fixed one, which the
validation split chooses.

::

    python -m benchmarks.language_bits --measure          # writes results/language_bits_ptq_cpu_torch....csv
    python -m benchmarks.language_bits                    # the table, from the two files in results/
    python -m benchmarks.language_bits --runs studies/language_bits/runs.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from lqkd.data import PythonTopics
from lqkd.models import GPT, load_weights
from lqkd.quantization import Recipe, Rule, gptq, initialize_quantizers, quantize_model
from lqkd.studies.statistics import paired_difference
from lqkd.studies.tables import markdown
from lqkd.tasks import CausalLM
from lqkd.utils.tables import write_csv

STUDY = Path("configs/studies/language_bits.yaml")
RUNS = Path(f"results/study_language_bits_runs_cpu_torch{torch.__version__.partition('+')[0]}.csv")
PTQ = Path(f"results/language_bits_ptq_cpu_torch{torch.__version__.partition('+')[0]}.csv")
WIDTHS = ("4", "3", "2", "1.58")
TRAINED = {"labels": "labels alone", "kl": "and KL, 1 : 1", "weighed": "and KL weighed by token"}
WEIGHED_BY = {
    "labels": "labels alone",
    "kl": "fixed: 1",
    "kl3": "fixed: 3",
    "kl8": "fixed: 8",
    "kl20": "fixed: 20",
    "trust": "fixed: 1, the teacher as far as held-out windows say",
    "ramp": "a straight line from 1 to 12.5",
    "weighed": "learned, for each token",
    "exchanged": "the same, each given to another token",
    "mean": "the same, their mean for all tokens",
}
"""Of the second table, how KL is weighed."""
OF_THREE, FIXED = "1.58", ("kl", "kl3", "kl8", "kl20")
FLOAT, ROUNDED, CALIBRATED = "float", "rounded", "GPTQ"
BATCHES = 8
"""Training batches that GPTQ is calibrated on: of 64 texts of 128 bytes."""
DAMPINGS = (0.01, 0.1)
"""Of GPTQ: the validation split chooses."""


def recipe_of(width: str) -> Recipe:
    """What the study trains at a width."""
    settings = yaml.safe_load(STUDY.read_text(encoding="utf-8"))["variants"][f"w{width}_kl"]
    base = yaml.safe_load((STUDY.parent / "../language/quickstart.yaml").read_text(encoding="utf-8"))
    quantization = dict(base["model"]["init_args"]["quantization"])
    prefix = "model.init_args.quantization."
    quantization |= {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    rules = [Rule(**rule) for rule in quantization.pop("rules")]
    return Recipe(**quantization, rules=rules)


def network() -> GPT:
    """The network in float that every student starts from."""
    made = GPT()
    load_weights(made, "builtin:topics_gpt")
    return made.eval()


@torch.no_grad()
def bits_per_byte(model: nn.Module, batches: Any) -> float:
    """Of a text of bytes, over all tokens that are predicted."""
    task, total, count = CausalLM(bytes_per_token=1), 0.0, 0
    for batch in batches:
        rows = task.rows(model(batch.tokens.long()), batch)
        assert rows.labels is not None
        total += float(nn.functional.cross_entropy(rows.logits, rows.labels, reduction="sum"))
        count += len(rows.labels)
    return total / count / math.log(2)


def measure() -> Iterator[dict[str, Any]]:
    """The rows of :data:`PTQ`."""
    data = PythonTopics(seed=0)
    data.setup()
    test = list(data.test_dataloader())
    calibration: list[Tensor] = [batch.tokens.long() for batch in islice(data.train_dataloader(), BATCHES)]
    validation = list(data.val_dataloader())
    yield {"width": "", "how": FLOAT, "bits_per_byte": bits_per_byte(network(), test)}
    for width in WIDTHS:
        model, _ = quantize_model(network(), recipe_of(width))
        initialize_quantizers(model, calibration[0])
        yield {"width": width, "how": ROUNDED, "bits_per_byte": bits_per_byte(model.eval(), test)}
        made = []
        for damping in DAMPINGS:
            candidate = copy.deepcopy(model)
            started = time.process_time()
            gptq(candidate, calibration, damping=damping)
            row = {"damping": damping, "cpu_seconds": round(time.process_time() - started, 1)}
            made.append((bits_per_byte(candidate, validation), row, candidate))
        _, row, best = min(made, key=lambda each: each[0])
        yield {"width": width, "how": CALIBRATED, "bits_per_byte": bits_per_byte(best, test)} | row


def table(ptq: Path, runs: Path) -> str:
    """Bits a byte on the test split by width, and how much of the gap that GPTQ leaves is closed."""
    untrained = {(row["width"], row["how"]): float(row["bits_per_byte"]) for row in _read(ptq)}
    trained = {variant: [*by_seed.values()] for variant, by_seed in _trained(runs, "test").items()}
    best = untrained["", FLOAT]
    headings = ["weights", "float", "rounded", "GPTQ", *TRAINED.values(), "of the gap of GPTQ closed with KL", "seeds"]
    rows = []
    for width in WIDTHS:
        by_method = {how: trained.get((width, how), []) for how in TRAINED}
        if not any(by_method.values()):
            continue
        left = untrained[width, CALIBRATED]
        closed = [(left - value) / (left - best) for value in by_method["kl"]]
        counts = sorted({len(values) for values in by_method.values()})
        rows.append(
            [
                "three values" if width == "1.58" else f"{width} bits",
                *(f"{value:.3f}" for value in (best, untrained[width, ROUNDED], left)),
                *(_spread(values, ".3f") for values in by_method.values()),
                _spread([100 * value for value in closed], ".0f") + " %",
                " to ".join(map(str, counts)),
            ]
        )
    return markdown(headings, rows)


def of_three_values(runs: Path) -> str:
    """Bits a byte of every way of weighing KL, where weights have three values."""
    test, val = (
        {how: of[OF_THREE, how] for how in WEIGHED_BY if (OF_THREE, how) in of}
        for of in (_trained(runs, "test"), _trained(runs, "val_best"))
    )
    seeds = max(len(val[how]) for how in FIXED if how in val)  # means of other seeds are not compared
    whole = [how for how in FIXED if len(val.get(how, ())) == seeds]
    fixed = min(whole, key=lambda how: statistics.fmean(val[how].values()))
    headings = ["weight of KL", "validation", "test", "seeds"]
    headings += [f"less {WEIGHED_BY[to]}" for to in (fixed, "weighed")]
    rows = []
    for how, by_seed in test.items():
        row = [WEIGHED_BY[how], *(_spread([*of[how].values()], ".3f") for of in (val, test)), str(len(by_seed))]
        rows.append(row + ["" if how == to else _less(by_seed, test[to]) for to in (fixed, "weighed")])
    return markdown(headings, rows)


def _less(ours: dict[int, float], theirs: dict[int, float]) -> str:
    """The mean difference and its 95 % interval."""
    seeds = [seed for seed in ours if seed in theirs]
    found = paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    if found.mean is None:
        return "n/a"
    return f"{found.mean:+.4f}" + ("" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]")


def _trained(runs: Path, measure: str) -> dict[tuple[str, str], dict[int, float]]:
    """Bits a byte of the runs that have finished, by width and method and then by seed."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in _read(runs):
        if row["status"] == "finished" and row["test"]:
            width, _, how = row["variant"].removeprefix("w").partition("_")
            found[width, how][int(row["seed"])] = float(row[measure]) / math.log(2)
    return found


def _spread(values: list[float], how: str) -> str:
    if not values:
        return "n/a"
    return f"{statistics.fmean(values):{how}}" + (f" ± {statistics.stdev(values):{how}}" if len(values) > 1 else "")


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure what no training reaches, and write it")
    parser.add_argument("--runs", type=Path, default=RUNS, help="runs.csv of the study")
    given = parser.parse_args()
    if given.measure:
        write_csv(PTQ, list(measure()))
    for path, made_by in (
        (PTQ, "python -m benchmarks.language_bits --measure writes it"),
        (given.runs, f"python -m lqkd compare --config {STUDY} writes a runs.csv for --runs"),
    ):
        if not path.is_file():
            parser.error(f"{path} is not there: {made_by}")
    print(table(PTQ, given.runs), of_three_values(given.runs), sep="\n\n")


if __name__ == "__main__":
    main()
