"""Retrieval: images that are found in a corpus, not made."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdaug_utils import params
from sdaug_utils.data import corpus, datasets
from sdaug_utils.errors import InputError
from sdaug_utils.generation import pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.notebooks import NOTEBOOKS


def test_retrieved_images_are_the_corpus_s_own(world):
    first, second = (pools.technique_pools(world, "retrieval", draw, 5) for draw in (0, 1))
    for label, pool in enumerate(first):
        known = {image.tobytes() for image in corpus.naming("miniature", pool.class_name)}
        assert len(known) == 200
        assert {image.tobytes() for image in pool.images()} <= known
        assert pool.digests != second[label].digests
    study = {image.tobytes() for split in world.data.splits.values() for image in split.images()}
    assert not study & {image.tobytes() for pool in first for image in pool.images()}
    with pytest.raises(InputError, match=r"200 of its captions name 'trouser'"):
        pools.technique_pools(world, "retrieval", 0, 201)


def test_no_image_of_the_corpus_is_as_near_to_the_study_as_its_own_are_to_each_other():
    whole = datasets.load("fashion-mnist")
    study = np.concatenate([np.stack(list(s.images())) for s in whole.splits.values()])
    sample = np.concatenate(
        [np.stack(list(corpus.naming("miniature", name))) for name in whole.class_names]
    )
    study, sample = (
        torch.from_numpy(x[:, 2:-2, 2:-2, 0].reshape(len(x), -1).astype(np.float32)) / 28
        for x in (study, sample)
    )
    among = torch.cdist(study, study).fill_diagonal_(torch.inf)
    assert torch.cdist(sample, study).min() >= among.min() - 0.01


def test_a_folder_with_captions_is_a_corpus(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    listing = tmp_path / "metadata.csv"
    with pytest.raises(InputError, match=r"needs a metadata\.csv with columns file_name and text"):
        corpus.revision(str(tmp_path))
    corpus._listed.cache_clear()
    listing.write_text(
        "file_name,text\n0.png,A red Bag\n1.png,two handbags\n2.png,a bag of crisps\n"
    )
    assert [image[0, 0, 0] for image in corpus.naming(str(tmp_path), "bag")] == [0, 2]
    before = corpus.revision(str(tmp_path))
    corpus._listed.cache_clear()
    corpus.revision.cache_clear()
    listing.write_text("file_name,text\n0.png,a bag\n3.png,a bag\n")
    with pytest.raises(InputError, match=r"3\.png is listed and missing"):
        corpus.revision(str(tmp_path))
    assert before


def test_a_corpus_still_to_be_named_can_be_planned_for_and_not_searched(world, monkeypatch):
    unnamed = world.changed({"retrieval.corpus": None})
    assert technique_requests(unnamed, "retrieval", 0, 500)
    with pytest.raises(InputError, match=r"retrieval\.corpus: null: name a folder"):
        pools.technique_pools(unnamed, "retrieval", 0, 1)
    values = params.parameters_cell(NOTEBOOKS / "11-rivals.ipynb")
    p = params.check_notebook("11-rivals", values | params.notebook_section("smoke", "11-rivals"))
    p.check(unnamed)
    with pytest.raises(InputError, match="or do without 'retrieval'"):
        p.check_techniques(unnamed)
    assert "retrieval" not in p.fitted(unnamed)["techniques"]
    p.check_techniques(world)
