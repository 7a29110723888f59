"""Test images that differ from those trained on, each in one way, by torchvision's own transforms.

Those corruptions of ImageNet-C (Hendrycks and Dietterich, ICLR 2019) that mean something at small
sizes, and rotations, each of one strength; an image's own number seeds what is drawn for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from sdaug_utils.data.images import Images, ImageSource, Split
from sdaug_utils.store import digest

CODE_VERSION = 1
DEGREES = 20.0  # a rotation is at most this, either way
FACTOR = 0.5  # of brightness and of contrast
NOISE = 25.0  # grey levels: the standard deviation


def _rotation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from torchvision.transforms.v2 import InterpolationMode, functional

    angle = rng.uniform(-DEGREES, DEGREES)
    return functional.rotate(Image.fromarray(image), angle, InterpolationMode.BILINEAR)


def _darkness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from torchvision.transforms.v2 import functional

    return functional.adjust_brightness(Image.fromarray(image), FACTOR)


def _contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(Image.fromarray(image), FACTOR)


def _blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from torchvision.transforms.v2 import functional

    sigma = min(image.shape[:2]) / 32
    return functional.gaussian_blur(Image.fromarray(image), 2 * int(3 * sigma) + 1, sigma)


def _noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = image + rng.normal(0, NOISE, image.shape)
    return noisy.clip(0, 255).astype(np.uint8)


SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "rotation": _rotation,
    "darkness": _darkness,
    "low contrast": _contrast,
    "blur": _blur,
    "noise": _noise,
}


def shifted(split: Split, name: str) -> Images:
    """A split's images, each changed in the way that ``SHIFTS`` has under a name: 8-bit RGB."""

    def load(row: int) -> np.ndarray:
        return np.array(SHIFTS[name](split.load(row), np.random.default_rng(row)))

    def digest_of(row: int) -> str:
        recipe = {"version": CODE_VERSION, "shift": name, "row": row}
        return digest({**recipe, "image": split.image_digest(row)})

    rows = range(len(split))
    group = f"{split.name}, {name}"
    return Images(tuple(ImageSource(load, digest_of, row, group) for row in rows))
