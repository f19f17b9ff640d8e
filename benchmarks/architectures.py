"""Which networks of torchvision and timm a file can be made of: every one quantised, exported and compared, or why not.

    OMP_NUM_THREADS=1 python -m benchmarks.architectures --csv FILE [--library timm] [--only NAME ...]
    python -m benchmarks.architectures --csv FILE --table        # in Markdown, one line a family, from what FILE has

Random weights, W8A8, ten classes, two random images for the grids and two others for the comparison. Rows that FILE has
are not made again, so that a sweep can be gone on with. Above LARGEST parameters a network is not built, and its row
says so.
"""

from __future__ import annotations

import argparse
import csv
import gc
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lqkd.errors import ParityError, UsageError
from lqkd.export import check, deploy, portable
from lqkd.export.formats import check_expressible
from lqkd.export.runtimes import kernels
from lqkd.models import build_model
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm
from lqkd.studies.tables import markdown
from lqkd.utils.tables import write_csv

LARGEST = 70.0
"""Millions of parameters above which a network takes more memory and time than it tells."""
PIXELS = {"torchvision": 64, "timm": 64}
OTHER_PIXELS = {  # where a network is made for a size, or has no positions left at 64
    "alexnet": 224, "vgg": 224, "vit_": 224, "deit": 224, "maxvit": 224, "inception_v3": 128, "levit": 224, "cait":
    224, "pit_": 224, "xcit": 224, "swin_tiny": 224, "coat_lite": 224, "beit": 224, "mixer": 224, "tf_mixnet": 64,
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
TIMM = (
    "resnet18", "resnet50d", "resnetrs50", "seresnet18", "ecaresnet26t", "resnext26ts", "res2net50_26w_4s",
    "resnest14d", "skresnet18", "dla34", "densenet121", "vovnet39a", "hrnet_w18_small", "dpn48b", "regnetx_002",
    "regnety_002", "regnetz_005", "rexnet_100", "repvgg_a0", "mobileone_s0", "fastvit_t8", "mobilenetv1_100",
    "mobilenetv2_050", "mobilenetv3_large_100", "mobilenetv4_conv_small_050", "efficientnet_b0",
    "efficientnet_lite0", "tf_efficientnetv2_b0", "tf_mixnet_s", "mnasnet_small", "fbnetc_100", "hardcorenas_a",
    "ghostnet_050", "lcnet_050", "tinynet_e", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224", "mobilevit_xxs",
)  # fmt: skip
"""One of each family that people put on devices."""


def names(library: str) -> list[str]:
    """What of a library is tried: all classifiers of torchvision, the list of timm's."""
    if library == "timm":
        return list(TIMM)
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def there(library: str) -> list[str]:
    """All networks of a library."""
    if library == "timm":
        import timm

        return timm.list_models()
    return names(library)


def pixels_of(library: str, name: str) -> int:
    """The side of the images that a network is tried with."""
    return next((side for start, side in OTHER_PIXELS.items() if name.startswith(start)), PIXELS[library])


def outcome(library: str, name: str, largest: float = LARGEST) -> dict[str, Any]:
    """One row: what became of one network."""
    pixels, started = pixels_of(library, name), time.perf_counter()
    row: dict[str, Any] = {"library": library, "network": name, "pixels": pixels}
    size = sum(p.numel() for p in without_memory(library, name).parameters())
    row["parameters_m"] = round(size / 1e6, 1)
    if size > largest * 1e6:
        return row | {"outcome": "not tried", "reason": f"more than {largest:g} million parameters"}
    try:
        row |= exported(build(library, name), pixels)
    except (UsageError, ParityError) as error:
        row |= {"outcome": "refused" if isinstance(error, UsageError) else "differs", "reason": str(error)}
    return row | {"seconds": round(time.perf_counter() - started)}


def without_memory(library: str, name: str) -> nn.Module:
    """A network whose weights are counted and not there, where its constructor computes with none."""
    try:
        with torch.device("meta"):
            return build(library, name)
    except (NotImplementedError, RuntimeError):
        return build(library, name)


def build(library: str, name: str) -> nn.Module:
    """A network with random weights, in eval mode, as it is deployed: branches that merge for it have merged."""
    torch.manual_seed(0)
    network = build_model(f"{library}/{name}", 10, ARGUMENTS.get(name)).eval()
    if library == "timm":
        from timm.utils import reparameterize_model

        return reparameterize_model(network)
    return network


@torch.no_grad()
def exported(network: nn.Module, pixels: int) -> dict[str, Any]:
    """How the parts of a file are computed that was compared with the network.

    Raises:
        UsageError: where something cannot be quantised or exported.
        ParityError: where the file computes something else.
    """
    images = torch.randn(4, 3, pixels, pixels)
    reestimate_batchnorm(network, [images[:2]])
    student, _ = quantize_model(network, Recipe(bits="w8a8"))
    initialize_quantizers(student, images[:2])
    deployed = deploy(student.eval(), images[:2], [images[:2]], gates=True)
    check_expressible(deployed, "portable")
    made = portable.build(deployed)
    parity = check(made, deployed, images[2:])
    if parity.problem is not None:
        raise ParityError(parity.problem)
    found = kernels(made.model)
    moved = ("QuantizeLinear", "DequantizeLinear")  # into and out of the integers
    return {
        "outcome": "integer" if all(kind in moved for _, kind in found.floats) else "islands",
        "integer_nodes": sum(found.integer.values()),
        "float_nodes": len(found.floats),
        "float_products": len(found.float_products),
    }


def table(rows: list[dict[str, str]]) -> str:
    """The networks of each library and outcome, in Markdown."""
    lines = []
    for library in dict.fromkeys(row["library"] for row in rows):
        ours = [row for row in rows if row["library"] == library]
        for result in ("integer", "islands", "refused", "differs", "not tried"):
            found = [row for row in ours if row["outcome"] == result]
            if found:
                lines.append(
                    (library, result, f"{len(found)} of {len(ours)}", ", ".join(row["network"] for row in found))
                )
    return markdown(("library", "outcome", "networks", "which"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the result, gone on with where it exists")
    parser.add_argument("--library", choices=sorted(PIXELS), action="append", help="default: both")
    parser.add_argument("--only", nargs="+", help="names to try, instead of all")
    parser.add_argument("--largest", type=float, default=LARGEST, metavar="M", help="millions of parameters")
    parser.add_argument("--table", action="store_true", help="print the table and try nothing")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.csv.exists():
        with open(arguments.csv, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    if arguments.table:
        print(table(rows))
        return
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "onnxruntime")}
    done = {(row["library"], row["network"]) for row in rows}
    tried = {
        library: [name for name in arguments.only or names(library) if name in there(library)]
        for library in arguments.library or PIXELS
    }
    if missing := set(arguments.only or ()) - {name for some in tried.values() for name in some}:
        parser.error(f"--only {min(missing)}: there is no such network in {' or '.join(tried)}")
    for library, some in tried.items():
        for name in some:
            if (library, name) not in done:
                rows.append(outcome(library, name, arguments.largest) | versions)
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items() if key not in versions), flush=True)
                write_csv(arguments.csv, rows)
                gc.collect()


if __name__ == "__main__":
    main()
