"""Augmented views: seeded, of the size asked for."""

import numpy as np
import pytest
import torch

from sdaug_utils.data import augment


@pytest.mark.parametrize("name", ["none", "custom", "autoaugment", "randaugment"])
def test_views_are_seeded_and_of_the_size_asked_for(world, name):
    image = world.data.splits["train"].load(0)
    transform = augment.build(name, 48)
    state = torch.random.get_rng_state()
    views = [augment.view(image, transform, seed) for seed in (1, 1, *range(2, 12))]
    assert views[0].shape == (48, 48, 3)
    np.testing.assert_array_equal(views[0], views[1])
    assert any((view != views[0]).any() for view in views) == (name != "none")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["custom", "autoaugment", "randaugment"])
def test_a_view_seeds_no_gpu(monkeypatch, name):
    """A GPU's generator draws the dropout: to seed it anew at each image would repeat the mask."""
    for module, function in ((torch.cuda, "manual_seed_all"), (torch, "manual_seed")):
        monkeypatch.setattr(module, function, lambda seed: pytest.fail("all were seeded"))
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    transform, before = augment.build(name, 32), torch.random.get_rng_state()
    assert augment.view(image, transform, 3).shape == (32, 32, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
