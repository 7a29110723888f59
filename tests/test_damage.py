"""What of a store was damaged is found, told, and made again with the same bytes."""

import shutil

import pytest

from sdaug_utils.store import Store
from tests.faults import contents
from tests.test_make import make_everything


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("whole"))
    make_everything(store)
    return store.root


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "cut short": cut,
    "emptied": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"\x00\xff garbage" * 9),
    "gone": lambda file: file.unlink(),
    "a bit flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_kind_of_file(whole, tmp_path, capsys, damage):
    """One file of each kind, where it is read again: models and features by what is gone, too."""
    store = Store(shutil.copytree(whole, tmp_path / "damaged"))
    before, damaged = contents(whole), 0
    models = [kind for kind in ("dreambooth", "textual-inversion") if (whole / kind).exists()]
    assert models
    for kind in (*models, "features", "runs", "pools"):
        folders = sorted(path for path in (store.root / kind).iterdir() if path.is_dir())
        names = sorted({file.name for file in folders[0].rglob("*") if file.is_file()})
        for number, name in enumerate(names[:8]):
            if name in ("spec.json", "files.json", "metadata.csv") and damage == "a bit flipped":
                continue  # a bit of what nobody reads, or of white space, may do no harm
            found = [file for folder in folders[number:] for file in folder.rglob(name)]
            DAMAGES[damage](found[0])
            damaged += 1
    for folder in sorted((store.root / "pools").iterdir())[3:]:
        (folder / "00001.png").unlink(missing_ok=True)  # wants its model again
    for folder in sorted((store.root / "runs").iterdir())[6:]:
        shutil.rmtree(folder)  # wants its features again
    make_everything(store, verify=True)
    said = capsys.readouterr()
    assert damaged >= 9
    assert (said.out + said.err).count("damaged: it is made again") >= 5
    assert contents(store.root) == before
