"""What was made once is not made again.

An artefact is a folder named by the hash of everything that determines it. It is written beside
its final place and renamed, so it is whole or absent; ``spec.json`` inside says what determines it
and, under ``made_with``, which libraries and device made it. Those are not in its key: a patch
release does not throw the store away. ``files.json`` lists its files with sizes, which are compared
whenever somebody asks for it, and digests, which are compared when a process first reads it: what
was damaged since is made again.
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from sdaug_utils.compute import made_with
from sdaug_utils.errors import InputError

Spec = Mapping[str, Any]
PARTIAL = ".partial"  # of a folder that is being made
FILES = "files.json"
KINDS = {"images": "images", "models": "personalised models", "runs": "training runs"}
"""Kinds of units that summaries count, and how they call them."""


def digest(spec: Spec) -> str:
    """A hash of 20 hexadecimal digits of a specification that JSON can hold."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return digest_of(canonical.encode())


def digest_of(content: bytes) -> str:
    """A hash of 20 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:20]


def array_digest(array: np.ndarray) -> str:
    """A hash of the shape, type and content of an array, such as an image's pixels."""
    header = f"{array.dtype.str}{array.shape}".encode()
    return digest_of(header + np.ascontiguousarray(array).tobytes())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's content."""
    return sha256(path)[:20]


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
        if sha256(path) != expected:
            raise InputError(f"{path}: corrupt (its SHA-256 is not the listed one); restore it")
        checksums[name] = expected
    return checksums


def default_root() -> Path:
    """The environment's ``SDAUG_STORE``, else ``.store`` in the project."""
    return Path(os.environ.get("SDAUG_STORE") or Path(__file__).parents[1] / ".store")


def kept_digest(path: Path) -> str:
    """As :func:`file_digest`, and kept on disk for later processes by :func:`keep_digests`.

    A kept digest is valid as long as the file's size and modification time do not change.
    """
    known, status = _known_digests(default_root()), path.stat()
    facts = [status.st_size, status.st_mtime_ns]
    if known.get(str(path), [])[:2] != facts:
        known[str(path)] = [*facts, file_digest(path)]
    return known[str(path)][2]


def keep_digests() -> None:
    """Save the digests that :func:`kept_digest` has computed."""
    root = default_root()
    known, file = _known_digests(root), root / "digests.json"
    before = _read_digests(file)
    if known.items() <= before.items():
        return
    root.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**before, **known})
    write_atomically(file, lambda temporary: temporary.write_text(content))


@cache
def _known_digests(root: Path) -> dict[str, list[Any]]:
    return _read_digests(root / "digests.json")


def _read_digests(file: Path) -> dict[str, list[Any]]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or damaged
        return {}


