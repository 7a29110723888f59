"""Data sets by name, and the real subsets of a study: the miniature's and photographs on disk."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from sdaug_utils.data import control, photos
from sdaug_utils.data.images import SPLITS, Dataset, Split, shuffled
from sdaug_utils.errors import InputError
from sdaug_utils.store import verify_checksums

PROJECT = Path(__file__).parents[2]
MINIATURE_DATA = PROJECT / "miniature" / "data"
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
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)
DIGITS_SEED = 2023


def load(
    name: str,
    classes: Sequence[str] | None = None,
    max_images_per_class: dict[str, int] | None = None,
    folder: str | None = None,
    download: bool = False,
) -> Dataset:
    """A data set by name, all of it or some classes and the first images of each.

    Photographs come from a ``folder``, relative ones starting at the project; see :mod:`photos`.

    Raises:
        InputError: unknown data set, class or split; a file is missing or corrupt.
    """
    known = [*(photos.LOADERS if folder else LOADERS)]
    if name not in known:
        raise InputError(f"data set '{name}' is unknown: choose from {', '.join(known)}")
    whole = photos.LOADERS[name](PROJECT / folder, download) if folder else LOADERS[name]()
    return restricted(whole, classes, max_images_per_class)


def restricted(
    whole: Dataset, classes: Sequence[str] | None, max_images_per_class: dict[str, int] | None
) -> Dataset:
    """Some classes of a data set, and the first images of each.

    Raises:
        InputError: unknown class or split.
    """
    chosen = tuple(classes or whole.class_names)
    for class_name in chosen:
        if class_name not in whole.class_names:
            raise InputError(
                f"class '{class_name}' is unknown: choose from {', '.join(whole.class_names)}"
            )
    limits = max_images_per_class or {}
    for split in limits:
        if split not in SPLITS:
            raise InputError(
                f"max_images_per_class: '{split}' is unknown: choose from {', '.join(SPLITS)}"
            )
    numbers = [whole.class_names.index(name) for name in chosen]
    splits = {
        name: _restrict(split, numbers, limits.get(name), f"{whole.name}, {name}")
        for name, split in whole.splits.items()
    }
    return Dataset(whole.name, chosen, splits)


def _restrict(split: Split, classes: Sequence[int], limit: int | None, name: str) -> Split:
    indices = first_per_class(split.labels, limit, classes)
    positions = {label: position for position, label in enumerate(classes)}
    labels = np.array([positions[label] for label in split.labels[indices]])
    return Split(
        lambda i: split.load(indices[i]),
        labels,
        lambda i: split.trimap(indices[i]),
        lambda i: split.image_digest(indices[i]),
        name,
    )


def first_per_class(
    labels: np.ndarray, limit: int | None, classes: Sequence[int] | None = None
) -> np.ndarray:
    """Indices of the first ``limit`` images of each class (all if None), class by class."""
    every = np.unique(labels) if classes is None else classes
    return np.concatenate([np.flatnonzero(labels == label)[:limit] for label in every])


def _fashion_mnist() -> Dataset:
    """The study's images of Fashion-MNIST (Xiao et al., 2017), 32x32, from their PNG sheets."""
    verify_checksums(MINIATURE_DATA)
    splits = {}
    for name in SPLITS:
        sheet = np.asarray(Image.open(MINIATURE_DATA / f"{name}.png"))
        by_class = tiles(sheet)
        labels = np.repeat(np.arange(10), by_class.shape[1])
        splits[name] = _on_black(np.concatenate(list(by_class)), labels)
    return Dataset("fashion-mnist", FASHION_CLASSES, splits)


