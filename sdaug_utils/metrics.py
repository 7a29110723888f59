"""Means, intervals and paired differences of accuracy over draws, seeds and test images.

All take ``correct``, a boolean array of shape (draws, seeds, test images). Intervals are 95 %
percentile bootstrap intervals of a crossed design (the pigeonhole bootstrap; Owen, 2007): draws of
the real subset and test images are resampled, each on its own; seeds are averaged within a draw.

A bootstrap of a few draws is far too confident: of three it hardly reaches beyond the smallest and
the largest. So each draw's distance from the mean is enlarged beforehand by what Student's t asks
for, t(n - 1) / 1.96 · sqrt(n / (n - 1)): 2.7 for three draws, 1.3 for ten.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

NUM_RESAMPLES = 1000
BOOTSTRAP_SEED = 2023


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval and the number of training runs behind it."""

    mean: float
    low: float
    high: float
    num_runs: int


def estimate(values: np.ndarray) -> Estimate:
    """Mean and interval of values of shape (draws, seeds, test images); at least two draws."""
    per_draw = values.mean(axis=1, dtype=np.float64)
    num_draws, num_images = per_draw.shape

    per_draw = per_draw + (_enlargement(num_draws) - 1) * (
        per_draw.mean(axis=1, keepdims=True) - per_draw.mean()
    )

    def mean_of(draws: np.ndarray, images: np.ndarray, axis: int) -> np.ndarray:
        of_draws = per_draw[draws].mean(axis=-2)
        return np.take_along_axis(of_draws, images, axis=axis).mean(axis=axis)

    interval = stats.bootstrap(
        (np.arange(num_draws), np.arange(num_images)),
        mean_of,
        n_resamples=NUM_RESAMPLES,
        batch=200,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    runs = values.shape[0] * values.shape[1]
    return Estimate(float(per_draw.mean()), float(interval.low), float(interval.high), runs)


def _enlargement(num_draws: int) -> float:
    quantile = stats.t.ppf(0.975, num_draws - 1) / stats.norm.ppf(0.975)
    return float(quantile * np.sqrt(num_draws / (num_draws - 1)))


def paired_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """First minus second: the same draws, the same test images, seeds averaged within a draw.

    Raises:
        ValueError: the two do not have the same draws and test images.
    """
    if (first.shape[0], first.shape[2]) != (second.shape[0], second.shape[2]):
        raise ValueError(f"not paired: shapes {first.shape} and {second.shape}")
    difference = first.mean(axis=1, keepdims=True) - second.mean(axis=1, keepdims=True)
    result = estimate(difference)
    return Estimate(
        result.mean, result.low, result.high, min(first[..., 0].size, second[..., 0].size)
    )
