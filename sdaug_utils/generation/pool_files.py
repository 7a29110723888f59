"""A pool on disk: an ordinary image folder, whose ``metadata.csv`` lists its images.

An image exists as soon as its file does: the file is written under a temporary name, then renamed.
``metadata.csv`` is written afterwards and lists each file with its size and digest. A file that is
not listed, or whose size differs, is read and checked by PNG's own checksums. If only the digest
differs, reading the image raises an error, and :func:`verify` deletes the file.
"""

from __future__ import annotations

import csv
import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sdaug_utils.data.images import Images, read_listed
from sdaug_utils.store import Spec, Store, digest, digest_of, file_digest, write_csv

COLUMNS = ("file_name", "class", "prompt", "seed", "attempts", "size", "digest")
LISTING = "metadata.csv"
# The suffix of a file beside an image that took more than one attempt; it holds their number.
ATTEMPTS = ".attempts"

Row = dict[str, str]


@dataclass(frozen=True)
class Pool:
    """Images of a pool on disk, in order."""

    class_name: str
    files: tuple[Path, ...]
    digests: tuple[str, ...]  # of the files
    seeds: tuple[int, ...]
    attempts: tuple[int, ...]
    source_rows: tuple[int, ...] = ()  # of the train split: the image that each one is made from

    def images(self) -> Images:
        """8-bit RGB arrays of shape (height, width, 3)."""
        return read_listed(self.files, self.digests)


def images_of(pools: Iterable[Pool]) -> Images:
    """The images of some pools, one pool after the other."""
    return sum((pool.images() for pool in pools), Images(()))


def image_seed(spec: Spec, index: int, attempt: int) -> int:
    """The seed of one attempt at one image of a pool, in 0 to 2**63 - 1."""
    hashed = hashlib.sha256(f"{digest(spec)}/{index}/{attempt}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1


def read_pool(folder: Path, spec: Spec) -> dict[int, Row]:
    """The rows of a pool's undamaged images by index, as ``metadata.csv`` has them.

    A file that is not listed, or whose size differs, is read and checked.
    """
    sizes = _sizes(folder)
    rows = {i: row for i, row in read_listing(folder).items() if row["size"] == str(sizes.get(i))}
    for index in sizes.keys() - rows.keys():
        if row := _row(folder / file_name(index), index, spec):
            rows[index] = row
    return rows


def _row(file: Path, index: int, spec: Spec) -> Row | None:
    """An image's row for ``metadata.csv``, read from its file; None if it is damaged or gone."""
    own = file.with_suffix(ATTEMPTS)
    try:
        content, attempts = file.read_bytes(), int(own.read_text()) if own.exists() else 1
    except (FileNotFoundError, ValueError):
        return None
    if not is_whole_png(content):
        return None
    seed = image_seed(spec, index, attempts - 1)
    size, own_digest = len(content), digest_of(content)
    values = (file.name, spec["class"], spec["prompt"], seed, attempts, size, own_digest)
    return dict(zip(COLUMNS, map(str, values), strict=True))


def verify(store: Store, spec: Spec) -> None:
    """Delete the images of a pool whose digest differs from the one in ``metadata.csv``."""
    folder = store.folder("pools", spec)
    rows, kept = read_listing(folder), dict[int, Row]()
    for index, row in rows.items():
        file = folder / file_name(index)
        if file.exists() and file_digest(file) != row["digest"]:
            store.report_damaged(file)
            file.unlink()
        else:
            kept[index] = row
    if kept != rows:
        write_listing(kept, folder)


def is_whole_png(content: bytes) -> bool:
    """Whether a PNG's chunks are all there and have the checksums that follow each."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    at = 8
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        expected = int.from_bytes(content[end - 4 : end], "big")
        if end > len(content) or zlib.crc32(content[at + 4 : end - 4]) != expected:
            return False
        if content[at + 4 : at + 8] == b"IEND":
            return True
        at = end
    return False


def _sizes(folder: Path) -> dict[int, int]:
    """The sizes of a pool's images by index, without temporary files."""
    sizes = dict[int, int]()
    for entry in os.scandir(folder) if folder.exists() else ():
        stem, suffix = os.path.splitext(entry.name)
        if suffix == ".png" and stem.isdecimal():
            with suppress(FileNotFoundError):  # it has just been deleted
                sizes[int(stem)] = entry.stat().st_size
    return sizes


def read_listing(folder: Path) -> dict[int, Row]:
    """The rows of ``metadata.csv`` by index; none if it is damaged."""
    try:
        with (folder / LISTING).open(newline="") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if len(row["digest"]) == 20 and int(row["size"])]
        return {int(row["file_name"].removesuffix(".png")): row for row in whole}
    except (OSError, KeyError, TypeError, ValueError):  # UnicodeDecodeError is a ValueError
        return {}


def write_listing(rows: Mapping[int, Row], folder: Path) -> None:
    """Write ``metadata.csv``; where others do so at the same time, it may lack some of theirs."""
    write_csv(folder / LISTING, COLUMNS, [rows[index] for index in sorted(rows)])


def file_name(index: int) -> str:
    return f"{index:05d}.png"
