"""Real images with captions that a foundation model has learnt from, or might have."""

import csv
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdaug_utils.data import datasets
from sdaug_utils.data.datasets import MINIATURE_DATA, PROJECT
from sdaug_utils.data.images import Images, ImageSource, read_rgb
from sdaug_utils.errors import InputError
from sdaug_utils.store import array_digest, digest_of, file_digest, verify_checksums

LISTING = "metadata.csv"


def naming(corpus: str, class_name: str) -> Images:
    """The images whose captions have the class's name in them, as words of their own.

    A corpus is ``miniature``, a sample of what the shipped model learnt from, or a Hugging Face
    image folder (``metadata.csv`` with the columns ``file_name`` and ``text``), whose path may be
    relative to the project. Raises InputError as :func:`revision` does.
    """
    revision(corpus)
    words = re.compile(rf"(?<![\w-]){re.escape(class_name)}(?![\w-])", re.IGNORECASE)
    load: Callable[[Any], np.ndarray] = read_rgb
    if corpus == "miniature":
        images = _miniature().get(class_name, np.empty(0))
        keys, load = list[Any](range(len(images))), images.__getitem__
    else:
        keys = [file for file, text in _listed(PROJECT / corpus) if words.search(text)]
    group = f"corpus, {class_name}"
    return Images(
        tuple(ImageSource(load, lambda key: array_digest(load(key)), key, group) for key in keys)
    )


@cache
def revision(corpus: str) -> str:
    """A hash of a corpus's captions and images; InputError if one that is listed is missing."""
    if corpus == "miniature":
        verify_checksums(MINIATURE_DATA)
        return file_digest(MINIATURE_DATA / "corpus.png")
    files = [file for file, _ in _listed(PROJECT / corpus)]
    for file in files:
        if not file.is_file():
            raise InputError(f"retrieval.corpus: {file} is listed and missing")
    sizes = [f"{file.name} {file.stat().st_size}" for file in files]
    captions = file_digest(PROJECT / corpus / LISTING)
    return digest_of("\n".join([captions, *sizes]).encode())


@cache
def _listed(folder: Path) -> list[tuple[Path, str]]:
    listing = folder / LISTING
    try:
        with listing.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, restval="")
            return [(folder / row["file_name"], row["text"]) for row in rows]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise InputError(
            f"retrieval.corpus: '{folder}': needs a {LISTING} with columns file_name and text"
        ) from error


@cache
def _miniature() -> dict[str, np.ndarray]:
    """By class: 200 images of each garment, and the foundation model's half of the digits."""
    sheet = np.asarray(Image.open(MINIATURE_DATA / "corpus.png"))
    found = dict(zip(datasets.FASHION_CLASSES, datasets.tiles(sheet), strict=True))
    digits, labels = datasets.digits_halves()[0]
    return found | {name: digits[labels == i] for i, name in enumerate(datasets.DIGIT_CLASSES)}