def tiles(sheet: np.ndarray) -> np.ndarray:
    """A sheet with a row of 28x28 tiles per class: (classes, n, 32, 32, 3), 8-bit RGB."""
    rows = sheet.reshape(sheet.shape[0] // 28, 28, sheet.shape[1] // 28, 28).swapaxes(1, 2)
    return np.stack([np.stack([pad_to_rgb(tile) for tile in row]) for row in rows])


def _on_black(images: np.ndarray, labels: np.ndarray) -> Split:
    """Pictures of one subject each on black: the trimap follows the silhouette."""

    @cache
    def trimap(i: int) -> np.ndarray:
        return control.trimap(control.silhouette(images[i]))

    return Split(images.__getitem__, labels, trimap)


def _digits() -> Dataset:
    """The study's half of the digits: per class 40 for training, 10 for validation, the rest."""
    images, labels = digits_halves()[1]
    starts = {"train": (0, 40), "validation": (40, 50), "test": (50, None)}
    splits = {}
    for name, (start, end) in starts.items():
        rows = np.concatenate([np.flatnonzero(labels == label)[start:end] for label in range(10)])
        splits[name] = _on_black(images[rows], labels[rows])
    return Dataset("digits", DIGIT_CLASSES, splits)


LOADERS: dict[str, Callable[[], Dataset]] = {"fashion-mnist": _fashion_mnist, "digits": _digits}


def subset_size(num_images: int, percent: float) -> int:
    """How many of a class's images p % are, rounded down."""
    return math.floor(num_images * percent / 100 + 1e-9)


def subset(labels: np.ndarray, percent: float, draw: int = 0) -> np.ndarray:
    """Indices of p % of the images of each class, nested: 5 % is inside 10 % and so on.

    Per class: shuffle with seed 41 + draw, take the first floor(p n); draw 0 is the thesis's.

    Returns:
        (k,) indices ordered by class, in shuffled order within the class.

    Raises:
        InputError: a class would get no image.
    """
    chosen = []
    for label, order in zip(np.unique(labels), shuffled(labels, draw), strict=True):
        count = subset_size(len(order), percent)
        if count == 0:
            raise InputError(
                f"{percent:g} % of {len(order)} real images leaves class {label} empty: "
                f"choose at least {100 / len(order):g}"
            )
        chosen.append(order[:count])
    return np.concatenate(chosen)


def personalisation_inputs(
    labels: np.ndarray, num_images: int, draw: int, percent: float = 100
) -> list[np.ndarray]:
    """For each class the first images of its shuffled subset of p %, at most ``num_images``.

    At 5 % of 100 images these are the whole subset, as in the thesis, and the same for every p;
    a class of 99 has only four at 5 %.
    """
    order = subset(labels, percent, draw)
    return [order[labels[order] == label][:num_images] for label in np.unique(labels)]


@cache
def digits_halves() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits inside scikit-learn (Alpaydin and Kaynak, 1998), split in two per class.

    Returns:
        The foundation model's half and the study's half, each as 8-bit RGB images of shape
        (n, 32, 32, 3), white on black, and labels of shape (n,).
    """
    package = find_spec("sklearn")
    assert package is not None
    file = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")  # as load_digits does, whose import takes a second
    labels = table[:, -1].astype(int)
    images = np.stack([_digit_to_rgb(image) for image in table[:, :-1].reshape(-1, 8, 8)])
    rng = np.random.default_rng(DIGITS_SEED)
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    foundation = np.concatenate([order[: len(order) // 2] for order in orders])
    study = np.concatenate([order[len(order) // 2 :] for order in orders])
    return ((images[foundation], labels[foundation]), (images[study], labels[study]))


def _digit_to_rgb(image: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))
    return pad_to_rgb(np.asarray(grey.resize((24, 24), Image.Resampling.BICUBIC)))


def pad_to_rgb(grey: np.ndarray, size: int = 32) -> np.ndarray:
    """Centre an 8-bit grey image (height, width) on black: (size, size, 3)."""
    top, left = (size - grey.shape[0]) // 2, (size - grey.shape[1]) // 2
    padded = np.zeros((size, size), np.uint8)
    padded[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    return np.repeat(padded[..., None], 3, axis=2)
