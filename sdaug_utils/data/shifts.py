"""Test images that differ from those trained on, each in one way, by torchvision's own transforms.

Rotations, and the corruptions of ImageNet-C (Hendrycks and Dietterich, ICLR 2019) that make sense
at small sizes, each of one strength; an image's own number seeds what is drawn for it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from sdaug_utils.data.images import Images, ImageSource, Split
from sdaug_utils.store import digest

CODE_VERSION = 1
DEGREES = 20.0  # a rotation is at most this, either way
FACTOR = 0.5  # of brightness and of contrast
NOISE = 25.0  # grey levels: the standard deviation
SHIFTS = ("rotation", "darkness", "low contrast", "blur", "noise")


def shifted(split: Split, name: str) -> Images:
    """A split's images, each changed as ``name``, one of ``SHIFTS``, says: 8-bit RGB."""

    def load(row: int) -> np.ndarray:
        from torchvision.transforms.v2 import InterpolationMode, functional

        image, rng = split.load(row), np.random.default_rng(row)
        picture = Image.fromarray(image)
        match name:
            case "rotation":
                angle = rng.uniform(-DEGREES, DEGREES)
                return np.array(functional.rotate(picture, angle, InterpolationMode.BILINEAR))
            case "darkness":
                return np.array(functional.adjust_brightness(picture, FACTOR))
            case "low contrast":
                return np.array(functional.adjust_contrast(picture, FACTOR))
            case "blur":
                sigma = min(image.shape[:2]) / 32
                width = 2 * int(3 * sigma) + 1
                return np.array(functional.gaussian_blur(picture, width, sigma))
            case "noise":
                noisy = image + rng.normal(0, NOISE, image.shape)
                return noisy.clip(0, 255).astype(np.uint8)
        raise ValueError(f"no shift is called '{name}'")

    def image_digest(row: int) -> str:
        recipe = {"version": CODE_VERSION, "shift": name, "row": row}
        return digest({**recipe, "image": split.image_digest(row)})

    group = f"{split.name}, {name}"
    return Images(tuple(ImageSource(load, image_digest, row, group) for row in range(len(split))))
