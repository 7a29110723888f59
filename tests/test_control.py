import numpy as np
import pytest

from sdaug_utils.data import control


@pytest.fixture
def ring():
    """A grey ring with a dark hole, on black."""
    y, x = np.mgrid[:32, :32] - 15.5
    radius = np.hypot(x, y)
    image = np.zeros((32, 32, 3), np.uint8)
    image[(radius < 12) & (radius > 6)] = 150
    return image


def test_canny_draws_the_outline_in_white(ring):
    edges = control.canny(ring)
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert 0.05 < (edges > 0).mean() < 0.3
    assert control.canny(np.full_like(ring, 90)).max() == 0
    assert control.canny(ring, 64).shape == (64, 64, 3)


def test_a_silhouette_has_no_holes(ring):
    mask = control.silhouette(ring)
    assert mask.dtype == bool
    assert mask[16, 16]
    assert not mask[0, 0]
    assert mask.sum() == pytest.approx(np.pi * 12**2, rel=0.1)
    assert not control.silhouette(np.zeros_like(ring)).any()


def test_a_trimap_has_a_border_around_the_subject(ring):
    mask = control.silhouette(ring)
    labels = control.trimap(mask)
    assert labels[16, 16] == control.SUBJECT
    assert labels[0, 0] == control.BACKGROUND
    border = labels == control.BORDER
    assert (border & mask).any()
    assert (border & ~mask).any()
    assert border.sum() < mask.sum()


def test_a_segmentation_map_has_a_colour_per_label(ring):
    labels = control.trimap(control.silhouette(ring))
    picture = control.segmentation_map(labels)
    assert picture.shape == (32, 32, 3)
    assert control.segmentation_map(labels, 64).shape == (64, 64, 3)
    for label, colour in control.TRIMAP_COLOURS.items():
        assert (picture[labels == label] == colour).all()
