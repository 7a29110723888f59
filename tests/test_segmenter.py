"""Segmenters: torchvision's head on the maps of a stage."""

import pytest
from torch import nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead

from sdaug_utils.training import segmenter


def test_the_segmentation_head_is_torchvisions(world):
    as_there = {"channels": 256, "atrous_rates": [12, 24, 36], "dropout": 0.5}
    settings = world.settings.segmenter.model_copy(update=as_there)
    theirs = DeepLabHead(40, segmenter.NUM_CLASSES, (12, 24, 36))
    assert str(list(segmenter.new_head(40, settings).children())) == str(list(theirs.children()))
    own = segmenter.new_head(40, settings.model_copy(update={"dropout": 0.1}))
    assert [m.p for m in own.modules() if isinstance(m, nn.Dropout)] == [0.1]


@pytest.mark.parametrize(("stage", "channels"), [(1, 24), (2, 40), (3, 112)])
def test_a_stage_says_which_maps_the_segmenter_sees(world, stage, channels):
    maps = segmenter.FeatureMaps(world)
    maps.settings = world.settings.segmenter.model_copy(
        update={"stage": stage, "image_size": 64, "output_stride": 8}
    )
    side = 16 if stage == 1 else 8  # dilation keeps deeper maps at a stride of 8
    made = maps.of(world.data.splits["train"].images(range(2)))([0, 1])
    assert made.shape == (2, channels, side, side)
