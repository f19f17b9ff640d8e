"""Pearson correlation of feature maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lqkd.losses import PKD


def test_pkd_is_one_less_the_correlation_of_each_channel_in_both_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    correlations = [
        np.corrcoef(teacher[:, channel].flatten().numpy(), student[:, channel].flatten().numpy())[0, 1]
        for channel in range(4)
    ]
    loss = PKD()
    assert float(loss.reduce(loss(teacher, student))) == pytest.approx(1 - np.mean(correlations), rel=1e-12)
