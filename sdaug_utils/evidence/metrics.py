"""Scores of images, and means, intervals and paired differences of scores.

Scores have the shape (draws, seeds, test images). Intervals are 95 % percentile bootstrap
intervals of a crossed design (the pigeonhole bootstrap; Owen, 2007): draws of the real subset and
test images are resampled, each on its own; seeds are averaged within a draw.

A bootstrap of a few draws is far too confident: of three it hardly reaches beyond the smallest and
the largest. So each draw's distance from the mean is enlarged beforehand by what Student's t asks
for, t(n - 1) / 1.96 · sqrt(n / (n - 1)): 2.7 for three draws, 1.3 for ten. Where there is a single
score per draw (or per subject), the interval is Student's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import scipy

from sdaug_utils.data.control import silhouette
from sdaug_utils.params import Attribute

NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 2023


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval (95 %, unless said), and how much is behind it."""

    mean: float
    low: float
    high: float
    num_runs: int
    num_draws: int
    num_images: int


def estimate(values: np.ndarray, level: float = 0.95) -> Estimate:
    """Mean and interval of values of shape (draws, seeds, test images); at least two draws."""
    per_draw = values.mean(axis=1, dtype=np.float64)
    num_draws, num_images = per_draw.shape
    counts = (values.shape[0] * values.shape[1], num_draws, num_images)
    if num_images == 1:
        mean, spread = per_draw.mean(), per_draw.std(ddof=1) / np.sqrt(num_draws)
        half = scipy.stats.t.ppf(0.5 + level / 2, num_draws - 1) * spread
        return Estimate(float(mean), float(mean - half), float(mean + half), *counts)

    per_draw = per_draw + (_enlargement(num_draws, level) - 1) * (
        per_draw.mean(axis=1, keepdims=True) - per_draw.mean()
    )

    def mean_of(draws: np.ndarray, images: np.ndarray, axis: int) -> np.ndarray:
        of_draws = per_draw[draws].mean(axis=-2)
        return np.take_along_axis(of_draws, images, axis=axis).mean(axis=axis)

    interval = scipy.stats.bootstrap(
        (np.arange(num_draws), np.arange(num_images)),
        mean_of,
        n_resamples=NUM_RESAMPLES,
        batch=200,
        vectorized=True,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return Estimate(float(per_draw.mean()), float(interval.low), float(interval.high), *counts)


def _enlargement(num_draws: int, level: float = 0.95) -> float:
    tail = 0.5 + level / 2
    quantile = scipy.stats.t.ppf(tail, num_draws - 1) / scipy.stats.norm.ppf(tail)
    return float(quantile * np.sqrt(num_draws / (num_draws - 1)))


def paired_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """First minus second: the same draws, the same test images, seeds averaged within a draw.

    Raises:
        ValueError: the two do not have the same draws and test images.
    """
    return contrast([(1.0, first), (-1.0, second)])


def contrast(terms: Sequence[tuple[float, np.ndarray]], level: float = 0.95) -> Estimate:
    """A weighted sum of scores, paired throughout: the same draws, the same test images.

    Raises:
        ValueError: the terms do not have the same draws and test images.
    """
    shapes = {(values.shape[0], values.shape[2]) for _, values in terms}
    if len(shapes) > 1:
        raise ValueError(f"not paired: {[values.shape for _, values in terms]}")
    total = sum(weight * values.mean(axis=1, keepdims=True) for weight, values in terms)
    result = estimate(np.asarray(total), level)
    runs = min(values[..., 0].size for _, values in terms)
    return replace(result, num_runs=runs)


def slope_weights(x: Sequence[float]) -> np.ndarray:
    """Weights that turn scores at positions x into their least-squares slope."""
    centred = np.asarray(x) - np.mean(x)
    return centred / (centred**2).sum()


def attributes(image: np.ndarray) -> dict[str, float]:
    """Brightness, texture and size of the subject of one 8-bit RGB image on black.

    Mean level inside the silhouette; mean absolute Laplacian inside the eroded silhouette, where
    the outline does not reach; area of the silhouette as a share of the picture.
    """
    mask = silhouette(image)
    if not mask.any():
        return dict.fromkeys(("brightness", "texture", "size"), 0.0)
    grey = image.mean(axis=2)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    texture = np.abs(cv2.Laplacian(grey, cv2.CV_64F))[inside if inside.any() else mask].mean()
    return {
        "brightness": float(grey[mask].mean()),
        "texture": float(texture),
        "size": float(mask.mean()),
    }


ATTRIBUTES: dict[Attribute, tuple[str, int]] = {
    "dark": ("brightness", -1),
    "bright": ("brightness", 1),
    "plain": ("texture", -1),
    "patterned": ("texture", 1),
    "small": ("size", -1),
    "large": ("size", 1),
}
"""Which measure of :func:`attributes` a word is about, and towards which end."""


def typical_attributes(images: Sequence[np.ndarray]) -> dict[str, float]:
    """The median of each of :func:`attributes` over some images."""
    measured = [attributes(image) for image in images]
    return {key: float(np.median([each[key] for each in measured])) for key in measured[0]}


def obeys(image: np.ndarray, attribute: Attribute, typical: Mapping[str, float]) -> bool:
    """Whether an image lies on the asked-for side of what is typical."""
    measure, sign = ATTRIBUTES[attribute]
    return sign * (attributes(image)[measure] - typical[measure]) > 0


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines between two sets of features, (n, d) and (m, d): (n, m), in -1 to 1."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    return a @ b.T


def diversity(features: np.ndarray) -> float:
    """One minus the mean cosine between different ones of n features (n, d): 0 is all alike."""
    cosines = similarity(features, features)
    n = len(features)
    return float(1 - (cosines.sum() - np.trace(cosines)) / (n * (n - 1)))
