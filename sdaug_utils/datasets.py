"""Real images: splits, nested subsets, trimaps."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sdaug_utils.errors import InputError

MINIATURE_DATA = Path(__file__).parents[1] / "miniature" / "data"
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGIT_CLASSES = tuple(
    f"digit {word}"
    for word in "zero one two three four five six seven eight nine".split()
)
DIGITS_SEED = 2023


def digits_halves() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits inside scikit-learn (UCI, Alpaydin and Kaynak 1998), split in two per class.

    Returns:
        The foundation model's half and the study's half, each as 8-bit RGB images of shape
        (n, 32, 32, 3), white on black, and labels of shape (n,).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.stack([_digit_to_rgb(image) for image in digits.images])
    rng = np.random.default_rng(DIGITS_SEED)
    orders = [rng.permutation(np.flatnonzero(digits.target == label)) for label in range(10)]
    foundation = np.concatenate([order[: len(order) // 2] for order in orders])
    study = np.concatenate([order[len(order) // 2 :] for order in orders])
    return (
        (images[foundation], digits.target[foundation]),
        (images[study], digits.target[study]),
    )


def _digit_to_rgb(image: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))
    enlarged = np.asarray(grey.resize((24, 24), Image.Resampling.BICUBIC))
    return pad_to_rgb(enlarged)


def pad_to_rgb(grey: np.ndarray, size: int = 32) -> np.ndarray:
    """Centre an 8-bit grey image (height, width) on black: (size, size, 3)."""
    top, left = (size - grey.shape[0]) // 2, (size - grey.shape[1]) // 2
    padded = np.zeros((size, size), np.uint8)
    padded[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    return np.repeat(padded[..., None], 3, axis=2)
