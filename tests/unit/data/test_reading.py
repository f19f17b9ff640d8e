"""Looking into loaders: what torch's own collation cannot make a batch of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lqkd.data.reading import check_collates, first_batch
from lqkd.errors import UsageError


class Samples(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Annotation:
    pass


KINDS: dict[str, tuple[Callable[[int], Any], str]] = {
    "Pillow": (lambda i: (Image.new("RGB", (8, 8)), i), "its samples hold images of Pillow, where tensors,.*transform"),
    "None": (lambda i: (torch.zeros(2), None), "its samples hold NoneType, where"),
    "object": (lambda i: {"a": Annotation()}, r"its samples hold [\w.]*Annotation, where"),
    "objects in an array": (lambda i: np.array([None]), "its samples hold object, where"),
    "sizes": (lambda i: torch.zeros(3, 8 + i), r"its samples differ in size( \(\[3, 8\] and \[3, 9\]\))?: crop or pad"),
    "lists": (lambda i: [0] * (i + 1), "its samples differ in size: crop or pad"),
    "keys": (lambda i: {str(i): 0}, "its samples do not fit together .*make them alike"),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in KINDS), ("Pillow", 1), ("sizes", 1)])
def test_samples_that_make_no_batch_are_told_in_one_sentence(kind: str, workers: int) -> None:
    make, message = KINDS[kind]
    with pytest.raises(UsageError, match=rf"^the training DataLoader cannot make a batch: {message}[^\n]*$"):
        check_collates(DataLoader(Samples(make), batch_size=4, num_workers=workers), "training")


def test_an_error_of_the_data_set_itself_is_left_as_it_is() -> None:
    def broken(index: int) -> None:
        raise TypeError("its own")

    with pytest.raises(TypeError, match="its own"):
        first_batch(DataLoader(Samples(broken)), "training")
