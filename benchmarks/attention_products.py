"""What attention's products on grids cost in accuracy and bring in time: a small ViT with and without, one run each.

    OMP_NUM_THREADS=1 python -m benchmarks.attention_products [--steps 1000] [--student-steps 100]

A ViT of torchvision (patches of 2, width 64, four blocks of four heads) is trained in float on Digits and then as
students from its own logits (KL at 4 : 1 with labels), from the same weights on the same batches.
Accuracies are of the test images; the last is the exported file's. Times are of ``vit_tiny_patch16_224`` of timm with
random weights, one image, one thread, in alternation.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lqkd.data import Digits
from lqkd.export import to_onnx
from lqkd.export.latency import measure
from lqkd.export.runtimes import Runner, kernels
from lqkd.models import build_model
from lqkd.models.calls import Inputs
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model
from lqkd.utils.tables import text_table

BATCH, RATE, STUDENT_RATE = 64, 1e-3, 2e-4
STUDENTS = [("w8a8", None), ("w8a8", 8), ("w4a4", None), ("w4a4", 8), ("w4a4", 4)]
"""Bits of layers and of attention's products."""


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 8, 8) and labels, and those for testing, as Digits normalises them."""
    held, mean, std = Digits().load(), Digits.default_mean[0], Digits.default_std[0]
    assert isinstance(held.train_images, Tensor)
    assert isinstance(held.test_images, Tensor)
    train, test = ((x.float() / 255 - mean) / std for x in (held.train_images, held.test_images))
    return train, held.train_labels, test, held.test_labels


def fit(network: nn.Module, x: Tensor, labels: Tensor, steps: int, rate: float, teacher: nn.Module | None) -> None:
    """Train on crops of what is padded by one pixel, at a rate that ends at zero."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    network.train()
    for step in range(steps):
        chosen = torch.randint(len(x), (BATCH,))
        left, top = torch.randint(3, (2,)).tolist()
        batch = F.pad(x[chosen], (1, 1, 1, 1))[:, :, top : top + 8, left : left + 8]
        logits = network(batch)
        loss = F.cross_entropy(logits, labels[chosen])
        if teacher is not None:
            with torch.no_grad():
                theirs = teacher(batch)
            loss = 0.2 * loss + 0.8 * F.kl_div(
                logits.log_softmax(1), theirs.log_softmax(1), None, None, "batchmean", True
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: {float(loss.detach()):.3f}", flush=True)
    network.eval()


def accuracy(found: Tensor, labels: Tensor) -> str:
    return f"{(found.argmax(1) == labels).double().mean():.1%}"


def students(steps: int, student_steps: int) -> str:
    """A table of accuracies: as fitted, as trained, of the file."""
    x, labels, test, truth = images()
    torch.manual_seed(0)
    network = VisionTransformer(8, 2, 4, 4, 64, 128, num_classes=10)
    network.conv_proj = nn.Conv2d(1, 64, 2, stride=2)
    fit(network, x, labels, steps, RATE, None)
    with torch.no_grad():
        rows = [
            ("layers", "products", "fitted", "trained", "file"),
            ("float", "float", "", accuracy(network(test), truth), ""),
        ]
    for bits, attention in STUDENTS:
        student, _ = quantize_model(copy.deepcopy(network), Recipe(bits, residual_bits=8, attention_bits=attention))
        initialize_quantizers(student, x[:256])
        with torch.no_grad():
            fitted = accuracy(student.eval()(test), truth)
        fit(student, x, labels, student_steps, STUDENT_RATE, network)
        with torch.no_grad():
            trained = accuracy(student(test), truth)
        model = to_onnx(student, x[:32], calibration=[x[:256]])
        answers = torch.from_numpy(Runner(model, optimised=True)(test.numpy())["logits"])
        rows.append(
            (bits, "float" if attention is None else f"{attention} bits", fitted, trained, accuracy(answers, truth))
        )
        print(text_table(rows, left=2), flush=True)
    return text_table(rows, left=2)


def times() -> str:
    """A table of milliseconds, and what computes in floating point besides moves."""
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    models = {}
    for attention in (None, 8):
        torch.manual_seed(0)
        student, _ = quantize_model(
            build_model("timm/vit_tiny_patch16_224", 1000).eval(),
            Recipe("w8a8", residual_bits=8, attention_bits=attention),
        )
        initialize_quantizers(student, x)
        models["float" if attention is None else f"{attention} bits"] = to_onnx(student.eval(), x[:2], calibration=[x])
    found = measure(models, Inputs.of(x[:1]), rounds=60)
    rows = [("products", "integer kernels", "ms", "ratio", "kB", "float products")]
    for name, model in models.items():
        made = kernels(model)
        counts = ", ".join(f"{count} {kind}" for kind, count in made.integer.items())
        rows.append(
            (
                name,
                counts,
                f"{found.milliseconds[name]:.2f}",
                f"{found.ratios[name]:.2f}",
                f"{model.ByteSize() / 1000:.0f}",
                str(len(made.float_products)),
            )
        )
    return "\n".join([text_table(rows, left=2), found.machine, str(found.versions)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--student-steps", type=int, default=100)
    given = parser.parse_args()
    print(students(given.steps, given.student_steps), flush=True)
    print(times())


if __name__ == "__main__":
    main()
