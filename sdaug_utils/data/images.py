"""Images and what holds them: lazy sequences, labelled splits, files of any mode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from sdaug_utils.errors import InputError
from sdaug_utils.store import array_digest, file_digest

SPLITS = ("train", "validation", "test")
SHUFFLE_SEED = 41  # the thesis's own; draw d uses 41 + d


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from."""

    read: Callable[[Any], np.ndarray]  # called with the key
    digest: Callable[[Any], str]  # called with the key
    key: Any
    group: str  # its pool or split, whose features are kept together


@dataclass(frozen=True, eq=False)
class Images(Sequence[np.ndarray]):
    """8-bit RGB arrays, each loaded when it is looked at: a data set need not fit into memory."""

    items: tuple[ImageSource, ...]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Images": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Images":
        if isinstance(index, slice):
            return Images(self.items[index])
        item = self.items[index]
        return item.read(item.key)

    def __add__(self, other: "Images") -> "Images":
        return Images(self.items + other.items)

    def digests(self) -> list[str]:
        """A hash of each image's content."""
        return [item.digest(item.key) for item in self.items]

    def taken(self, rows: Sequence[int]) -> "Images":
        """Some of the images."""
        return Images(tuple(self.items[row] for row in rows))


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
    name: str = "images"  # of data set and split
    _digests: dict[tuple[str, int], str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int] | np.ndarray | None = None) -> Images:
        """The images at ``indices``, all by default."""
        rows = map(int, range(len(self)) if indices is None else indices)
        return Images(tuple(ImageSource(self.load, self.image_digest, i, self.name) for i in rows))

    def image_digest(self, i: int) -> str:
        """A hash of image i's content, computed once."""
        if ("image", i) not in self._digests:
            digest = self.digest(i) if self.digest else array_digest(self.load(i))
            self._digests["image", i] = digest
        return self._digests["image", i]

    def trimap_digest(self, i: int) -> str:
        """A hash of image i's trimap, computed once."""
        if ("trimap", i) not in self._digests:
            self._digests["trimap", i] = array_digest(self.trimap(i))
        return self._digests["trimap", i]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set with the splits ``train``, ``validation`` and ``test``."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]


def shuffled(labels: Sequence[int] | np.ndarray, draw: int = 0) -> list[np.ndarray]:
    """The rows of each class in the order of a shuffle with seed (41 + draw, label).

    Real subsets, inputs of personalisation and splits of photographs take a class's first rows.
    """
    by_class = {int(label): np.flatnonzero(np.equal(labels, label)) for label in np.unique(labels)}
    return [
        np.random.default_rng((SHUFFLE_SEED + draw, label)).permutation(rows)
        for label, rows in by_class.items()
    ]


def read_listed(files: Sequence[Path], digests: Sequence[str]) -> Images:
    """Images in files with known digests; :meth:`Images.digests` then opens no file."""
    known = dict(zip(files, digests, strict=True))

    def read(file: Path) -> np.ndarray:
        if file_digest(file) != known[file]:
            raise InputError(f"{file}: damaged: make it again by run_all.py --verify")
        return read_rgb(file)

    return Images(
        tuple(ImageSource(read, known.__getitem__, file, file.parent.name) for file in files)
    )


def read_rgb(file: Path) -> np.ndarray:
    """An image file as 8-bit RGB of shape (height, width, 3); errors as in :func:`decoded`."""
    return np.asarray(decoded(file).convert("RGB"))


def decoded(file: Path) -> Image.Image:
    """An image file in its own mode; raises InputError if it is missing or does not decode."""
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
