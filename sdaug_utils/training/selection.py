"""Which of a pool's images to keep: rules that see features, and the run's own real images.

The thesis leaves it to future work (chapter 6). A rule gets a class's candidates and returns the
rows that it keeps; no real image from outside a run's subset is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

EPSILON = 1e-12


@dataclass(frozen=True, eq=False)
class Candidates:
    """One class's synthetic images, and what may judge them."""

    features: np.ndarray  # (n, d) of the images
    probabilities: np.ndarray  # (n, classes), by a classifier trained on the run's real images
    label: int
    real: np.ndarray  # (m, d) features of the class's real images
    rng: np.random.Generator  # for what is left to chance


def chance(candidates: Candidates, number: int) -> np.ndarray:
    """Any of them: the control."""
    return candidates.rng.permutation(len(candidates.features))[:number]


def confidence(candidates: Candidates, number: int) -> np.ndarray:
    """Those whose class the classifier is surest of (He et al., ICLR 2023)."""
    return _highest(candidates.probabilities[:, candidates.label], number)


def agreement(candidates: Candidates, number: int) -> np.ndarray:
    """Any that the classifier puts into their class; where these are too few, others, too."""
    order = chance(candidates, len(candidates.features))
    agrees = candidates.probabilities.argmax(axis=1)[order] == candidates.label
    return np.concatenate([order[agrees], order[~agrees]])[:number]


def nearness(candidates: Candidates, number: int) -> np.ndarray:
    """Those with the highest mean cosine with the class's real images."""
    middle = candidates.features.mean(axis=0)
    made, real = _directions(candidates.features - middle), _directions(candidates.real - middle)
    return _highest((made @ real.T).mean(axis=1), number)


def diversity(candidates: Candidates, number: int) -> np.ndarray:
    """Far from each other: greedy k-centre (Gonzalez, 1985), from the one nearest to the middle."""
    features = candidates.features
    kept = [int(_distances(features, features.mean(axis=0)).argmin())]
    nearest = _distances(features, features[kept[0]])
    while len(kept) < number:
        nearest[kept[-1]] = -1  # never twice, even among equal images
        kept.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _distances(features, features[kept[-1]]))
    return np.array(kept)


def distribution(candidates: Candidates, number: int) -> np.ndarray:
    """Greedily, each time the image that brings the kept features nearest to the real ones.

    Nearest by the Fréchet distance of normal distributions, as in FID, but with the study's own
    backbone, and variances alone: a few real images have no covariance.
    """
    features, real = candidates.features, candidates.real
    mean, deviation = real.mean(axis=0), real.std(axis=0)
    total, squares = np.zeros_like(mean), np.zeros_like(mean)
    kept: list[int] = []
    left = np.ones(len(features), bool)
    for size in range(1, number + 1):
        means = (total + features) / size
        variances = np.maximum((squares + features**2) / size - means**2, 0)
        distance = ((means - mean) ** 2 + (np.sqrt(variances) - deviation) ** 2).sum(axis=1)
        kept.append(int(np.where(left, distance, np.inf).argmin()))
        left[kept[-1]] = False
        total, squares = total + features[kept[-1]], squares + features[kept[-1]] ** 2
    return np.array(kept)


_ALL = (chance, confidence, agreement, nearness, diversity, distribution)
RULES: dict[str, Callable[[Candidates, int], np.ndarray]] = {rule.__name__: rule for rule in _ALL}


def _highest(values: np.ndarray, number: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:number]


def _distances(features: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((features - point) ** 2).sum(axis=1)


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + EPSILON)
