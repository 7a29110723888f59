"""Features: computed once, kept, the same whoever computes them."""

import numpy as np
import pytest
import torch
from torch import nn

from sdaug_utils.data.images import Images, ImageSource
from sdaug_utils.store import array_digest
from sdaug_utils.training import features


def images_of(arrays, name):
    """Arrays as a lazy sequence that belongs to something."""
    return Images(
        tuple(
            ImageSource(arrays.__getitem__, lambda i: array_digest(arrays[i]), i, name)
            for i in range(len(arrays))
        )
    )


def test_features_are_computed_once(world, monkeypatch):
    images = world.data.splits["train"].images(range(4))
    first = features.image_features(world, images, "custom", num_views=2)
    assert first.shape == (4, 2, 1280)
    assert not torch.equal(first[:, 0], first[:, 1])
    monkeypatch.setattr(features, "load_backbone", lambda name: None)
    again = features.image_features(world, images[::-1], "custom", num_views=2)
    assert torch.equal(again, first.flip(0))
    arrays = list((world.store.root / "features").glob("*/*.npz"))
    assert len(arrays) == 2  # one for each block of views
    for array in arrays:
        with np.load(array) as kept:
            assert kept["vectors"].shape == (4, 1, 1280)
    assert features.have_features(world, images) is False  # of the images as they are


def test_more_views_of_an_image_begin_with_the_fewer(world, monkeypatch):
    images, computed = world.data.splits["train"].images(range(3)), []
    compute = features._compute
    monkeypatch.setattr(
        features,
        "_compute",
        lambda *arguments: (
            computed.append((arguments[4], len(arguments[5]))) or compute(*arguments)
        ),
    )
    few = features.image_features(world, images, "custom", num_views=2)
    more = features.image_features(world, images[:2], "custom", num_views=7)
    assert more.shape == (2, 7, 1280)
    assert torch.equal(more[:, :2], few[:2])
    assert computed == [(range(1), 3), (range(1, 2), 3), (range(2, 4), 2), (range(4, 8), 2)]
    assert len({array_digest(view.numpy()) for view in more[0]}) == 7


def test_what_is_there_is_not_read_to_be_prepared(world, monkeypatch):
    images, computed = world.data.splits["train"].images(range(3)), []
    wanted = features.image_features(world, images, "custom", num_views=4)
    monkeypatch.setattr(features, "_read", lambda *_: pytest.fail("features were read"))
    features.fill(world, images, "custom", num_views=4)
    features.fill(world, images[:2], "custom", num_views=1)
    monkeypatch.undo()
    compute = features._compute
    monkeypatch.setattr(
        features, "_compute", lambda *given: computed.append(given[4:]) or compute(*given)
    )
    more = world.data.splits["train"].images(range(5))
    features.fill(world, more, "custom", num_views=2)
    assert computed == [(range(1), [3, 4]), (range(1, 2), [3, 4])]
    found = features.image_features(world, more, "custom", num_views=2)
    assert len(computed) == 2
    assert torch.equal(found[:3], wanted[:, :2])


def test_features_are_kept_by_the_whole_name_of_their_weights(world, monkeypatch):
    """torchvision's names begin alike."""
    images = world.data.splits["train"].images(range(2))
    features.image_features(world, images)
    assert features.have_features(world, images)
    name = world.settings.classifier.backbone
    other = features.BACKBONES[name][:-1] + "x"
    monkeypatch.setitem(features.BACKBONES, name, other)
    assert not features.have_features(world, images)


def test_features_grow_with_their_pool_and_follow_its_images(world):
    few, more = (world.data.splits["train"].images(range(n)) for n in (2, 5))
    first = features.image_features(world, few)
    assert torch.equal(features.image_features(world, more)[:2], first)
    kept = sorted((world.store.root / "features").glob("*/*.npz"))
    assert [len(np.load(array)["vectors"]) for array in kept] in ([2, 3], [3, 2])
    features.image_features(world, few)
    assert sorted((world.store.root / "features").glob("*/*.npz")) == kept
    anew = images_of([world.data.splits["train"].load(7), few[1]], few.items[0].group)
    again = features.image_features(world, anew)
    assert torch.equal(again[1], first[1])
    assert not torch.equal(again[0], first[0])


def test_features_do_not_depend_on_what_else_is_computed(world):
    images = world.data.splits["train"].images(range(3))
    alone = features.image_features(world, images[2:])
    together = features.image_features(world, images)
    assert torch.allclose(together[2:], alone, atol=1e-5)


def test_the_backbone_knows_imagenet():
    """Weights from another package: an exact load must give useful features, not noise."""
    backbone = features.load_backbone("efficientnet-lite0")
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = backbone(features.normalise(noise, backbone))
    assert found.shape == (2, 1280)
    assert found.std() > 0.1


def test_folding_batchnorm_changes_features_by_rounding_alone():
    pixels = torch.rand(4, 3, 32, 32)
    plain, folded = (
        load("efficientnet-lite0") for load in (features.load_backbone, features.folded_backbone)
    )
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms
    with torch.no_grad():
        assert torch.allclose(plain(pixels), folded(pixels), atol=1e-4)


def test_pixels_are_grey_and_of_one_scale():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (40, 32, 3), dtype=np.uint8), np.full((8, 8, 3), 7, np.uint8)]
    vectors = features.pixel_vectors(images)
    assert vectors.shape == (2, 1, 28 * 28)
    assert vectors[0].mean().item() == pytest.approx(0, abs=1e-5)
    assert vectors[0].std().item() == pytest.approx(1, abs=1e-5)
    assert not vectors[1].any()
    brighter = [images[0] // 2 + 100]
    assert torch.corrcoef(torch.cat([vectors[0], features.pixel_vectors(brighter)[0]]))[0, 1] > 0.99
