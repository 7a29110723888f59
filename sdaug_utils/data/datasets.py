"""Data sets by name, and the real subsets of a study: the miniature's and photographs on disk."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
GARMENTS = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
FASHION_CLASSES = tuple(GARMENTS.split(", "))
WORDS = "zero one two three four five six seven eight nine"
DIGIT_CLASSES = tuple(f"digit {word}" for word in WORDS.split())
DIGITS_SEED = 2023


def load(
    name: str,
    classes: Sequence[str] | None = None,
    max_images_per_class: Mapping[str, int] | None = None,
    folder: str | None = None,
    download: bool = False,
) -> Dataset:
    """A data set by name, all of it or some classes and the first images of each.

    Photographs come from a ``folder``, relative ones starting at the project; see :mod:`photos`.
    Raises InputError if a data set, class or split is unknown, or a file is missing or corrupt.
    """
    _require_known("data set", [name], list(photos.LOADERS if folder else LOADERS))
    whole = photos.LOADERS[name](PROJECT / folder, download) if folder else LOADERS[name]()
    return restricted(whole, classes, max_images_per_class)


def _require_known(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{what} '{name}' is unknown: choose from {', '.join(known)}")


def restricted(
    whole: Dataset, classes: Sequence[str] | None, max_images_per_class: Mapping[str, int] | None
) -> Dataset:
    """Some classes and the first images of each; InputError if a class or split is unknown."""
    chosen, limits = tuple(classes or whole.class_names), max_images_per_class or {}
    _require_known("class", chosen, whole.class_names)
    _require_known("max_images_per_class:", limits, SPLITS)
    numbers = [whole.class_names.index(name) for name in chosen]
    splits = {
        name: _restrict(split, numbers, limits.get(name), f"{whole.name}, {name}")
        for name, split in whole.splits.items()
    }
    return Dataset(whole.name, chosen, splits)


def _restrict(split: Split, classes: Sequence[int], limit: int | None, name: str) -> Split:
    rows = first_per_class(split.labels, limit, classes)
    positions = {label: position for position, label in enumerate(classes)}
    labels = np.array([positions[label] for label in split.labels[rows]])
    return Split(
        lambda i: split.load(rows[i]),
        labels,
        lambda i: split.trimap(rows[i]),
        lambda i: split.image_digest(rows[i]),
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
        by_class = tiles(np.asarray(Image.open(MINIATURE_DATA / f"{name}.png")))
        labels = np.repeat(np.arange(10), by_class.shape[1])
        splits[name] = _on_black(np.concatenate(by_class), labels)
    return Dataset("fashion-mnist", FASHION_CLASSES, splits)


def tiles(sheet: np.ndarray) -> np.ndarray:
    """A sheet with a row of 28x28 tiles per class: (classes, n, 32, 32, 3), 8-bit RGB."""
    rows = sheet.reshape(sheet.shape[0] // 28, 28, sheet.shape[1] // 28, 28).swapaxes(1, 2)
    return np.stack([[pad_to_rgb(tile) for tile in row] for row in rows])


def _on_black(images: np.ndarray, labels: np.ndarray) -> Split:
    """Pictures of one subject each on black: the trimap follows the silhouette."""

    @cache
    def trimap(i: int) -> np.ndarray:
        return control.trimap(control.silhouette(images[i]))

    return Split(images.__getitem__, labels, trimap)


def _digits() -> Dataset:
    """The study's half of the digits: per class 40 to train, 10 for validation, others to test."""
    images, labels = digits_halves()[1]
    # Of each class three parts; then each part of all classes.
    cut = [np.split(np.flatnonzero(labels == label), [40, 50]) for label in range(10)]
    parts = zip(SPLITS, map(np.concatenate, zip(*cut, strict=True)), strict=True)
    splits = {name: _on_black(images[rows], labels[rows]) for name, rows in parts}
    return Dataset("digits", DIGIT_CLASSES, splits)


LOADERS: dict[str, Callable[[], Dataset]] = {"fashion-mnist": _fashion_mnist, "digits": _digits}


def subset_size(num_images: int, percent: float) -> int:
    """How many of a class's images p % are, rounded down."""
    return math.floor(num_images * percent / 100 + 1e-9)  # against rounding of the product


def subset(labels: np.ndarray, percent: float, draw: int = 0) -> np.ndarray:
    """Indices of p % of the images of each class, nested: 5 % is inside 10 % and so on.

    Per class: shuffle with seed (41 + draw, label), take the first floor(p n / 100).
    Ordered by class, in shuffled order within it. Raises InputError if a class gets no image.
    """
    chosen = []
    for label, order in zip(np.unique(labels), shuffled(labels, draw), strict=True):
        count = subset_size(len(order), percent)
        if count == 0:
            raise InputError(
                f"{percent:g} % of {len(order)} real images leaves class {label} empty: "
                f"choose at least {math.ceil(1e4 / len(order)) / 100:g}"  # one image, to two digits
            )
        chosen.append(order[:count])
    return np.concatenate(chosen)


def personalisation_inputs(
    labels: np.ndarray, num_images: int, draw: int, percent: float = 100
) -> list[np.ndarray]:
    """For each class the first images of its shuffled subset of p %, at most ``num_images``.

    With 5 inputs and 100 images of a class, 5 % is just enough: as in the thesis, every p from 5 %
    on gives the same inputs. With 99 images there are only four at 5 %.
    """
    order = subset(labels, percent, draw)
    return [order[labels[order] == label][:num_images] for label in np.unique(labels)]


@cache
def digits_halves() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The digits inside scikit-learn (Alpaydin and Kaynak, 1998), split in two per class.

    The foundation model's half and the study's half, each as 8-bit RGB images of shape
    (n, 32, 32, 3), white on black, and labels of shape (n,).
    """
    package = find_spec("sklearn")
    assert package is not None
    file = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")  # as load_digits does, whose import takes a second
    labels, images = table[:, -1].astype(int), []
    for image in np.round(table[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8):
        grey = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)
        images.append(pad_to_rgb(np.asarray(grey)))
    rng = np.random.default_rng(DIGITS_SEED)
    orders = [rng.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    foundation = np.concatenate([order[: len(order) // 2] for order in orders])
    study = np.concatenate([order[len(order) // 2 :] for order in orders])
    every = np.stack(images)
    return (every[foundation], labels[foundation]), (every[study], labels[study])


def pad_to_rgb(grey: np.ndarray) -> np.ndarray:
    """Centre an 8-bit grey square of an even number of pixels on black: (32, 32, 3)."""
    padded = np.pad(grey, (32 - len(grey)) // 2)
    return np.repeat(padded[..., None], 3, axis=2)
