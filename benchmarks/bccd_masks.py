"""BCCD's photographs of blood cells with masks made from its boxes: an image set for segmentation.

    LQKD_DATA=FOLDER python -m benchmarks.bccd_masks OUT

FOLDER/bccd.tar is BCCD (https://github.com/Shenggan/BCCD_Dataset, MIT): 364 photographs of 640x480 with boxes around
red cells (RBC), white cells (WBC) and platelets, in parts of 205, 87 and 72 for training, validation and testing.
Nobody has drawn outlines: a mask is the ellipse inscribed in each box, which is closer to a cell than the box, but no
ground truth of its outline. Where cells overlap, platelets lie on white cells and these on red ones. Cells without a
box are ground. Images and masks are written at a quarter of the size, as PNG, for lqkd.data.SegmentationFolder.
"""

from __future__ import annotations

import argparse
import os
import tarfile
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw

CLASSES = ("ground", "RBC", "WBC", "Platelets")
_REDUCED = 4


def mask_of(annotation: ElementTree.Element, size: tuple[int, int]) -> Image.Image:
    """The classes of all pixels of a photograph of this width and height, as 8-bit grey."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    cells = [(CLASSES.index(cell.findtext("name", "")), cell.find("bndbox")) for cell in annotation.iter("object")]
    for label, box in sorted(cells, key=lambda cell: cell[0]):
        assert box is not None
        corners = [int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
        if corners[2] > corners[0] and corners[3] > corners[1]:  # two boxes of BCCD have no area
            draw.ellipse(corners, fill=label)
    return mask


def write(archive: tarfile.TarFile, part: str, target: Path) -> int:
    """Write the images and masks of a part; return how many."""

    def read(name: str) -> tarfile.ExFileObject:
        file = archive.extractfile(f"BCCD/{name}")
        assert isinstance(file, tarfile.ExFileObject), name
        return file

    names = read(f"ImageSets/Main/{part}.txt").read().decode().split()
    for kind in ("images", "masks"):
        (target / part / kind).mkdir(parents=True, exist_ok=True)
    for name in names:
        with Image.open(read(f"JPEGImages/{name}.jpg")) as photograph:
            size = (photograph.width // _REDUCED, photograph.height // _REDUCED)
            mask = mask_of(ElementTree.parse(read(f"Annotations/{name}.xml")).getroot(), photograph.size)
            photograph.reduce(_REDUCED).save(target / part / "images" / f"{name}.png")
        mask.resize(size, Image.Resampling.NEAREST).save(target / part / "masks" / f"{name}.png")
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write train, val and test into")
    target: Path = parser.parse_args().out
    with tarfile.open(Path(os.environ["LQKD_DATA"]) / "bccd.tar") as archive:
        for part in ("train", "val", "test"):
            print(f"{part}: {write(archive, part, target)} images")


if __name__ == "__main__":
    main()
