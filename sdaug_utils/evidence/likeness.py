"""How similar a technique's images are to real ones, and to those that they were made from."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sdaug_utils.data.datasets import subset
from sdaug_utils.evidence.metrics import copies, diversity, prdc
from sdaug_utils.generation.pool_files import images_of
from sdaug_utils.generation.pools import technique_pools
from sdaug_utils.study import Study
from sdaug_utils.training.features import feature_arrays


def likeness(
    study: Study, techniques: Sequence[str], num_draws: int, count: int, real_percent: float
) -> pd.DataFrame:
    """Measures of ``count`` images of each class by some techniques, in the backbone's features.

    A row per technique and draw, means over classes, each in 0 to 1 (density may exceed it):
    ``copies``, the share of images nearer to a real one of the subset than that is to any other;
    ``copies_of_real``, the same of real test images, which have copied nothing; ``diversity``; and
    ``precision``, ``recall``, ``density``, ``coverage`` among the real test images.
    """
    train, test, rows = study.data.splits["train"], study.data.splits["test"], []
    real = feature_arrays(study, test.images())[:, 0]
    for technique in techniques:
        for draw in range(num_draws):
            pools = technique_pools(study, technique, draw, count, real_percent)
            made = feature_arrays(study, images_of(pools))[:, 0].reshape(len(pools), count, -1)
            seen = subset(train.labels, real_percent, draw)
            inputs = feature_arrays(study, train.images(seen))[:, 0]
            of_classes = []
            for label, images in enumerate(made):
                own_inputs = inputs[train.labels[seen] == label]
                own_real = real[test.labels == label]
                of_class = {
                    "copies": copies(images, own_inputs),
                    "copies_of_real": copies(own_real, own_inputs),
                    "diversity": diversity(images),
                }
                of_classes.append(of_class | prdc(own_real, images))
            means = pd.DataFrame(of_classes).mean().to_dict()
            rows.append({"arm": technique, "draw": draw, **means})
    return pd.DataFrame(rows)
