"""What is left of a network whose grids are fitted and which is not trained (PTQ), bits by bits.

    LQKD_DATA=FOLDER python -m benchmarks.fitted_only --csv FILE --data DIR [--bits w8a8 w4a4 w2a2] [--seeds N]

ResNet-20 on CIFAR-10 in DIR, weights from FOLDER; first and last layer have 8 bits. Grids are fitted to one batch of
128 training images; then batch norm is re-estimated over 50 batches, as a trained student's is. Accuracy is on the
10,000 test images. A seed is another choice of training images. Every measurement is a row at once.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from torch import Tensor, nn

from benchmarks.regularizer_study import accuracy, write_rows
from lqkd.data import CIFAR10
from lqkd.models import CifarResNet, load_weights
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model, reestimate_batchnorm

_BATCHES = 50


def fitted(network: nn.Module, bits: str, batches: list[Tensor], test: list[tuple[Tensor, Tensor]]) -> float:
    student, _ = quantize_model(copy.deepcopy(network), Recipe(bits=bits))
    initialize_quantizers(student.train(), batches[0])
    reestimate_batchnorm(student, batches)
    return accuracy(student, test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file for the results")
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a4", "w2a2"])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    network = CifarResNet(20)
    load_weights(network, str(Path(os.environ["LQKD_DATA"]) / "weights" / "cifar10_resnet20.safetensors"))
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        seed_everything(seed, verbose=False)
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        data = CIFAR10(root=options.data, batch_size=128, limit_train=128 * _BATCHES, mean=mean, std=std)
        data.setup()
        batches = [data.preprocess(batch, train=True, epoch=0).images for batch in data.train_dataloader()]
        prepared = (data.preprocess(batch, train=False, epoch=0) for batch in data.test_dataloader())
        test = [(batch.images, batch.labels) for batch in prepared]
        if not rows:
            rows.append({"seed": "", "bits": "float", "test": accuracy(network, test)})
        for bits in options.bits:
            rows.append({"seed": seed, "bits": bits, "test": fitted(network, bits, batches, test)})
            print(rows[-1], flush=True)
            write_rows(options.csv, rows)


if __name__ == "__main__":
    main()
