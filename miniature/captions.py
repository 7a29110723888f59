"""Captions for the foundation model's corpus: wordings, class names and measured attributes.

Nobody wrote captions for Fashion-MNIST. Each training step draws one anew: a wording, the class
(or now and then its hypernym), and, half of the time, one or two attributes that were measured on
the very image, so that a prompt such as "a dark patterned dress" has something to obey.
"""

import numpy as np

from sdaug_utils.evidence.metrics import attributes

THESIS_PROMPT = "A cute photo of a {}, high quality, highly detailed, elegant, sharp focus"
WORDINGS = (
    THESIS_PROMPT,
    "A photo of a {}",
    "A picture of a {}",
    "An image of a {}",
    "A product photo of a {} on a black background",
    "A realistic picture of a {}, detailed",
    "A close-up photo of a {}",
    "A masterpiece of a {}, high quality",
    "A {}",
    "{}",
)
THESIS_PROMPT_SHARE = 0.3
HYPERNYM_SHARE = 0.05
ATTRIBUTE_SHARE = 0.5
DROPPED_SHARE = 0.1  # for classifier-free guidance (Ho and Salimans, 2022)

ATTRIBUTES = (("dark", "bright"), ("plain", "patterned"), ("small", "large"))


def measure(image: np.ndarray) -> tuple[float, ...]:
    """Brightness, texture and size of the subject of one 8-bit RGB image on black."""
    return tuple(attributes(image).values())


def attribute_levels(measures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Terciles within each class: 0 for the lower word of ``ATTRIBUTES``, 1 for the upper, -1.

    Args:
        measures: (n, 3) from :func:`measure`.
        labels: (n,) class of each image.
    """
    levels = np.full(measures.shape, -1, np.int8)
    for label in np.unique(labels):
        rows = labels == label
        lower, upper = np.quantile(measures[rows], (1 / 3, 2 / 3), axis=0)
        levels[rows] = np.where(measures[rows] < lower, 0, np.where(measures[rows] > upper, 1, -1))
    return levels


def caption(class_name: str, hypernym: str, levels: np.ndarray, rng: np.random.Generator) -> str:
    """One caption for one image; empty with probability ``DROPPED_SHARE``."""
    if rng.random() < DROPPED_SHARE:
        return ""
    subject = hypernym if rng.random() < HYPERNYM_SHARE else class_name
    if rng.random() < ATTRIBUTE_SHARE:
        known = [pair[level] for pair, level in zip(ATTRIBUTES, levels, strict=True) if level >= 0]
        count = min(len(known), int(rng.integers(1, 3)))
        subject = " ".join([*rng.permutation(known)[:count], subject])
    if rng.random() < THESIS_PROMPT_SHARE:
        return THESIS_PROMPT.format(subject)
    return str(rng.choice(WORDINGS)).format(subject)
