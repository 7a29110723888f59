"""Scores of images, and means, intervals and paired differences of scores.

Scores have the shape (draws, seeds, test images). Draws of the real subset and test images are both
random samples, and crossed: every draw meets every test image (as readers meet cases in radiology,
whose methods these are: Dorfman, Berbaum & Metz, 1992). Seeds are averaged within a draw. The
variance of a mean is that of a two-way analysis with random effects. Its interval is Student's,
with the degrees of freedom of Hillis (2007): those of the draws where draws dominate, more where
they hardly differ. With a single score per draw (or per subject) it is Student's ordinary interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pandas as pd
import scipy

from sdaug_utils.data.control import silhouette
from sdaug_utils.params import Attribute

POWER = 0.8


@dataclass(frozen=True)
class Spread:
    """Variances of a mean score, by their source.

    ``of_draws``: of the draws' means over all test images (it includes the residual / n).
    ``of_images``: the variance component of the n test images, / n.
    """

    of_draws: float
    of_images: float

    def error(self, num_draws: int) -> tuple[float, float]:
        """Standard error of a mean of so many draws, and its degrees of freedom (Hillis, 2007)."""
        whole = self.of_draws + num_draws * self.of_images
        freedom = (num_draws - 1) * (whole / self.of_draws) ** 2 if self.of_draws else np.inf
        return float(np.sqrt(whole / num_draws)), float(freedom)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval, and the numbers of runs, draws and images behind it."""

    mean: float
    low: float
    high: float
    num_runs: int
    num_draws: int
    num_images: int
    spread: Spread

    def p_value(self, bound: float, side: int = 0) -> float:
        """p-value of the t test of mean = ``bound``; ``side`` 1: against larger, −1: smaller."""
        error, freedom = self.spread.error(self.num_draws)
        distance = self.mean - bound
        limit = np.copysign(np.inf, distance) if distance else 0.0
        t = distance / error if error else limit
        if side:
            return float(scipy.stats.t.sf(side * t, freedom))
        return float(2 * scipy.stats.t.sf(abs(t), freedom))

    def detectable(self, level: float = 0.95) -> float:
        """The difference that so many draws would have found with 80 % power."""
        error, freedom = self.spread.error(self.num_draws)
        quantiles = scipy.stats.t.ppf([0.5 + level / 2, POWER], freedom)
        return float(error * quantiles.sum())


def estimate(values: np.ndarray) -> Estimate:
    """Mean and 95 % interval of values of shape (draws, seeds, test images); at least two draws."""
    per_draw: np.ndarray = values.mean(axis=1, dtype=np.float64)
    num_draws, num_images = per_draw.shape
    spread, mean = components(per_draw), float(per_draw.mean())
    error, freedom = spread.error(num_draws)
    half = error * scipy.stats.t.ppf(0.975, freedom)
    counts = (values.shape[0] * values.shape[1], num_draws, num_images)
    return Estimate(mean, float(mean - half), float(mean + half), *counts, spread)


def components(scores: np.ndarray) -> Spread:
    """Variance components of scores (draws, test images), by expected mean squares."""
    num_draws, num_images = scores.shape
    draws, images = scores.mean(axis=1), scores.mean(axis=0)
    if num_images == 1:
        return Spread(float(draws.var(ddof=1)), 0.0)
    rest = scores - draws[:, None] - images + scores.mean()
    of_rest = (rest**2).sum() / ((num_draws - 1) * (num_images - 1))
    of_images = max(images.var(ddof=1) - of_rest / num_draws, 0.0)
    return Spread(float(draws.var(ddof=1)), float(of_images / num_images))


def resplit_gains(runs: pd.DataFrame) -> pd.DataFrame:
    """What each arm gains over the baseline, in points, over splits of one data set.

    ``runs`` have a row per ``split`` and ``arm``, with ``updates`` and ``accuracy``. Half of the
    images train, the other half test, so splits overlap: the variance of the mean of n gains is not
    their variance / n, but (1 / n + 1) times it (Nadeau & Bengio, 2003, with as many test images as
    training images). Its 95 % interval is Student's, with n - 1 degrees of freedom.
    """
    accuracies = runs.pivot_table("accuracy", "split", "arm")
    updates, rows = runs.groupby("arm")["updates"].mean(), []
    for arm in accuracies.columns.drop("baseline"):
        gains = 100 * (accuracies[arm] - accuracies["baseline"])
        half = np.sqrt(gains.var() * (1 / len(gains) + 1))
        half *= scipy.stats.t.ppf(0.975, len(gains) - 1)
        row = {"arm": arm, "splits": len(gains), "points": gains.mean()}
        row |= {"points_low": gains.mean() - half, "points_high": gains.mean() + half}
        for name, of_arm in (("baseline_", "baseline"), ("", arm)):
            row[f"{name}updates"] = updates[of_arm]
            row[f"{name}accuracy"] = accuracies[of_arm].mean()
        rows.append(row)
    return pd.DataFrame(rows)


