"""What was made once is not made again.

An artefact is a folder named by the hash of all that determines it, written beside its final place
and renamed: it is whole or absent. ``spec.json`` inside says what determines it and, beside that,
which libraries and device made it (``made_with``). ``files.json`` lists its files' sizes, which are
compared at every request, and digests, which are compared when a process first reads it. A damaged
artefact is made again.
"""

import csv
import hashlib
import io
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
# The kinds of units (no folders) that summaries count, and their names there.
KINDS = {"images": "images", "models": "personalised models", "runs": "training runs"}


def digest(spec: Spec) -> str:
    """A hash of a specification that JSON can hold."""
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
    """A hash of a file's content, 20 hexadecimal digits."""
    return sha256(path)[:20]


def verify_checksums(folder: Path) -> dict[str, str]:
    """The checksums in ``folder/SHA256SUMS`` by file name.

    Raises InputError if the list or a listed file is missing, or a file has another checksum.
    """
    listing = folder / "SHA256SUMS"
    if not listing.exists():
        raise InputError(f"{listing}: missing; restore it with git")
    checksums = {}
    for line in listing.read_text().splitlines():
        expected, name = line.split("  ")
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: missing; restore it with git")
        if sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: corrupt (another SHA-256); restore it with git")
        checksums[name] = expected
    return checksums


def default_root() -> Path:
    """The environment's ``SDAUG_STORE``, else ``.store`` in the project."""
    return Path(os.environ.get("SDAUG_STORE") or Path(__file__).parents[1] / ".store")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    before = read_json(file)
    if not known.items() <= before.items():
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(before | known))


@cache
def _known_digests(root: Path) -> dict[str, list[Any]]:
    return read_json(root / "digests.json")


class Store:
    """A folder of artefacts, shared by all experiments and safe to use from several processes."""

    def __init__(self, root: Path | str | None = None) -> None:
        """``root`` defaults to :func:`default_root`. Raises InputError if it cannot be written."""
        self.root = Path(root or default_root())
        self.verified: set[Path] = set()  # artefacts whose digests are known to be right
        self.reported: set[Path] = set()  # damaged ones that were reported
        require_writable(self.root)

    def folder(self, kind: str, spec: Spec) -> Path:
        """Where the artefact is, or will be."""
        return self.root / kind / digest(spec)

    def is_whole(self, folder: Path, to_read: bool = False, silent: bool = False) -> bool:
        """Whether an artefact exists and its files have the sizes that ``files.json`` lists.

        With ``to_read`` their digests are compared, too, once per process and artefact. A damaged
        artefact is reported unless ``silent``.
        """
        if not folder.exists():
            return False
        try:
            listed = json.loads((folder / FILES).read_text()).items()
            whole = all((folder / name).stat().st_size == size for name, (size, _) in listed)
            if whole and to_read and folder not in self.verified:
                whole = all(file_digest(folder / name) == own for name, (_, own) in listed)
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
    def lock(self, *names: str, timeout: float = -1) -> Iterator[None]:
        """Hold locks between processes; wait for each ``timeout`` seconds, or for ever if -1.

        They are acquired in sorted order, so that there is no deadlock. A lock's file is deleted
        while it is held; a process that has opened it before notices that and opens a new one.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for name in sorted(set(names)):
                file = folder / f"{name}.lock"
                stack.enter_context(FileLock(file, timeout=timeout))
                stack.callback(file.unlink, missing_ok=True)
            yield

    def get(self, kind: str, spec: Spec, make: Callable[[Path], None]) -> Path:
        """The folder of an artefact, made by ``make(folder)`` if it is not there yet."""
        return self.get_all(kind, [spec], lambda _, folders: make(folders[0]))[0]

    def get_all(
        self, kind: str, specs: Sequence[Spec], make: Callable[[list[int], list[Path]], None]
    ) -> list[Path]:
        """As :meth:`get` for several: ``make`` gets the missing ones' positions and folders."""
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
                listed = {
                    file.relative_to(folder).as_posix(): [file.stat().st_size, file_digest(file)]
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                }
                (folder / FILES).write_text(json.dumps(listed))
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
        """Delete an artefact, finished or partial; False if a process is writing it."""
        name = f"{folder.parent.name}-{folder.stem}"
        # A pool is also locked by blocks of images and by its specification.
        parts = [file.stem for file in (self.root / "locks").glob(f"{name}-*.lock")]
        try:
            with self.lock(name, *parts, timeout=0):
                _delete(folder)
        except Timeout:
            return False
        return True


def _delete(folder: Path) -> None:
    """Rename a folder, then delete it: no process sees a part of its files."""
    if folder.suffix != PARTIAL:
        shutil.rmtree(folder.with_suffix(PARTIAL), ignore_errors=True)
        folder = folder.replace(folder.with_suffix(PARTIAL))
    shutil.rmtree(folder)


def write_spec(folder: Path, spec: Spec) -> None:
    """Write ``spec.json``: what determines an artefact, and all that it was made with so far."""
    path = folder / "spec.json"
    makers = read_json(path).get("made_with", [])
    if made_with() not in makers:
        makers.append(made_with())
    content = json.dumps({**spec, "made_with": makers}, indent=2, sort_keys=True)
    write_atomically(path, content)


def makers(artefacts: Iterable[Path]) -> list[dict[str, str]]:
    """The different sets of libraries and devices that some artefacts were made with."""
    specs = (read_json(folder / "spec.json") for folder in artefacts)
    found = {json.dumps(one, sort_keys=True) for spec in specs for one in spec.get("made_with", [])}
    return [json.loads(maker) for maker in sorted(found)]


def require_writable(folder: Path) -> None:
    """Make a folder. Raises InputError if files cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        message = f"{folder}: cannot write ({error.strerror}); choose a writable folder"
        raise InputError(message) from error


def write_atomically(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a file beside its place, then rename it: readers see the old one or the new one.

    ``content`` is its text, or a function that writes a file of the path that it is given.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        content(temporary)
    temporary.replace(path)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows of text as a table, as :func:`write_atomically` does."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
