"""Real images: splits, nested subsets, trimaps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from sdaug_utils import control
from sdaug_utils.errors import InputError
from sdaug_utils.store import array_digest, file_digest, verify_checksums

PROJECT = Path(__file__).parents[1]
MINIATURE_DATA = PROJECT / "miniature" / "data"
SPLITS = ("train", "validation", "test")
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
FIRST_SUBSET_SEED = 41  # the thesis's own shuffle; draw d uses 41 + d


@dataclass(frozen=True, eq=False)
class Images(Sequence[np.ndarray]):
    """8-bit RGB arrays, each loaded when it is looked at: a data set need not fit into memory.

    An item has a function that loads it, one that gives its digest, and what both are called with.
    """

    items: tuple[tuple[Callable[[Any], np.ndarray], Callable[[Any], str], Any], ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Images":
        if isinstance(index, slice):
            return Images(self.items[index])
        load, _, key = self.items[index]
        return load(key)

    def __add__(self, other: "Images") -> "Images":
        return Images(self.items + other.items)

    def digests(self) -> list[str]:
        """A hash of each image's content."""
        return [digest(key) for _, digest, key in self.items]


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, loaded when asked for.

    ``load(i)`` returns image i as 8-bit RGB of shape (height, width, 3); ``labels`` has shape (n,).
    ``trimap(i)`` returns its trimap, 8-bit labels of shape (height, width): 1 subject,
    2 background, 3 border, as in Oxford-IIIT Pet. ``digest(i)`` is a hash of image i's content, by
    default of its pixels.
    """

    load: Callable[[int], np.ndarray]
    labels: np.ndarray
    trimap: Callable[[int], np.ndarray]
    digest: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray | None = None) -> Images:
        """The images at ``indices``, all by default."""
        digest = self.digest or (lambda i: array_digest(self.load(i)))
        rows = range(len(self)) if indices is None else indices
        return Images(tuple((self.load, digest, int(i)) for i in rows))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with the splits ``train``, ``validation`` and ``test``."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]


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
    if folder is not None:
        from sdaug_utils import photos

        whole = photos.LOADERS[name](PROJECT / folder, download)
        return restricted(whole, classes, max_images_per_class)
    if name not in LOADERS:
        raise InputError(f"data set '{name}' is unknown: choose from {', '.join(LOADERS)}")
    return restricted(LOADERS[name](), classes, max_images_per_class)


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
    splits = {
        split: _restrict(whole.splits[split], [whole.class_names.index(c) for c in chosen], limit)
        for split, limit in ((split, limits.get(split)) for split in SPLITS)
    }
    return Dataset(whole.name, chosen, splits)


def _restrict(split: Split, classes: Sequence[int], limit: int | None) -> Split:
    indices = first_per_class(split.labels, limit, classes)
    positions = {label: position for position, label in enumerate(classes)}
    labels = np.array([positions[label] for label in split.labels[indices]])
    digest = split.digest
    return Split(
        lambda i: split.load(indices[i]),
        labels,
        lambda i: split.trimap(indices[i]),
        digest and (lambda i: digest(indices[i])),
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
        per_class = sheet.shape[1] // 28
        tiles = sheet.reshape(10, 28, per_class, 28).swapaxes(1, 2).reshape(-1, 28, 28)
        images = np.stack([pad_to_rgb(tile) for tile in tiles])
        splits[name] = _on_black(images, np.repeat(np.arange(10), per_class))
    return Dataset("fashion-mnist", FASHION_CLASSES, splits)


def _on_black(images: np.ndarray, labels: np.ndarray) -> Split:
    """Pictures of one subject each on black: the trimap follows the silhouette."""

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
    for label in np.unique(labels):
        order = np.random.default_rng((FIRST_SUBSET_SEED + draw, label)).permutation(
            np.flatnonzero(labels == label)
        )
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
    return pad_to_rgb(np.asarray(grey.resize((24, 24), Image.Resampling.BICUBIC)))


def pad_to_rgb(grey: np.ndarray, size: int = 32) -> np.ndarray:
    """Centre an 8-bit grey image (height, width) on black: (size, size, 3)."""
    top, left = (size - grey.shape[0]) // 2, (size - grey.shape[1]) // 2
    padded = np.zeros((size, size), np.uint8)
    padded[top : top + grey.shape[0], left : left + grey.shape[1]] = grey
    return np.repeat(padded[..., None], 3, axis=2)


def read_images(files: Sequence[Path]) -> Images:
    """Images in files of any mode, as 8-bit RGB; their digests are those of the files."""
    return Images(tuple((read_rgb, file_digest, file) for file in files))


def read_rgb(file: Path) -> np.ndarray:
    """An image file as an 8-bit RGB array of shape (height, width, 3).

    Raises:
        InputError: it is missing or does not decode.
    """
    return np.asarray(decoded(file).convert("RGB"))


def decoded(file: Path) -> Image.Image:
    """An image file in its own mode.

    Raises:
        InputError: it is missing or does not decode.
    """
    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file}: missing or does not decode ({error})") from error
    return image


def digests(images: Sequence[np.ndarray]) -> list[str]:
    """A hash of each image's content: of its file, if it comes from one, else of its pixels."""
    if isinstance(images, Images):
        return images.digests()
    return [array_digest(image) for image in images]
