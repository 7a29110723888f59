"""Classical transforms, as the thesis composed them (section 4.2.2 and its code)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from sdaug_utils.lazy import torch
from sdaug_utils.params import Augmentation

CODE_VERSION = 1
Transform = Callable[[Image.Image], Image.Image]


def build(name: Augmentation, image_size: int) -> Transform:
    """A transform from an image of any size to a square of ``image_size`` pixels.

    The aspect ratio is not kept. ``custom`` works before the resize, the two automated policies
    after it. All draw from torch's global generator.
    """
    from torchvision.transforms import v2  # takes seconds

    resize = v2.Resize((image_size, image_size), antialias=True)
    match name:
        case "none":
            return resize
        case "custom":
            flip, rotate = v2.RandomHorizontalFlip(0.5), v2.RandomRotation(10)
            jitter, blur = v2.ColorJitter(0.3, 0.1, 0.2, 0.1), v2.GaussianBlur(3, (0.1, 2.0))
            return v2.Compose([flip, jitter, blur, rotate, resize])
        case "autoaugment":  # Cubuk et al., 2019: the ImageNet policy
            return v2.Compose([resize, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)])
        case "randaugment":  # Cubuk et al., 2020: two operations of magnitude 9
            return v2.Compose([resize, v2.RandAugment(2, 9)])
        case _:
            raise ValueError(f"'{name}' mixes images: it is no transform of one of them")


def view(image: np.ndarray, transform: Transform, seed: int) -> np.ndarray:
    """One augmented view of an 8-bit RGB image; the same seed gives the same view."""
    from torchvision.transforms import v2

    picture = Image.fromarray(image)
    if isinstance(transform, v2.Resize):
        return np.asarray(transform(picture))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        return np.asarray(transform(picture))
