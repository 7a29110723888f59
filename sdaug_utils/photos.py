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

from sdaug_utils.datasets import FIRST_SUBSET_SEED, SPLITS, Dataset, Split, decoded, read_rgb
from sdaug_utils.errors import InputError
from sdaug_utils.store import file_digest

FOOD_TRAIN_PER_CLASS = 600  # of 750; the rest validates (thesis, section 4.2.1)
OWN_SHARES = (0.5, 0.75)  # up to the first to train on, up to the second to validate


def oxford_iiit_pet(folder: Path, download: bool) -> Dataset:
    """Oxford-IIIT Pet (Parkhi et al., 2012): the official trainval list, the official test halved.

    The test list is shuffled per class with seed 41; its first half validates (the thesis's code).

    Raises:
        InputError: the folder is not in the official layout, or a class has no image.
    """
    from torchvision.datasets import OxfordIIITPet

    train = _opened(OxfordIIITPet, folder, "trainval", download)
    test = _opened(OxfordIIITPet, folder, "test", download)
    _check_classes(folder, train.classes, train._labels, test._labels)
    halves: tuple[list[int], list[int]] = ([], [])
    for rows in _shuffled(test._labels):
        halves[0].extend(rows[: len(rows) // 2])
        halves[1].extend(rows[len(rows) // 2 :])
    splits = {"train": _split(train._images, train._labels, train._segs)}
    for name, rows in zip(SPLITS[1:], halves, strict=True):
        chosen = [
            [column[row] for row in rows] for column in (test._images, test._labels, test._segs)
        ]
        splits[name] = _split(*chosen)
    return Dataset("oxford-iiit-pet", tuple(train.classes), splits)


def food_101(folder: Path, download: bool) -> Dataset:
    """Food-101 (Bossard et al., 2014): per class 600 to train on, 150 to validate, 250 to test.

    The official train list is shuffled per class with seed 41. There are no trimaps.

    Raises:
        InputError: as :func:`oxford_iiit_pet`.
    """
    from torchvision.datasets import Food101

    train = _opened(Food101, folder, "train", download)
    test = _opened(Food101, folder, "test", download)
    _check_classes(folder, train.classes, train._labels, test._labels)
    parts: tuple[list[int], list[int]] = ([], [])
    for rows in _shuffled(train._labels):
        first = math.ceil(len(rows) * FOOD_TRAIN_PER_CLASS / 750)
        parts[0].extend(rows[:first])
        parts[1].extend(rows[first:])
    splits = {
        name: _split(
            [train._image_files[row] for row in rows], [train._labels[row] for row in rows]
        )
        for name, rows in zip(SPLITS[:2], parts, strict=True)
    }
    splits["test"] = _split(test._image_files, test._labels)
    return Dataset("food-101", tuple(name.replace("_", " ") for name in train.classes), splits)


def image_folder(folder: Path, download: bool = False) -> Dataset:
    """A folder of class folders: per class half to train on, a quarter to validate and to test.

    The images of each class are shuffled with seed 41. Trimaps (1 subject, 2 background, 3 border),
    if there are any, are in ``trimaps/<class>/<name>.png`` beside the class folders.

    Raises:
        InputError: no class folders, or a class with fewer than four images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folders = sorted(p for p in folder.glob("*") if p.is_dir()) if folder.is_dir() else []
    classes = [path.name for path in folders if path.name != "trimaps"]
    if len(classes) < 2:
        raise InputError(f"data.folder: {folder}: needs a folder for each of at least two classes")
    index = {name: number for number, name in enumerate(classes)}
    try:
        samples = make_dataset(str(folder), index, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise InputError(f"data.folder: {error}") from error
    files, labels = [Path(file) for file, _ in samples], [label for _, label in samples]
    trimaps = [folder / "trimaps" / f.parent.name / f"{f.stem}.png" for f in files]
    parts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for rows in _shuffled(labels):
        if len(rows) < 4:
            name = classes[labels[rows[0]]]
            raise InputError(f"data.folder: {folder / name}: {len(rows)} images; needs at least 4")
        ends = [0, *(math.floor(share * len(rows)) for share in OWN_SHARES), len(rows)]
        for name, start, end in zip(SPLITS, ends, ends[1:], strict=False):
            parts[name].extend(rows[start:end])
    with_trimaps = (folder / "trimaps").is_dir()
    splits = {
        name: _split(
            [files[row] for row in rows],
            [labels[row] for row in rows],
            [trimaps[row] for row in rows] if with_trimaps else None,
        )
        for name, rows in parts.items()
    }
    return Dataset("imagefolder", tuple(name.replace("_", " ") for name in classes), splits)


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


def _opened(kind: Any, folder: Path, split: str, download: bool) -> Any:
    try:
        if not download:
            return kind(folder, split=split)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):  # jobs of an array start at the same time
            return kind(folder, split=split, download=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"data.folder: {folder}: not the layout of torchvision's {kind.__name__} "
            f"({' '.join(str(error).split())}); set data.download: true where there is internet"
        ) from error


def _check_classes(folder: Path, classes: Sequence[str], *splits: Sequence[int]) -> None:
    for labels in splits:
        if missing := set(range(max(map(max, splits)) + 1)) - set(labels):
            known = len(classes) > min(missing)
            name = classes[min(missing)] if known else f"number {min(missing) + 1}"
            raise InputError(f"data.folder: {folder}: class {name} has no image in a list")


def _shuffled(labels: Sequence[int]) -> list[list[int]]:
    """The rows of each class, in the order of a seeded shuffle."""
    return [
        np.random.default_rng((FIRST_SUBSET_SEED, int(label)))
        .permutation(np.flatnonzero(np.asarray(labels) == label))
        .tolist()
        for label in np.unique(labels)
    ]


def _split(
    files: Sequence[Path], labels: Sequence[int], trimaps: Sequence[Path] | None = None
) -> Split:
    def trimap(i: int) -> np.ndarray:
        if trimaps is None:
            raise InputError("this data set has no trimaps: experiment 08 needs them")
        return np.asarray(decoded(trimaps[i]), np.uint8)

    return Split(
        lambda i: read_rgb(files[i]),
        np.asarray(labels),
        trimap,
        lambda i: file_digest(files[i]),
    )
