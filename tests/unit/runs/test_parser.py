"""What is written of a run can be read again."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lqkd.runs.parser import OneLineParser


@pytest.mark.filterwarnings(r"error:\s*Unable to serialize")
def test_a_default_that_no_file_can_hold_is_left_out_and_the_file_is_read_again(tmp_path: Path) -> None:
    parser = OneLineParser()
    parser.add_subclass_arguments(nn.Module, "network")
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    given = parser.parse_object({"network": {"class_path": "torchvision.models.VisionTransformer", "init_args": sizes}})
    text = parser.dump(given, skip_none=False)  # norm_layer is a functools.partial
    assert "norm_layer" not in text
    assert "hidden_dim: 16" in text
    (tmp_path / "config.yaml").write_text(text)
    assert parser.parse_path(str(tmp_path / "config.yaml")).network.init_args.hidden_dim == 16
