"""Control images: what a ControlNet is asked to follow.

Images are 8-bit RGB arrays of shape (height, width, 3), trimaps 8-bit labels (height, width).
"""

import cv2
import numpy as np

CODE_VERSION = 1

SUBJECT, BACKGROUND, BORDER = 1, 2, 3  # Oxford-IIIT Pet's trimap labels
TRIMAP_COLOURS = {SUBJECT: (235, 80, 60), BACKGROUND: (30, 30, 90), BORDER: (250, 220, 90)}
ADE20K_WALL, ADE20K_FOOD, ADE20K_ANIMAL = (120, 120, 120), (255, 204, 0), (255, 0, 122)
PALETTES = {
    "miniature": TRIMAP_COLOURS,
    "ade20k-animal": {SUBJECT: ADE20K_ANIMAL, BACKGROUND: ADE20K_WALL, BORDER: ADE20K_ANIMAL},
    "ade20k-food": {SUBJECT: ADE20K_FOOD, BACKGROUND: ADE20K_WALL, BORDER: ADE20K_FOOD},
}
"""Colours of the labels. ``sd-controlnet-seg`` was trained on ADE20K's palette (Zhou et al., 2017;
its colours as in MMSegmentation's ``mmseg/datasets/ade.py``), which knows no border: the border,
mostly fur and accessories, is the subject's, and "wall" is the most neutral of its backgrounds.
"""


def canny(image: np.ndarray, resolution: int | None = None) -> np.ndarray:
    """Canny edges, white on black (thesis, section 4.3.6, with the thresholds of its code).

    With a ``resolution`` the image is made a square of that many pixels first.
    """
    if resolution and image.shape[:2] != (resolution, resolution):
        image = cv2.resize(image, (resolution, resolution), interpolation=cv2.INTER_AREA)
    edges = cv2.Canny(image, 100, 200)
    return np.repeat(edges[..., None], 3, axis=2)


def silhouette(image: np.ndarray) -> np.ndarray:
    """The subject of a picture on black, as a boolean mask of shape (height, width).

    Pixels above a grey level of 12, one-pixel gaps closed and holes filled.
    """
    bright = (image.max(axis=2) > 12).astype(np.uint8)
    closed = cv2.morphologyEx(bright, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros_like(closed), contours, -1, 1, cv2.FILLED).astype(bool)


def trimap(mask: np.ndarray) -> np.ndarray:
    """A silhouette with its morphological gradient as border, in Oxford-IIIT Pet's labels."""
    square = np.ones((3, 3), np.uint8)
    gradient = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, square)
    labels = np.where(mask, SUBJECT, BACKGROUND)
    return np.where(gradient > 0, BORDER, labels).astype(np.uint8)


def segmentation_map(
    labels: np.ndarray, resolution: int | None = None, colours: str = "miniature"
) -> np.ndarray:
    """A trimap of labels 1 to 3 in the colours, named in ``PALETTES``, that a ControlNet knows.

    With a ``resolution`` it is made a square of that many pixels, by nearest neighbour.
    """
    if resolution and labels.shape != (resolution, resolution):
        labels = cv2.resize(labels, (resolution, resolution), interpolation=cv2.INTER_NEAREST)
    palette = np.zeros((4, 3), np.uint8)
    for label, colour in PALETTES[colours].items():
        palette[label] = colour
    return palette[labels]
