from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lqkd.data.decode import decode
from lqkd.errors import UsageError


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


def refusal(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        decode(path, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_kind_of_png_becomes_three_channels_of_eight_bits(mode: str, tmp_path: Path) -> None:
    pixels = decode(saved(tmp_path, Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode)), "image")
    assert (pixels.shape, pixels.dtype) == ((3, 5, 3), np.uint8)
    assert (pixels == 255).all()


def test_one_channel_is_what_is_asked_for(tmp_path: Path) -> None:
    pixels = decode(saved(tmp_path, Image.new("RGB", (5, 3), (7, 7, 7))), "image", mode="L")
    assert pixels.shape == (3, 5, 1)
    assert (pixels == 7).all()


def test_a_cmyk_photograph_keeps_its_colours(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "image.jpg", quality=95)
    red, green, blue = decode(path, path)[8, 8].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    wide = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decode(saved(tmp_path, Image.fromarray(wide)), "image")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode: str, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new(mode, (5, 3)), "image.tiff")
    assert refusal(path) == f"{path} has 32-bit pixels: images must have 8 or 16 bits per channel."


def test_the_rotation_that_a_camera_noted_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # white on the left
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = decode(saved(tmp_path, image, "image.jpg", exif=exif, quality=95), "image")
    assert pixels.shape == (16, 8, 3)
    assert pixels[0].min() > 240  # white is on top
    assert pixels[-1].max() < 15


def test_a_damaged_note_of_the_camera_does_not_matter(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7f"
    pixels = decode(saved(tmp_path, Image.new("RGB", (16, 8), (255, 0, 0)), "image.jpg", exif=exif), "image")
    assert pixels.shape == (8, 16, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_an_image_that_is_cut_short_is_named(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), f"image.{suffix}")
    os.truncate(path, os.path.getsize(path) // 2)
    assert refusal(path).startswith(f"{path} cannot be read as an image: ")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "the file is empty"), (b"<html>404</html>", "it is of no known kind")]
)
def test_a_file_that_is_no_image_is_named_once(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(content)
    assert refusal(str(tmp_path / "image.jpg")) == f"{tmp_path}/image.jpg cannot be read as an image: {reason}."
