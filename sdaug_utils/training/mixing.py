"""Mixed images with mixed labels, as views of a training set: the cheapest rivals of generation.

mixup (Zhang et al., ICLR 2018) of features, CutMix (Yun et al., ICCV 2019) of images: each view of
an image is mixed with another image of the same training set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sdaug_utils.data.images import Images, ImageSource, digests
from sdaug_utils.lazy import torch
from sdaug_utils.store import digest

ALPHAS = {"mixup": 0.2, "cutmix": 1.0}  # of Beta(alpha, alpha), as in the papers for ImageNet


@dataclass(frozen=True, eq=False)
class Mixture:
    """What each view of each image is mixed with."""

    rows: np.ndarray  # (n, views) of the training set: the other image
    shares: np.ndarray  # (n, views) of the image itself, in 0 to 1
    boxes: np.ndarray | None = None  # (n, views, 4): left, top, right, bottom in pixels

    def mixed(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n, d) of the images mixed with those of the others: (n, views, d)."""
        own = torch.from_numpy(self.shares).float()[:, :, None]
        return own * values[:, None] + (1 - own) * values[self.rows]


def draw_mixture(name: str, num_images: int, num_views: int, seed: int, side: int = 0) -> Mixture:
    """Draw what is mixed with what; for CutMix the boxes, too, for images of ``side`` pixels."""
    rng, shape, alpha = np.random.default_rng(seed), (num_images, num_views), ALPHAS[name]
    rows, shares = rng.integers(num_images, size=shape), rng.beta(alpha, alpha, size=shape)
    if name == "mixup":
        return Mixture(rows, shares)
    half = side * np.sqrt(1 - shares) / 2  # of a box whose area is the other image's share
    middle = rng.uniform(0, side, size=(2, *shape))
    begin, end = (np.clip(np.rint(middle + x), 0, side).astype(int) for x in (-half, half))
    areas = np.prod(end - begin, axis=0)
    return Mixture(rows, 1 - areas / side**2, np.stack([*begin, *end], axis=-1))


def cut_and_pasted(images: Sequence[np.ndarray], mixture: Mixture, side: int) -> Images:
    """Each view of each image with the other's pixels in the box: n x views images, 8-bit RGB.

    They are squares of ``side`` pixels, made whenever one is looked at.
    """
    assert mixture.boxes is not None
    rows, boxes, keys = mixture.rows, mixture.boxes, digests(images)
    name = f"cutmix {digest({'images': keys, 'side': side, 'boxes': boxes.tolist()})}"

    def resized(row: int) -> np.ndarray:
        return np.array(Image.fromarray(images[row]).resize((side, side)))

    def load(key: tuple[int, int]) -> np.ndarray:
        left, top, right, bottom = boxes[key]
        whole, other = resized(key[0]), resized(rows[key])
        whole[top:bottom, left:right] = other[top:bottom, left:right]
        return whole

    def digest_of(key: tuple[int, int]) -> str:
        both = [keys[key[0]], keys[rows[key]]]
        return digest({"of": both, "side": side, "box": boxes[key].tolist()})

    return Images(tuple(ImageSource(load, digest_of, key, name) for key in np.ndindex(rows.shape)))
