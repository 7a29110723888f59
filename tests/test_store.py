import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import numpy as np
import pytest

from sdaug_utils import compute
from sdaug_utils import store as stores
from sdaug_utils.errors import InputError
from sdaug_utils.store import Store, array_digest, digest, verify_checksums


def test_an_artefact_is_made_once(store):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "value").write_text("42")

    first = store.get("kind", {"a": 1, "b": [2]}, make)
    again = store.get("kind", {"b": [2], "a": 1}, make)
    assert first == again
    assert len(calls) == 1
    assert (first / "value").read_text() == "42"
    assert store.get("kind", {"a": 2, "b": [2]}, make) != first


def test_many_askers_one_maker(store):
    calls = []

    def ask(_):
        return store.get("kind", {"a": 1}, lambda folder: calls.append(folder))

    with ThreadPoolExecutor(8) as executor:
        assert len(set(executor.map(ask, range(16)))) == 1
    assert len(calls) == 1


def test_a_failure_leaves_no_artefact_and_the_next_try_starts_clean(store):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get("kind", {"a": 1}, fail)
    assert not store.folder("kind", {"a": 1}).exists()
    folder = store.get("kind", {"a": 1}, lambda folder: (folder / "whole").touch())
    assert {path.name for path in folder.iterdir()} == {"files.json", "spec.json", "whole"}


def test_get_all_makes_only_what_is_missing(store):
    specs = [{"n": n} for n in range(4)]
    store.get("kind", specs[2], lambda folder: None)
    asked = []
    store.get_all("kind", specs, lambda missing, folders: asked.extend(missing))
    assert asked == [0, 1, 3]
    assert all(store.folder("kind", spec).exists() for spec in specs)


def test_digest_sees_every_value():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    image = np.zeros((4, 4, 3), np.uint8)
    assert array_digest(image) == array_digest(image.copy())
    assert array_digest(image) != array_digest(image.reshape(8, 2, 3))
    image[0, 0, 0] = 1
    assert array_digest(image) != array_digest(np.zeros((4, 4, 3), np.uint8))


def test_an_artefact_says_what_made_it_and_its_key_does_not(store, monkeypatch):
    def make(folder):
        return store.get("kind", {"a": 1}, lambda folder: None)

    first = make(None)
    record = json.loads((first / "spec.json").read_text())
    assert record["a"] == 1
    [maker] = record["made_with"]
    assert set(maker) == {*compute.LIBRARIES, "device"}
    assert maker["torch"] == version("torch")
    other = {**maker, "torch": "0.0.1"}
    monkeypatch.setattr(stores, "made_with", lambda: other)
    assert make(None) == first  # another release makes nothing again
    second = store.get("kind", {"a": 2}, lambda folder: None)
    assert stores.makers([first, second, first]) == sorted([maker, other], key=str)
    stores.write_spec(first, {"a": 1})  # as a pool does that grows
    assert len(json.loads((first / "spec.json").read_text())["made_with"]) == 2


def test_an_unwritable_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        Store(tmp_path / "file" / "store")


def test_checksums_tell_missing_from_corrupt(tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  data.png\n")
    with pytest.raises(InputError, match=r"data\.png: missing"):
        verify_checksums(tmp_path)
    (tmp_path / "data.png").write_bytes(b"not it")
    with pytest.raises(InputError, match=r"data\.png: corrupt"):
        verify_checksums(tmp_path)


def test_files_are_read_once_for_all_processes_unless_they_change(tmp_path, monkeypatch):
    file, other = tmp_path / "photograph.jpg", tmp_path / "other.jpg"
    for each in (file, other):
        each.write_bytes(each.name.encode())
    first = stores.kept_digest(file)
    assert first == stores.file_digest(file) != stores.kept_digest(other)
    stores.keep_digests()
    stores._known_digests.cache_clear()  # another process
    read = []
    whole = stores.file_digest
    monkeypatch.setattr(stores, "file_digest", lambda path: read.append(path) or whole(path))
    assert stores.kept_digest(file) == first
    assert not read
    file.write_bytes(b"another photograph")
    assert stores.kept_digest(file) != first
    assert read == [file]
    stores.keep_digests()
    (stores.default_root() / "digests.json").write_text("{half")
    stores._known_digests.cache_clear()
    assert stores.kept_digest(other) == whole(other)


COUNTING = """
import sys
from sdaug_utils.store import Store
store = Store(sys.argv[1])
counter = store.root / "counter"
for _ in range(200):
    with store.lock("kind-a", "kind-b"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_a_lock_excludes_other_processes_and_leaves_no_file(store):
    (store.root / "counter").write_text("0")
    command = [sys.executable, "-c", COUNTING, str(store.root)]
    together = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in together] == [0] * 4
    assert (store.root / "counter").read_text() == "800"
    assert not list((store.root / "locks").iterdir())