class Store:
    """A folder of artefacts, shared by all experiments and safe to use from several processes."""

    def __init__(self, root: Path | str | None = None) -> None:
        """``root`` defaults to the environment's ``SDAUG_STORE``, else ``.store`` in the project.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        self.root = Path(root or default_root())
        self.verified: set[Path] = set()  # artefacts whose digests are known to be right
        self.reported: set[Path] = set()  # damaged ones that were reported
        require_writable(self.root)

    def folder(self, kind: str, spec: Spec) -> Path:
        """Where the artefact is, or will be."""
        return self.root / kind / digest(spec)

    def is_whole(self, folder: Path, to_read: bool = False, silent: bool = False) -> bool:
        """Whether an artefact exists and is undamaged: the sizes of its files are as listed.

        Args:
            to_read: compare the files' digests, too; once per process and artefact.
            silent: do not print that an artefact is damaged.
        """
        if not folder.exists():
            return False
        try:
            listed = json.loads((folder / FILES).read_text())
            sizes = {name: (folder / name).stat().st_size for name in listed}
            whole = sizes == {name: size for name, (size, _) in listed.items()}
            if whole and to_read and folder not in self.verified:
                whole = all(file_digest(folder / name) == own for name, (_, own) in listed.items())
        except (OSError, ValueError, AttributeError, TypeError):  # the listing itself is damaged
            whole = False
        if whole and to_read:
            self.verified.add(folder)
        if not (whole or silent):
            self.report_damaged(folder)
        return whole

    def report_damaged(self, damaged: Path) -> None:
        """Print, once per path, that it is damaged and will be made again."""
        if damaged not in self.reported:
            tqdm.write(f"{damaged.relative_to(self.root)}: damaged: it is made again")
        self.reported.add(damaged)

    @contextmanager
    def lock(self, *names: str) -> Iterator[None]:
        """Hold locks between processes. They are acquired in sorted order: there is no deadlock."""
        with ExitStack() as stack:
            for name in sorted(set(names)):
                stack.enter_context(self._locked(name))
            yield

    @contextmanager
    def _locked(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Hold one lock between processes; wait for it for ``timeout`` seconds, or for ever if -1.

        Its file is deleted while the lock is held. A process that has opened the file in the
        meantime notices that it is deleted, and tries again with a new file.
        """
        file = self.root / "locks" / f"{name}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file, timeout=timeout):
            try:
                yield
            finally:
                file.unlink(missing_ok=True)

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
        if all(self.is_whole(folder, to_read=True) for folder in folders):
            return folders
        with self.lock(*(f"{kind}-{folder.name}" for folder in folders)):
            missing = [i for i, folder in enumerate(folders) if not self.is_whole(folder, True)]
            partial = [folders[i].with_suffix(PARTIAL) for i in missing]
            for i, folder in zip(missing, partial, strict=True):
                shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
                folder.mkdir(parents=True)
                write_spec(folder, specs[i])
            if missing:
                make(missing, partial)
            for i, folder in zip(missing, partial, strict=True):
                _list_files(folder)
                shutil.rmtree(folders[i], ignore_errors=True)  # damaged
                folder.replace(folders[i])
        return folders

    def drop(self, kind: str, spec: Spec) -> None:
        """Delete an artefact that can be made again."""
        folder = self.folder(kind, spec)
        with self.lock(f"{kind}-{folder.name}"):
            if folder.exists():
                _delete(folder)

    def remove(self, folder: Path) -> bool:
        """Delete the folder of an artefact, or of one in the making, unless somebody writes to it.

        Who reads it is not waited for.
        """
        name = f"{folder.parent.name}-{folder.stem}"
        held = {name, *(file.stem for file in (self.root / "locks").glob(f"{name}-*.lock"))}
        try:
            with ExitStack() as stack:
                for one in sorted(held):  # a lock of its own, or of its parts
                    stack.enter_context(self._locked(one, timeout=0))
                _delete(folder)
        except Timeout:
            return False
        return True


def _delete(folder: Path) -> None:
    """Delete a folder in such a way that nobody finds it half gone."""
    if folder.suffix != PARTIAL:
        shutil.rmtree(folder.with_suffix(PARTIAL), ignore_errors=True)
        folder = folder.replace(folder.with_suffix(PARTIAL))
    shutil.rmtree(folder)


def _list_files(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_digest(path)]
        for path in files
    }
    (folder / FILES).write_text(json.dumps(listed))


def write_spec(folder: Path, spec: Spec) -> None:
    """Write ``spec.json``: what determines an artefact, and all that it was made with so far."""
    path, makers = folder / "spec.json", _makers(folder)
    makers += [made_with()] if made_with() not in makers else []
    text = json.dumps({**spec, "made_with": makers}, indent=2, sort_keys=True)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def makers(artefacts: Iterable[Path]) -> list[dict[str, str]]:
    """The different sets of libraries and devices that some artefacts were made with."""
    found = [json.dumps(maker, sort_keys=True) for folder in artefacts for maker in _makers(folder)]
    return [json.loads(maker) for maker in sorted(set(found))]


def _makers(folder: Path) -> list[dict[str, str]]:
    """``made_with`` of one artefact; empty if ``spec.json`` is missing or damaged."""
    try:
        return json.loads((folder / "spec.json").read_text()).get("made_with", [])
    except (OSError, ValueError, AttributeError):
        return []


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
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    write(temporary)
    temporary.replace(path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows of text as a table, as :func:`write_atomically` does."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