def run_deviations(values: np.ndarray) -> dict[str, float]:
    """Standard deviations of a mean score of (draws, seeds, test images), by their source.

    ``draw``: the draw alone. ``seed``: another run on the same draw; not a number if there is one
    run per draw, whose chance then counts as the draw's. ``test images``: another set of as many.
    They come from expected mean squares, of which negative ones count as 0.
    """
    runs = values.mean(axis=2, dtype=np.float64)
    num_seeds = runs.shape[1]
    of_seed = runs.var(axis=1, ddof=1).mean() if num_seeds > 1 else np.nan
    spread = components(values.mean(axis=1, dtype=np.float64))
    of_draw = max(spread.of_draws - np.nan_to_num(of_seed) / num_seeds, 0.0)
    variances = {"draw": of_draw, "seed": of_seed, "test images": spread.of_images}
    return {name: float(np.sqrt(variance)) for name, variance in variances.items()}


def paired_difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """First minus second, paired as in :func:`contrast`."""
    return contrast([(1.0, first), (-1.0, second)])


def contrast(terms: Sequence[tuple[float, np.ndarray]]) -> Estimate:
    """A weighted sum of scores, paired by draw and test image; seeds are averaged within a draw.

    Raises ValueError if the terms do not have the same draws and test images.
    """
    if len({(values.shape[0], values.shape[2]) for _, values in terms}) > 1:
        raise ValueError(f"not paired: {[values.shape for _, values in terms]}")
    total = sum(weight * values.mean(axis=1, keepdims=True) for weight, values in terms)
    runs = min(values[..., 0].size for _, values in terms)
    return replace(estimate(np.asarray(total)), num_runs=runs)


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
    brightness, size = float(grey[mask].mean()), float(mask.mean())
    return {"brightness": brightness, "texture": float(texture), "size": size}


ATTRIBUTES: dict[Attribute, tuple[str, int]] = {
    "dark": ("brightness", -1),
    "bright": ("brightness", 1),
    "plain": ("texture", -1),
    "patterned": ("texture", 1),
    "small": ("size", -1),
    "large": ("size", 1),
}
"""Which measure of :func:`attributes` a word is about, and whether it means less or more of it."""


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


def calibration_error(confidences: np.ndarray, is_right: np.ndarray) -> float:
    """Expected calibration error (Guo et al., ICML 2017) of n probabilities in 0 to 1.

    They are put into 15 bins of equal width; the error is the mean of the bins'
    |accuracy - mean probability|, weighted by their number of predictions.
    """
    bins = np.minimum((confidences * 15).astype(int), 14)
    error = 0.0
    for number in np.unique(bins):
        own = bins == number
        error += own.mean() * abs(is_right[own].mean() - confidences[own].mean())
    return float(error)


def prdc(real: np.ndarray, made: np.ndarray, nearest: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020).

    Features are (n, d) of real and (m, d) of synthetic images; ``nearest`` is the k of the
    neighbourhoods. Precision: the share of synthetic images inside any real one's neighbourhood;
    recall: of real ones inside any synthetic one's; density: in how many real neighbourhoods a
    synthetic image is, over k; coverage: the share of real ones with a synthetic neighbour.
    """
    k = min(nearest, len(real) - 1, len(made) - 1)
    distances = scipy.spatial.distance.cdist
    between = distances(real, made)
    radii = np.sort(distances(real, real), axis=1)[:, k]  # place 0 is the image itself
    radii_made = np.sort(distances(made, made), axis=1)[:, k]
    inside = between < radii[:, None]
    return {
        "precision": float(inside.any(axis=0).mean()),
        "recall": float((between < radii_made).any(axis=1).mean()),
        "density": float(inside.sum(axis=0).mean() / k),
        "coverage": float((between.min(axis=1) < radii).mean()),
    }


def copies(made: np.ndarray, known: np.ndarray) -> float:
    """The share of images nearer to a known one than that is to any other known one.

    One minus authenticity (Alaa et al., ICML 2022). Features are (n, d) of synthetic images and
    (m, d) of those that the model has learnt from.
    """
    between = scipy.spatial.distance.cdist(made, known)
    among = scipy.spatial.distance.cdist(known, known)
    np.fill_diagonal(among, np.inf)
    closest = between.argmin(axis=1)
    return float((between.min(axis=1) < among.min(axis=1)[closest]).mean())
