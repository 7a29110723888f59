"""Data sets in their real layouts, built from the shipped images and read by torchvision."""

import json

import numpy as np
import pytest
from PIL import Image

from sdaug_utils.data import control, datasets, photos
from sdaug_utils.data.images import digests
from sdaug_utils.errors import InputError

MODES = ("RGB", "L", "CMYK", "P")  # all of these occur in the real sets
CLASSES = ("Abyssinian", "american_bulldog", "Bengal")


@pytest.fixture(scope="module")
def some_images():
    data = datasets.load("fashion-mnist", ["trouser", "bag", "dress"], {"train": 12})
    return data.splits["train"]


def write_jpeg(image, path, mode):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image).resize((48, 40))
    if mode == "P":  # a palette does not fit into JPEG: such files are PNGs that are called .jpg
        picture.convert("P").save(path, "PNG")
    else:
        picture.convert(mode).save(path, "JPEG")


@pytest.fixture
def pets(tmp_path, some_images):
    """Three breeds with eight images in trainval.txt and four in test.txt each."""
    root = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": [], "test": []}
    for row, label in enumerate(some_images.labels):
        number = row % 12
        name = f"{CLASSES[label]}_{number}"
        write_jpeg(some_images.load(row), root / "images" / f"{name}.jpg", MODES[number % 4])
        trimap = Image.fromarray(some_images.trimap(row)).resize((48, 40), Image.Resampling.NEAREST)
        target = root / "annotations" / "trimaps" / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        trimap.save(target)
        lists["trainval" if number < 8 else "test"].append(f"{name} {label + 1} 1 1")
    for name, lines in lists.items():
        (root / "annotations" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "annotations" / "xmls").mkdir()
    return tmp_path


def test_pets_have_the_official_lists_and_halves(pets):
    data = photos.oxford_iiit_pet(pets, download=False)
    assert data.class_names == ("Abyssinian", "American Bulldog", "Bengal")
    sizes = {name: np.bincount(split.labels).tolist() for name, split in data.splits.items()}
    assert sizes == {"train": [8] * 3, "validation": [2] * 3, "test": [2] * 3}
    seen = [set(digests(split.images())) for split in data.splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) == 36


def test_every_mode_of_image_becomes_8_bit_rgb_and_trimaps_keep_their_labels(pets):
    train = photos.oxford_iiit_pet(pets, download=False).splits["train"]
    for row in range(len(train)):
        image, trimap = train.load(row), train.trimap(row)
        assert image.shape == (40, 48, 3)
        assert image.dtype == np.uint8
        assert trimap.shape == (40, 48)
        assert set(np.unique(trimap)) <= {1, 2, 3}
        assert image[trimap == 1].mean() > image[trimap == 2].mean()
    assert control.segmentation_map(train.trimap(0), 64).shape == (64, 64, 3)


def test_a_folder_that_is_not_in_the_layout_is_refused(tmp_path, pets):
    with pytest.raises(InputError, match="not the layout of torchvision's OxfordIIITPet"):
        photos.oxford_iiit_pet(tmp_path / "nothing", download=False)
    test_list = pets / "oxford-iiit-pet" / "annotations" / "test.txt"
    lines = [line for line in test_list.read_text().splitlines() if "bulldog" not in line]
    test_list.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="class 2 has no image in a list"):
        photos.oxford_iiit_pet(pets, download=False)


def test_an_image_that_does_not_decode_is_named(pets):
    train = photos.oxford_iiit_pet(pets, download=False).splits["train"]
    path = pets / "oxford-iiit-pet" / "images" / "Abyssinian_0.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"Abyssinian_0\.jpg: missing or does not decode"):
        train.load(0)


def test_food_is_split_as_in_the_thesis(tmp_path, some_images):
    root = tmp_path / "food-101"
    lists = {"train": {}, "test": {}}
    for row, label in enumerate(some_images.labels):
        name = ("apple_pie", "baby_back_ribs", "baklava")[label]
        stem = f"{name}/{1000 + row}"
        write_jpeg(some_images.load(row), root / "images" / f"{stem}.jpg", MODES[row % 3])
        lists["train" if row % 12 < 10 else "test"].setdefault(name, []).append(stem)
    (root / "meta").mkdir()
    for name, content in lists.items():
        (root / "meta" / f"{name}.json").write_text(json.dumps(content))
    (root / "meta" / "classes.txt").write_text("\n".join(lists["train"]))
    data = photos.food_101(tmp_path, download=False)
    assert data.class_names == ("apple pie", "baby back ribs", "baklava")
    sizes = {name: np.bincount(split.labels).tolist() for name, split in data.splits.items()}
    assert sizes == {"train": [8] * 3, "validation": [2] * 3, "test": [2] * 3}
    assert data.splits["test"].load(0).shape == (40, 48, 3)
    with pytest.raises(InputError, match="no trimaps"):
        data.splits["test"].trimap(0)


def test_a_folder_of_ones_own_is_split_and_may_have_trimaps(tmp_path, some_images):
    for row, label in enumerate(some_images.labels):
        name = ("mugs", "tea_pots", "spoons")[label]
        write_jpeg(some_images.load(row), tmp_path / name / f"{row}.jpg", "RGB")
        target = tmp_path / "trimaps" / name / f"{row}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(some_images.trimap(row)).save(target)
    data = photos.image_folder(tmp_path)
    assert data.class_names == ("mugs", "spoons", "tea pots")
    sizes = {name: np.bincount(split.labels).tolist() for name, split in data.splits.items()}
    assert sizes == {"train": [6] * 3, "validation": [3] * 3, "test": [3] * 3}
    assert set(np.unique(data.splits["test"].trimap(0))) == {1, 2, 3}
    for file in list((tmp_path / "spoons").glob("*.jpg"))[3:]:
        file.unlink()
    with pytest.raises(InputError, match="3 images; needs at least 4"):
        photos.image_folder(tmp_path)
    with pytest.raises(InputError, match="needs a folder for each of at least two classes"):
        photos.image_folder(tmp_path / "nothing")
