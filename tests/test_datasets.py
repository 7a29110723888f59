import shutil

import numpy as np
import pytest

from sdaug_utils import study
from sdaug_utils.data import datasets, images
from sdaug_utils.errors import InputError


@pytest.fixture(scope="module")
def data():
    return datasets.load("fashion-mnist")


def test_splits_have_the_sizes_of_the_study_and_share_no_image(data):
    seen = {}
    for name, per_class in (("train", 100), ("validation", 50), ("test", 200)):
        split = data.splits[name]
        assert np.bincount(split.labels).tolist() == [per_class] * 10
        assert split.load(0).shape == (32, 32, 3)
        assert split.load(0).dtype == np.uint8
        seen[name] = set(images.digests(split.images()))
        assert len(seen[name]) == 10 * per_class
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_every_image_is_a_padded_grey_photograph(data):
    image = data.splits["train"].load(0)
    assert (image[..., 0] == image[..., 2]).all()
    assert image[:2].max() == 0
    assert image[:, -2:].max() == 0
    assert image.max() > 100


@pytest.mark.parametrize("draw", [0, 1, 7])
def test_subsets_are_nested_balanced_and_differ_between_draws(data, draw):
    labels = data.splits["train"].labels
    previous: set[int] = set()
    for percent in (1, 5, 10, 25, 50, 100):
        rows = datasets.subset(labels, percent, draw)
        assert np.bincount(labels[rows]).tolist() == [percent] * 10
        assert previous <= set(rows)
        previous = set(rows)
    assert set(datasets.subset(labels, 5, draw)) != set(datasets.subset(labels, 5, draw + 1))


def test_personalisation_inputs_lie_inside_the_smallest_subset(data):
    labels = data.splits["train"].labels
    for draw in range(3):
        inputs = datasets.personalisation_inputs(labels, 5, draw)
        assert set(np.concatenate(inputs)) == set(datasets.subset(labels, 5, draw))
        assert [set(labels[rows]) for rows in inputs] == [{label} for label in range(10)]


def test_a_percentage_without_images_is_refused(data):
    with pytest.raises(InputError, match="choose at least 1"):
        datasets.subset(data.splits["train"].labels, 0.5)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="data set 'pets'"):
        datasets.load("pets")
    with pytest.raises(InputError, match="class 'hat' is unknown: choose from t-shirt"):
        datasets.load("fashion-mnist", classes=["bag", "hat"])


def test_trimaps_follow_the_silhouette(data):
    split = data.splits["test"]
    some = datasets.load("fashion-mnist", ["bag"])
    bags = np.flatnonzero(split.labels == 8)
    for position in (0, 7):
        image, trimap = split.load(bags[position]), split.trimap(bags[position])
        assert set(np.unique(trimap)) == {1, 2, 3}
        assert image[trimap == 2].mean() < 15 < image[trimap == 1].mean()
        assert (some.splits["test"].trimap(position) == trimap).all()


def test_digits_are_split_without_overlap_and_apart_from_the_corpus():
    digits = datasets.load("digits")
    corpus = set(images.digests(datasets.digits_halves()[0][0]))
    seen = [set(images.digests(digits.splits[name].images())) for name in images.SPLITS]
    assert [len(some) for some in seen] == [400, 100, 901 - 500]
    assert len(set.union(*seen)) == 901
    assert not corpus & set.union(*seen)
    assert np.bincount(digits.splits["train"].labels).tolist() == [40] * 10


def test_restriction_keeps_the_first_images_of_the_classes_asked_for(data):
    some = datasets.load("fashion-mnist", ["bag", "dress"], {"train": 3, "test": 2})
    assert some.class_names == ("bag", "dress")
    assert some.splits["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(some.splits["validation"]) == 100
    bags = np.flatnonzero(data.splits["train"].labels == 8)
    np.testing.assert_array_equal(some.splits["train"].load(2), data.splits["train"].load(bags[2]))


def test_a_damaged_data_file_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(datasets.MINIATURE_DATA, folder)
    monkeypatch.setattr(datasets, "MINIATURE_DATA", folder)
    (folder / "train.png").write_bytes((folder / "train.png").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"train\.png: corrupt"):
        datasets.load("fashion-mnist")
    (folder / "train.png").unlink()
    with pytest.raises(InputError, match=r"train\.png: missing"):
        datasets.load("fashion-mnist")


def test_digits_are_halved_without_overlap():
    (foundation, foundation_labels), (study, study_labels) = datasets.digits_halves()
    assert len(foundation) + len(study) == 1797
    assert foundation.shape[1:] == (32, 32, 3)
    difference = np.bincount(study_labels) - np.bincount(foundation_labels)
    assert set(difference) <= {0, 1}
    assert not set(images.digests(foundation)) & set(images.digests(study))


def test_nothing_is_downloaded_where_shipped_results_are_enough(monkeypatch):
    asked, shipped = [], study.write_config("thesis", from_results=True)[0]

    def load(*_, download, **more):
        asked.append(download)
        raise InputError("not here")

    monkeypatch.setattr(datasets, "load", load)
    for profile in ("thesis", shipped):
        with pytest.raises(InputError, match="not here"):
            study.open_study(profile)
    assert asked == [True, False]
