"""``python -m sdaug_utils``: images for use elsewhere, the store, the raw runs."""

import csv
import os
import subprocess
import sys
import time

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from sdaug_utils import __main__ as commands
from sdaug_utils import export
from sdaug_utils.generation import pools
from sdaug_utils.store import PARTIAL
from sdaug_utils.study import ROOT


@pytest.fixture
def call(monkeypatch, capsys):
    """The exit code of a command, and what it printed."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdaug_utils", *map(str, arguments)])
        code = commands.main()
        return code, "".join(capsys.readouterr())

    return call


def make(call, into, *more):
    return call("make", *more, "--profile", "smoke", "--count", 3, "--into", into)


def test_images_come_as_a_folder_that_torchvision_reads(call, world, tmp_path):
    into = tmp_path / "images"
    code, printed = make(call, into, "stable-diffusion-prompt")
    names = world.data.class_names
    assert (code, f"{3 * len(names)} images" in printed) == (0, True)
    read = ImageFolder(into)
    assert read.classes == sorted(names)
    assert len(read) == 3 * len(names)
    with (into / export.LISTING).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file_name"] for row in rows} == {
        os.path.relpath(path, into) for path, _ in read.samples
    }
    pool = pools.technique_pools(world, "stable-diffusion-prompt", 0, 3)[0]
    [first] = [row for row in rows if row["file_name"].startswith(f"{pool.class_name}/")][:1]
    assert int(first["seed"]) == pool.seeds[0]
    assert Image.open(into / first["file_name"]).tobytes() == pool.images()[0].tobytes()


def test_the_hub_s_library_reads_the_folder_too(call, tmp_path):
    datasets = pytest.importorskip("datasets")
    into = tmp_path / "images"
    assert make(call, into, "stable-diffusion-prompt", "--class", "sandal")[0] == 0
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(into), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert {"image", "class", "prompt", "seed", "attempts", "technique"} <= set(read.column_names)
    assert set(read["class"]) == {"sandal"}
    assert read[0]["image"].size == (32, 32)


def test_techniques_and_classes_gather_in_one_folder_and_fewer_replace_more(call, tmp_path, world):
    into, known = tmp_path / "images", world.data.class_names[0]
    make(call, into, "stable-diffusion-prompt", "--class", "a red hat", known)
    assert make(call, into, "real-guidance", "--class", known)[0] == 0
    code, _ = call(
        *("make", "real-guidance", "--class", known, "--profile", "smoke"),
        *("--count", 1, "--into", into),
    )
    assert code == 0
    with (into / export.LISTING).open(newline="") as file:
        listed = [row["file_name"] for row in csv.DictReader(file)]
    assert listed == sorted(os.path.relpath(path, into) for path in into.rglob("*.png"))
    assert sum("real-guidance" in name for name in listed) == 1
    assert sum(name.startswith("a red hat/") for name in listed) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dreambooth", "--class", "hat"], "'hat' has no real images, which dreambooth needs"),
        (["gan"], "gan: unknown: choose from controlnet-canny"),
        (["stable-diffusion-prompt", "--profile", "huge"], "huge"),
        (["stable-diffusion-prompt", "--draw", "-1"], "--draw: -1"),
        (["real-guidance", "--real-percent", "0"], "--real-percent: 0"),
        (["stable-diffusion-prompt", "--class", ".."], "'..': cannot be the name of a folder"),
        (["stable-diffusion-prompt", "--into", __file__], "is a file"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_line(call, tmp_path, arguments, message):
    code, printed = call(
        "make", "--profile", "smoke", "--count", 2, "--into", tmp_path / "images", *arguments
    )
    assert code == 2
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_a_folder_of_something_else_is_left_alone(call, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, printed = make(call, tmp_path, "stable-diffusion-prompt")
    assert (code, "choose an empty folder" in printed) == (2, True)


def test_the_store_is_listed_shown_and_pruned(call, world):
    [pool, *_] = pools.technique_pools(world, "stable-diffusion-prompt", 0, 2)
    folder = pool.files[0].parent
    assert "pools " in call("store", "ls")[1]
    listed = call("store", "ls", "pools")[1]
    assert f"pools/{folder.name}" in listed
    assert "stable-diffusion-prompt" in listed
    shown = call("store", "show", folder.name[:12])[1]
    assert '"technique": "stable-diffusion-prompt"' in shown
    assert "00001.png" in shown
    assert call("store", "show", "xyz")[0] == call("store", "ls", "models")[0] == 2
    half = world.store.root / "features" / "0123.partial"
    half.mkdir(parents=True)
    whole = world.store.get("features", {"a": 1}, lambda place: (place / "x").write_text("abc"))
    damaged = world.store.get("features", {"a": 2}, lambda place: (place / "x").write_text("abc"))
    (damaged / "x").write_text("ab")
    assert "2 artefacts" in call("store", "prune", "--dry-run")[1]
    assert half.exists()
    assert call("store", "prune")[0] == 0
    assert (half.exists(), damaged.exists(), whole.exists(), folder.exists()) == (
        *(False, False),
        *(True, True),
    )
    old = time.time() - 10 * 86400
    os.utime(whole, (old, old))
    assert call("store", "prune", "--older-than", 0)[0] == 2
    with world.store.lock(f"features-{whole.name}"):
        assert "but in use" in call("store", "prune", "--older-than", 5)[1]
    assert whole.exists()
    with world.store.lock(f"pools-{folder.name}-0"):  # images 0 to 49 are being made
        assert not world.store.remove(folder)
    assert folder.exists()
    whole.with_suffix(PARTIAL).mkdir()  # of a run that was making it again
    assert "made more than 5 days ago" in call("store", "prune", "--older-than", 5)[1]
    assert not whole.exists()
    assert not whole.with_suffix(PARTIAL).exists()


def test_shipped_runs_are_listed_and_summed_up(call, monkeypatch):
    monkeypatch.delenv("SDAUG_OUTPUT")
    assert "03 " in call("results")[1]
    table = call("results", "05")[1]
    assert "stable-diffusion-prompt" in table
    assert "gain_points" in table
    assert "03-a  supported" in call("results", "claims")[1]
    for name in ("03-protocols", "03-views", "08-updates", "11-shifts"):
        code, table = call("results", name)[:2]
        assert (code, "protocol" in table) == (0, True)
        assert "gain_points" not in table
    assert call("results", "99")[0] == 2


def test_techniques_are_listed_with_what_may_be_set(call):
    printed = call("techniques")[1]
    assert "real_guidance: strength: 0.9" in printed
    assert "dreambooth " in printed


def test_help_waits_for_nothing_slow():
    asked = (
        "import sys; sys.argv = ['sdaug_utils', 'make', '--help']\n"
        "from sdaug_utils import __main__ as commands\n"
        "try: commands.main()\n"
        "except SystemExit: print(sorted({'torch.nn', 'diffusers', 'pandas'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--into" in shown.stdout
    assert shown.stdout.endswith("[]\n")


def test_a_technique_leaves_those_alone_whose_names_begin_with_its_own(call, tmp_path):
    for technique in ("dreambooth-lora", "dreambooth"):
        assert make(call, tmp_path / "images", technique)[0] == 0
    names = {path.name for path in (tmp_path / "images").rglob("*.png")}
    assert {name.rpartition("-")[0] for name in names} == {"dreambooth", "dreambooth-lora"}
