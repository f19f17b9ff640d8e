"""Image files become what validation shows the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from lqkd.data import Digits
from lqkd.data.augment import normalize
from lqkd.data.preprocessing import Preprocessing
from lqkd.errors import UsageError

RGB = Preprocessing(3, (8, 12), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
GREY = Preprocessing(1, (8, 12), (0.4,), (0.2,))


def pixels(height: int, width: int) -> np.ndarray:
    """A smooth picture with all colours."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([255 * rows / height, 255 * columns / width, 128 + 0 * rows], axis=-1).astype(np.uint8)


def test_an_image_of_the_networks_size_gives_the_very_numbers_of_validation(tmp_path: Path) -> None:
    data = Digits()
    data.setup()
    batch = next(iter(data.val_dataloader()))
    Image.fromarray(batch.images[5, 0].numpy()).save(tmp_path / "digit.png")
    preprocessing = Preprocessing(1, data.image_shape[1:], data.mean, data.std)
    expected = data.preprocess(batch, train=False, epoch=0).images[5]
    assert torch.equal(torch.from_numpy(preprocessing.read(tmp_path / "digit.png")), expected)


def test_colours_are_normalised_channel_by_channel(tmp_path: Path) -> None:
    picture = pixels(8, 12)
    Image.fromarray(picture).save(tmp_path / "image.png")
    expected = normalize(torch.from_numpy(picture.transpose(2, 0, 1)[None].copy()), RGB.mean, RGB.std)[0]
    assert torch.equal(torch.from_numpy(RGB.read(tmp_path / "image.png")), expected)


@pytest.mark.parametrize("preprocessing", [RGB, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("LA", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg")]
)
def test_an_image_of_any_kind_is_read(mode: str, suffix: str, preprocessing: Preprocessing, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels(40, 50)).convert(mode).save(path)
    read = preprocessing.read(path)
    assert read.shape == (preprocessing.channels, 8, 12)
    assert read.dtype == np.float32
    assert np.isfinite(read).all()


def test_a_rotation_that_the_camera_noted_is_applied(tmp_path: Path) -> None:
    upright = Image.fromarray(pixels(80, 120))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert np.array_equal(RGB.read(tmp_path / "turned.png"), RGB.read(tmp_path / "upright.png"))


def test_another_size_gives_the_largest_centred_window_of_the_networks_shape(tmp_path: Path) -> None:
    picture = np.zeros((80, 200, 3), np.uint8)
    picture[:, 40:160] = pixels(80, 120)
    shown = RGB.resized(picture)
    alone = RGB.resized(pixels(80, 120))
    assert np.abs(shown[:, 1:-1].astype(int) - alone[:, 1:-1]).max() <= 1  # at the edge, pixels beside it count too
    assert alone[0, 0, 0] < 20
    assert alone[-1, -1, 0] > 230


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (64, 64), (20, 500)])
def test_resize_size_is_torchvisions_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    preprocessing = Preprocessing(3, (56, 56), RGB.mean, RGB.std, resize_size=64)
    picture = pixels(*shape)
    tensor = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    expected = functional.center_crop(functional.resize(tensor, [64], antialias=True), [56, 56])
    ours = preprocessing.resized(picture).transpose(2, 0, 1)
    assert np.abs(ours.astype(int) - expected.numpy()).max() <= 1


def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(pixels(40, 50)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name, said in (("text.png", "cannot be read"), ("half.png", "cannot be read"), ("none.png", "does not exist")):
        with pytest.raises(UsageError, match=rf"{name}.*{said}") as caught:
            RGB.read(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"is a folder: give image files, e.g. .*/\*"):
        RGB.read(tmp_path)


@pytest.mark.parametrize("missing", [{"channels": 2}, {"size": []}, {"mean": []}, {"std": [1.0]}])
def test_a_description_that_lacks_something_is_refused(missing: dict[str, object]) -> None:
    described = {"channels": 3, "size": [8, 8], "mean": [0.0] * 3, "std": [1.0] * 3}
    assert Preprocessing.of(described, "x.onnx").size == (8, 8)
    with pytest.raises(UsageError, match=r"x\.onnx.*does not say how images are prepared"):
        Preprocessing.of(described | missing, "x.onnx")


def test_whole_images_are_resized_as_validation_of_boxes_and_masks_resizes_them() -> None:
    picture = pixels(90, 200)
    resized = Preprocessing(3, (56, 64), RGB.mean, RGB.std, whole=True).resized(picture)
    expected = functional.resize(torch.from_numpy(picture).permute(2, 0, 1), [56, 64]).permute(1, 2, 0).numpy()
    assert np.abs(resized.astype(int) - expected).max() <= 1
