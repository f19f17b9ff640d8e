"""What OpenVINO computes of exported files against the students they were made of, and how long it takes.

    LQKD_DATA=FOLDER python -m benchmarks.openvino_files --csv FILE --cifar10 DIR --fashion DIR --keep DIR

ResNet-20 with the published weights, grids fitted to 128 training images of CIFAR-10 and batch norm re-estimated over
15 batches of them; MobileNetV2 and MobileNetV3 small on Fashion-MNIST at 32 pixels, four epochs of 6,400 images in
float, for W4A4 two more with simulated quantization. Additions have 8 bits, biases are integers. The portable file and
the one written for OpenVINO are judged on 1,000 test images, and timed in alternation with float32 ONNX, one image, one
thread, all in OpenVINO: the fastest of the rounds counts, since other work may run beside it. Trained networks are kept
in a folder and read from it in the next run.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.regularizer_study import write_rows
from lqkd.data import CIFAR10
from lqkd.export import check, deploy, floating, openvino, portable
from lqkd.export.latency import machine
from lqkd.models import CifarResNet, build_model, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm
from lqkd.quantization.batchnorm import foldable
from lqkd.quantization.biases import integer_biases

NETWORKS = {
    "resnet20": "CIFAR-10",
    "mobilenet_v2": "Fashion-MNIST",
    "mobilenetv3_small_100": "Fashion-MNIST",
}
BATCH, BATCHES, IMAGES, TRAINED_ON, ROUNDS = 128, 15, 1000, 6400, 200


def main() -> None:
    measure(__doc__, compare, {"CIFAR-10": 0, "Fashion-MNIST": 2}, TRAINED_ON)


def measure(
    description: str | None,
    rows_of: Callable[[nn.Module, Tensor, Tensor, Tensor], list[dict[str, Any]]],
    epochs: Mapping[str, int],
    trained_on: int,
    networks: Iterable[str] = NETWORKS,
) -> None:
    """Ask the command line for folders, and write what is found of every student at W8A8 and W4A4.

    Args:
        description: of the command.
        rows_of: what is found of a student, training images, test images and their labels.
        epochs: of W4A4 with simulated quantization, by data.
        trained_on: images at most.
        networks: which of them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the results")
    parser.add_argument("--cifar10", required=True, help="folder with CIFAR-10")
    chosen = {name: NETWORKS[name] for name in networks}
    if "Fashion-MNIST" in chosen.values():
        parser.add_argument("--fashion", type=Path, required=True, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--keep", type=Path, required=True, help="folder for trained networks")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, data in chosen.items():
        x, y, test, labels = _cifar10(options.cifar10) if data == "CIFAR-10" else _fashion(options.fashion)
        x, y = x[:trained_on], y[:trained_on]
        torch.manual_seed(0)
        network = _kept(options.keep / f"{name}_float.pt", lambda: _float(name, x, y))  # noqa: B023
        for bits in ("w8a8", "w4a4"):
            passes = epochs[data] if bits == "w4a4" else 0
            file = options.keep / f"{name}_{bits}_{passes}.pt"
            student = _kept(file, lambda: _student(network, bits, x, y, passes))  # noqa: B023
            for row in rows_of(student, x, test, labels):
                rows.append({"network": name, "data": data, "bits": bits, **row})
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                write_rows(options.csv, rows)


def compare(student: nn.Module, x: Tensor, test: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """A row for the portable file and one for OpenVINO's."""
    deployed = deploy(student, test[:32], [x[i * BATCH : (i + 1) * BATCH] for i in range(8)])
    files = {"portable": portable.build(deployed), "openvino": openvino.build(deployed)}
    batches = list(zip(test.split(50), labels.split(50), strict=True))
    times = _times({name: file.model for name, file in files.items()} | {"float": floating.build(deployed).model}, test)
    rows = []
    for name, file in files.items():
        parity = check(file, deployed, test[:32], batches, student, runner=openvino.OpenVINORunner)
        rows.append(
            {
                "file": name,
                "images": parity.samples,
                "accuracy_trained": parity.trained,
                "accuracy_deployed": parity.deployed,
                "accuracy_file": parity.exported,
                "same_class_file_and_deployed": parity.agreement,
                "same_class_deployed_and_trained": parity.agreement_with_trained,
                "same_class_file_and_trained": _same(file.model, student, test),
                "passed": parity.problem is None,
                "milliseconds": round(times[name], 3),
                "milliseconds_float32": round(times["float"], 3),
                "machine": machine(),
                "openvino": metadata.version("openvino"),
                "torch": torch.__version__.partition("+")[0],
            }
        )
    return rows


@torch.no_grad()
def _same(model: onnx.ModelProto, student: nn.Module, test: Tensor) -> float:
    run = openvino.compile_model(model, threads=1)
    same = [torch.from_numpy(run(batch.numpy())[0]).argmax(1) == student(batch).argmax(1) for batch in test.split(50)]
    return float(torch.cat(same).double().mean())


def _times(models: dict[str, onnx.ModelProto], test: Tensor) -> dict[str, float]:
    image = test[:1].numpy()
    runs = {name: openvino.compile_model(model, threads=1) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run(image)
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * min(found) for name, found in times.items()}


def _kept(file: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """The network in ``file``, made and written there where it is not."""
    if not file.exists():
        network = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network, file)
    found: nn.Module = torch.load(file, weights_only=False)
    return found.eval()


def _float(name: str, x: Tensor, y: Tensor) -> nn.Module:
    """The network ``name``, trained in floating point."""
    if name == "resnet20":
        network = CifarResNet(20)
        load_weights(network, str(Path(os.environ["LQKD_DATA"]) / "weights" / "cifar10_resnet20.safetensors"))
        return network
    library = "torchvision" if name == "mobilenet_v2" else "timm"
    return _fit(build_model(f"{library}/{name}", num_classes=10), x, y, 4, 3e-3)


def _student(network: nn.Module, bits: str, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The network with few bits, trained for ``epochs``, as it is deployed."""
    student, _ = quantize_model(copy.deepcopy(network), Recipe(bits=bits, residual_bits=8))
    initialize_quantizers(student.train(), x[:BATCH])
    if epochs:
        _fit(student, x, y, epochs, 1e-3)
    reestimate_batchnorm(student, [x[i * BATCH : (i + 1) * BATCH] for i in range(BATCHES)])
    student.eval()
    with torch.no_grad():
        for place, bias in integer_biases(student, foldable(student).folded).items():
            layer: Any = student.get_submodule(place)
            layer.bias.copy_(bias)
    return student


def _fit(network: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> nn.Module:
    network.train()
    steps = len(x) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for i in range(steps):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            loss = F.cross_entropy(network(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network


def _cifar10(root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and 1,000 test images, evenly over the classes, and theirs."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    data = CIFAR10(root=root, batch_size=BATCH, limit_train=BATCH * BATCHES, mean=mean, std=std)
    data.setup()
    train = [data.preprocess(batch, train=False, epoch=0) for batch in data.train_dataloader()]
    test = [data.preprocess(batch, train=False, epoch=0) for batch in data.test_dataloader()]
    images, labels = torch.cat([batch.images for batch in test]), torch.cat([batch.labels for batch in test])
    step = len(images) // IMAGES
    return (
        torch.cat([batch.images for batch in train]),
        torch.cat([batch.labels for batch in train]),
        images[::step][:IMAGES],
        labels[::step][:IMAGES],
    )


def _fashion(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likewise, the first images of each file, (B, 3, 32, 32)."""

    def read(name: str, header: int, count: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header)[:count].copy()

    found = []
    for split, count in (("train", TRAINED_ON), ("t10k", IMAGES)):
        pixels = torch.from_numpy(read(f"{split}-images-idx3-ubyte.gz", 16, count * 784)).view(-1, 1, 28, 28)
        images = F.interpolate((pixels.float() / 255 - 0.286) / 0.353, size=32, mode="bilinear").repeat(1, 3, 1, 1)
        found += [images, torch.from_numpy(read(f"{split}-labels-idx1-ubyte.gz", 8, count)).long()]
    return found[0], found[1], found[2], found[3]


if __name__ == "__main__":
    main()
