"""Classes of image files by a file of lqkd's export, with numpy, Pillow and ONNX Runtime alone.

python run_onnx.py student.onnx IMAGE...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
names, prepare = (json.loads(about.get(f"lqkd.{key}", "null")) for key in ("class_names", "preprocessing"))
if not prepare:  # of lqkd.export.to_onnx, which knows of it only what its argument about says
    sys.exit(f"{sys.argv[1]} does not say how images are prepared: to_onnx(..., about={{'preprocessing': ...}}) does")
height, width = prepare["size"]
mean, std = (np.array(prepare[key], np.float32)[:, None, None] for key in ("mean", "std"))
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if prepare["channels"] == 1 else "RGB")
    if prepare.get("resize_size") is None:  # trained on images of exactly this size
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    else:
        sides = [int(prepare["resize_size"] * side / min(image.size)) for side in image.size]
        left, top = round((sides[0] - width) / 2), round((sides[1] - height) / 2)
        image = image.resize(sides, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.uint8).reshape(height, width, -1)
    planes = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    taken = session.get_inputs()[0]  # a file that was exported with --frames prepares pixels itself
    given = pixels[None] if taken.name == "frames" else ((planes - mean) / std)[None]
    if isinstance(taken.shape[0], int):  # and one with --batch takes so many images
        given = np.repeat(given, taken.shape[0], axis=0)
    logits = session.run(None, {taken.name: given})[0][0].astype(np.float64)
    if not np.isfinite(logits).all():
        sys.exit(f"{sys.argv[1]} answers with logits that are not finite: its training diverged, or it is damaged")
    odds = np.exp(logits - logits.max())
    print(f"{path}: {names[odds.argmax()] if names else odds.argmax()} {odds.max() / odds.sum():.1%}")
