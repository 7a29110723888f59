"""What was made once is not made again.

An artefact is a folder named by the hash of everything that determines it. It is written beside
its final place and renamed, so it is whole or absent; ``spec.json`` inside says what made it.
"""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sdaug_utils.errors import InputError

Spec = Mapping[str, Any]


def digest(spec: Spec) -> str:
    """A hash of 20 hexadecimal digits of a specification that JSON can hold."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def array_digest(array: np.ndarray) -> str:
    """A hash of the shape, type and content of an array, such as an image's pixels."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()[:20]


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


def verify_checksums(folder: Path) -> dict[str, str]:
    """Check every file that ``folder/SHA256SUMS`` names; return its checksums by file name.

    Raises:
        InputError: a file is missing or its content is not what it should be.
    """
    listing = folder / "SHA256SUMS"
    if not listing.exists():
        raise InputError(f"{listing}: missing; restore it with 'git checkout -- {folder.name}'")
    checksums = {}
    for line in listing.read_text().splitlines():
        expected, name = line.split("  ")
        path = folder / name
        if not path.exists():
            raise InputError(f"{path}: missing; restore it with git")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise InputError(f"{path}: corrupt (its SHA-256 is not the listed one); restore it")
        checksums[name] = expected
    return checksums


class Store:
    """A folder of artefacts, shared by all experiments and safe to use from several processes."""

    def __init__(self, root: Path | str | None = None) -> None:
        """``root`` defaults to the environment's ``SDAUG_STORE``, else ``.store`` in the project.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        default = os.environ.get("SDAUG_STORE") or Path(__file__).parents[1] / ".store"
        self.root = Path(root or default)
        require_writable(self.root)

    def folder(self, kind: str, spec: Spec) -> Path:
        """Where the artefact is, or will be."""
        return self.root / kind / digest(spec)

    def record(self, kind: str, spec: Spec, used: Sequence[int], made: Sequence[int]) -> None:
        """Note what was used and what had to be made, for the runner's summary."""
        note({"kind": kind, "key": digest(spec), "used": list(used), "made": list(made)})

    def lock(self, kind: str, spec: Spec) -> FileLock:
        """A lock between processes for one artefact."""
        folder = self.folder(kind, spec)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_suffix(".lock"))

    def get(self, kind: str, spec: Spec, make: Callable[[Path], None]) -> Path:
        """The folder of an artefact, made by ``make(folder)`` if it is not there yet."""
        return self.get_all(kind, [spec], lambda _, folders: make(folders[0]))[0]

    def get_all(
        self,
        kind: str,
        specs: Sequence[Spec],
        make: Callable[[list[int], list[Path]], None],
    ) -> list[Path]:
        """As :meth:`get` for artefacts that are best made together.

        ``make(missing, folders)`` gets the positions of the missing ones and a folder for each.
        """
        folders = [self.folder(kind, spec) for spec in specs]
        if all(folder.exists() for folder in folders):
            return folders
        with ExitStack() as stack:
            for spec in sorted(specs, key=digest):  # one order for all processes: no deadlock
                stack.enter_context(self.lock(kind, spec))
            missing = [i for i, folder in enumerate(folders) if not folder.exists()]
            partial = [folders[i].with_suffix(".partial") for i in missing]
            for i, folder in zip(missing, partial, strict=True):
                shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
                folder.mkdir(parents=True)
                (folder / "spec.json").write_text(json.dumps(specs[i], indent=2, sort_keys=True))
            if missing:
                make(missing, partial)
            for i, folder in zip(missing, partial, strict=True):
                folder.replace(folders[i])
        return folders

    def drop(self, kind: str, spec: Spec) -> None:
        """Delete an artefact that can be made again."""
        with self.lock(kind, spec):
            folder = self.folder(kind, spec)
            if folder.exists():
                shutil.rmtree(folder.replace(folder.with_suffix(".partial")))


class VectorCache:
    """Vectors by key in one SQLite file: features of images, each computed once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with closing(self._connect()) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS vectors (key TEXT PRIMARY KEY, v BLOB)")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=60)

    def read(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors that are there, 32-bit floats."""
        found: dict[str, np.ndarray] = {}
        with closing(self._connect()) as connection:
            for start in range(0, len(keys), 500):
                some = list(keys[start : start + 500])
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT key, v FROM vectors WHERE key IN ({marks})", some
                )
                found.update((key, np.frombuffer(blob, np.float32)) for key, blob in rows)
        return found

    def write(self, vectors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Add vectors; those already there stay."""
        rows = [(key, np.asarray(vector, np.float32).tobytes()) for key, vector in vectors]
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)


def note(entry: Spec) -> None:
    """Add a line to the file that the environment's ``SDAUG_LEDGER`` names, if it does."""
    if path := os.environ.get("SDAUG_LEDGER"):
        with open(path, "a") as ledger:
            ledger.write(json.dumps(entry) + "\n")


def require_writable(folder: Path) -> None:
    """Make a folder and check that files can be written into it.

    Raises:
        InputError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write ({error.strerror}); choose a writable folder"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then rename it: readers see the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    beside.replace(path)
