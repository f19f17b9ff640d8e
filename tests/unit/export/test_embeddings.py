"""A network that begins with an embedding: what is refused, and the way that the refusal names."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lqkd.errors import UsageError
from lqkd.export import deploy, to_onnx, torch_program
from lqkd.export.program import check_program
from lqkd.quantization import Recipe, initialize_quantizers, quantize_model


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.behind = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 3))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, 6) -> (B, 3)
        return self.behind(self.embedding(tokens))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(20, (8, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", ["w4a4", "w32a4"])
def test_an_embedding_is_refused_with_its_place_and_the_way_around(tokens: Tensor, bits: str) -> None:
    student, _ = quantize_model(Text(), Recipe(bits=bits))
    initialize_quantizers(student, tokens)
    with pytest.raises(UsageError, match=r"embedding 'embedding' cannot be exported.*export the module behind it"):
        to_onnx(student, tokens)


def test_the_module_behind_an_embedding_is_exported_and_gives_the_students_logits(tokens: Tensor) -> None:
    torch.manual_seed(0)
    student, _ = quantize_model(Text(), Recipe(bits="w4a4"))
    initialize_quantizers(student, tokens)
    student.eval()
    rows = student.embedding.quantized_weight().detach()[tokens]  # type: ignore[union-attr, operator]
    model = to_onnx(student.behind, rows, calibration=[rows], test=[rows])  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, {"images": rows.numpy().astype(np.float32)})[0]
    expected = student(tokens).detach().numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_torch_program_takes_every_batch_of_sequences() -> None:
    torch.manual_seed(0)
    student, _ = quantize_model(Text().behind, Recipe(bits="w4a4"))
    rows = torch.randn(8, 6, 8)
    initialize_quantizers(student, rows)
    deployed = deploy(student, rows, [rows])
    assert check_program(torch_program.build(deployed, rows), deployed, rows).batches == (1, 7, 32)
