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
    Raises InputError if the folder is not in the official layout, or a class has no image.
    """
    train, test = _opened(
        "OxfordIIITPet", folder, "oxford-iiit-pet", ("trainval", "test"), download
    )
    splits = [_split(range(len(train._labels)), train._images, train._labels, train._segs)]
    for half in _parts(test._labels, lambda n: [n // 2]):
        splits.append(_split(half, test._images, test._labels, test._segs))
    return _dataset("oxford-iiit-pet", train.classes, splits)


def food_101(folder: Path, download: bool) -> Dataset:
    """Food-101 (Bossard et al., 2014): per class 600 to train on, 150 to validate, 250 to test.

    The official train list is shuffled per class with seed 41. There are no trimaps.
    Raises InputError as :func:`oxford_iiit_pet` does.
    """
    train, test = _opened("Food101", folder, "food-101", ("train", "test"), download)
    parts = _parts(train._labels, lambda n: [math.ceil(n * FOOD_TRAIN_PER_CLASS / 750)])
    splits = [_split(part, train._image_files, train._labels) for part in parts]
    splits.append(_split(range(len(test._labels)), test._image_files, test._labels))
    return _dataset("food-101", train.classes, splits)


def image_folder(folder: Path, download: bool = False) -> Dataset:
    """A folder of class folders: per class half to train on, a quarter to validate and to test.

    The images of each class are shuffled with seed 41. Trimaps (1 subject, 2 background, 3 border),
    if there are any, are in ``trimaps/<class>/<name>.png`` beside the class folders.
    Raises InputError if there are no class folders, or a class has fewer than four images.
    """
    found = sorted(path.name for path in folder.glob("*") if path.is_dir())
    classes = [name for name in found if name != "trimaps"]
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
    trimap_folder = folder / "trimaps"
    trimaps = [trimap_folder / file.parent.name / f"{file.stem}.png" for file in files]
    parts = _parts(labels, lambda n: [n // 2, 3 * n // 4])
    given = trimaps if trimap_folder.is_dir() else None
    splits = [_split(part, files, labels, given) for part in parts]
    return _dataset("imagefolder", classes, splits)


def _dataset(name: str, classes: Sequence[str], splits: Sequence[Split]) -> Dataset:
    names = tuple(class_name.replace("_", " ") for class_name in classes)
    return Dataset(name, names, dict(zip(SPLITS, splits, strict=True)))


SIZES = {
    "oxford-iiit-pet": (37, {"train": 3680, "validation": 1832, "test": 1837}),
    "food-101": (101, {"train": 60600, "validation": 15150, "test": 25250}),
}
"""Classes and images per split, as published."""


def stand_in(name: str) -> Dataset:
    """A data set of the right sizes without its images: enough to plan with."""

    def no_image(i: int) -> np.ndarray:
        raise InputError(f"data set '{name}' is not here yet: there is only a plan")

    splits = {}
    num_classes, sizes = SIZES[name]
    for split, size in sizes.items():
        labels = np.arange(size) * num_classes // size
        digest = f"{name}/{split}/{{}}".format  # of an image, by its row
        splits[split] = Split(no_image, labels, lambda i: np.zeros((1, 1), np.uint8), digest)
    return Dataset(name, tuple(f"class {i}" for i in range(num_classes)), splits)


LOADERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "oxford-iiit-pet": oxford_iiit_pet,
    "food-101": food_101,
    "imagefolder": image_folder,
}


def _opened(
    kind: str, folder: Path, needed: str, splits: Sequence[str], download: bool
) -> list[Any]:
    """torchvision's data sets of some official lists.

    Raises InputError if a file is missing or a list has no image of a class.
    """
    wrong = f"data.folder: {folder}: not the layout of torchvision's {kind}"
    remedy = "set data.download: true where there is internet"
    if not (download or (folder / needed).is_dir()):  # found out before torchvision is imported
        raise InputError(f"{wrong} (no folder '{needed}' in it); {remedy}")
    from torchvision import datasets

    open_split = partial(getattr(datasets, kind), folder)
    try:
        if download:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".download.lock"):  # jobs of an array start at the same time
                open_split(split=splits[0], download=True)
        opened = [open_split(split=split) for split in splits]
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{wrong} ({' '.join(str(error).split())}); {remedy}") from error
    of_splits = [getattr(data, "_images", None) or data._image_files for data in opened]
    listed = [Path(file) for files in of_splits for file in files]
    folders = {file.parent for file in listed}
    there = {path for parent in folders if parent.is_dir() for path in parent.iterdir()}
    if missing := [file for file in listed if file not in there]:
        raise InputError(
            f"data.folder: {folder}: {len(missing)} of {len(listed)} images are missing, such as "
            f"{missing[0].name}: was their archive extracted to its end? Delete "
            f"{missing[0].parent} and have it downloaded again"
        )
    labels = [set(data._labels) for data in opened]
    for of_split in labels:
        if empty := set(range(max(map(max, labels)) + 1)) - of_split:
            number = min(empty) + 1
            raise InputError(f"data.folder: {folder}: class {number} has no image in a list")
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
