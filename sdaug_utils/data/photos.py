"""Photographs on disk: Oxford-IIIT Pet and Food-101 by torchvision, or a folder of one's own.

The folders are read, never written to, but for torchvision's own download.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sdaug_utils.data.images import SPLITS, Dataset, Split, decoded, read_rgb, shuffled
from sdaug_utils.errors import InputError
from sdaug_utils.store import kept_digest

FOOD_TRAIN_PER_CLASS = 600  # of 750; the rest validates (thesis, section 4.2.1)


def oxford_iiit_pet(folder: Path, download: bool) -> Dataset:
    """Oxford-IIIT Pet (Parkhi et al., 2012): the official trainval list, the official test halved.

    The test list is shuffled per class with seed 41; its first half validates (the thesis's code).

    Raises:
        InputError: the folder is not in the official layout, or a class has no image.
    """
    _require(folder / "oxford-iiit-pet", "OxfordIIITPet", download)
    from torchvision.datasets import OxfordIIITPet

    train, test = _opened(OxfordIIITPet, folder, ("trainval", "test"), download)
    halves = _parts(test._labels, lambda n: [n // 2])
    every = range(len(train._labels))
    splits = [_split(every, train._images, train._labels, train._segs)]
    splits += [_split(half, test._images, test._labels, test._segs) for half in halves]
    return Dataset("oxford-iiit-pet", tuple(train.classes), dict(zip(SPLITS, splits, strict=True)))


def food_101(folder: Path, download: bool) -> Dataset:
    """Food-101 (Bossard et al., 2014): per class 600 to train on, 150 to validate, 250 to test.

    The official train list is shuffled per class with seed 41. There are no trimaps.

    Raises:
        InputError: as :func:`oxford_iiit_pet`.
    """
    _require(folder / "food-101", "Food101", download)
    from torchvision.datasets import Food101

    train, test = _opened(Food101, folder, ("train", "test"), download)
    parts = _parts(train._labels, lambda n: [math.ceil(n * FOOD_TRAIN_PER_CLASS / 750)])
    splits = [_split(part, train._image_files, train._labels) for part in parts]
    splits.append(_split(range(len(test._labels)), test._image_files, test._labels))
    names = tuple(name.replace("_", " ") for name in train.classes)
    return Dataset("food-101", names, dict(zip(SPLITS, splits, strict=True)))


def image_folder(folder: Path, download: bool = False) -> Dataset:
    """A folder of class folders: per class half to train on, a quarter to validate and to test.

    The images of each class are shuffled with seed 41. Trimaps (1 subject, 2 background, 3 border),
    if there are any, are in ``trimaps/<class>/<name>.png`` beside the class folders.

    Raises:
        InputError: no class folders, or a class with fewer than four images.
    """
    folders = sorted(p for p in folder.glob("*") if p.is_dir()) if folder.is_dir() else []
    classes = [path.name for path in folders if path.name != "trimaps"]
    if len(classes) < 2:
        raise InputError(f"data.folder: {folder}: needs a folder for each of at least two classes")
    index = {name: number for number, name in enumerate(classes)}
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # takes seconds

    try:
        samples = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise InputError(f"data.folder: {error}") from error
    files, labels = [Path(file) for file, _ in samples], [label for _, label in samples]
    for name, size in zip(classes, np.bincount(labels), strict=True):
        if size < 4:
            raise InputError(f"data.folder: {folder / name}: {size} images; needs at least 4")
    trimaps = None
    if (folder / "trimaps").is_dir():
        trimaps = [folder / "trimaps" / f.parent.name / f"{f.stem}.png" for f in files]
    parts = _parts(labels, lambda n: [n // 2, 3 * n // 4])
    splits = [_split(part, files, labels, trimaps) for part in parts]
    names = tuple(name.replace("_", " ") for name in classes)
    return Dataset("imagefolder", names, dict(zip(SPLITS, splits, strict=True)))


SIZES = {
    "oxford-iiit-pet": (37, {"train": 3680, "validation": 1832, "test": 1837}),
    "food-101": (101, {"train": 60600, "validation": 15150, "test": 25250}),
}
"""Classes and images per split, as published."""


def stand_in(name: str) -> Dataset:
    """A data set of the right sizes without its images: enough to plan with."""

    def no_image(i: int) -> np.ndarray:
        raise InputError(f"data set '{name}' is not here yet: there is only a plan")

    num_classes, sizes = SIZES[name]
    splits = {}
    for split, size in sizes.items():
        splits[split] = Split(
            no_image,
            np.arange(size) * num_classes // size,
            lambda i: np.zeros((1, 1), np.uint8),
            partial("{}/{}/{}".format, name, split),
        )
    return Dataset(name, tuple(f"class {i}" for i in range(num_classes)), splits)


LOADERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "oxford-iiit-pet": oxford_iiit_pet,
    "food-101": food_101,
    "imagefolder": image_folder,
}


def _require(folder: Path, kind: str, download: bool) -> None:
    """Check that a data set is there, or may be downloaded, before torchvision is imported."""
    if not (download or folder.is_dir()):
        raise InputError(
            f"data.folder: {folder.parent}: not the layout of torchvision's {kind} (no folder "
            f"'{folder.name}' in it); set data.download: true where there is internet"
        )


def _opened(kind: Any, folder: Path, splits: Sequence[str], download: bool) -> list[Any]:
    """torchvision's data sets of some official lists, each of which has images of every class."""
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".download.lock"):  # jobs of an array start at the same time
                kind(folder, split=splits[0], download=True)
        opened = [kind(folder, split=split) for split in splits]
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"data.folder: {folder}: not the layout of torchvision's {kind.__name__} "
            f"({' '.join(str(error).split())}); set data.download: true where there is internet"
        ) from error
    listed = [
        file for data in opened for file in getattr(data, "_images", None) or data._image_files
    ]
    folders = {file.parent for file in map(Path, listed)}
    there = {path for parent in folders if parent.is_dir() for path in parent.iterdir()}
    if missing := [file for file in map(Path, listed) if file not in there]:
        raise InputError(
            f"data.folder: {folder}: {len(missing)} of {len(listed)} images are missing, such as "
            f"{missing[0].name}: was their archive extracted to its end? Delete "
            f"{missing[0].parent} and have it downloaded again"
        )
    classes, labels = opened[0].classes, [data._labels for data in opened]
    for of_split in labels:
        if empty := set(range(max(map(max, labels)) + 1)) - set(of_split):
            known = len(classes) > min(empty)
            name = classes[min(empty)] if known else f"number {min(empty) + 1}"
            raise InputError(f"data.folder: {folder}: class {name} has no image in a list")
    return opened


def _parts(labels: Sequence[int], ends: Callable[[int], list[int]]) -> list[list[int]]:
    """Rows of each class in shuffled order, cut at the positions ``ends(images of the class)``."""
    cut = [np.split(rows, ends(len(rows))) for rows in shuffled(labels)]
    return [np.concatenate(part).tolist() for part in zip(*cut, strict=True)]


def _split(
    rows: Sequence[int],
    files: Sequence[Path],
    labels: Sequence[int],
    trimaps: Sequence[Path] | None = None,
) -> Split:
    def trimap(i: int) -> np.ndarray:
        if trimaps is None:
            raise InputError("this data set has no trimaps: segmenters need them")
        return np.asarray(decoded(trimaps[rows[i]]), np.uint8)

    return Split(
        lambda i: read_rgb(files[rows[i]]),
        np.asarray(labels)[list(rows)],
        trimap,
        lambda i: kept_digest(files[rows[i]]),
    )
