"""Shifted test images, and what classifiers make of them."""

import numpy as np
import pandas as pd
import pytest

from sdaug_utils.data import shifts
from sdaug_utils.evidence import claims
from sdaug_utils.training.runs import Run
from sdaug_utils.training.trainer import results_of

SETS = ("none", *shifts.SHIFTS)


def chosen(**more):
    arm = {"technique": "stable-diffusion-prompt", "synthetic_per_class": 2, "chosen_from": 6}
    common = {"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0}
    return Run(**common, **arm, **more)


def test_shifts_change_an_image_each_in_its_way(world):
    test = world.data.splits["test"]
    plain = np.stack(list(test.images())).astype(float)
    for name in shifts.SHIFTS:
        images = shifts.shifted(test, name)
        made = np.stack(list(images)).astype(float)
        assert made.shape == plain.shape
        assert np.array_equal(made, np.stack(list(images)))  # again the same
        assert not set(images.digests()) & set(test.images().digests())
        change = np.abs(made - plain).mean()
        assert 1 < change < 80, name
    dark, flat = (np.stack(list(shifts.shifted(test, n))) for n in ("darkness", "low contrast"))
    assert dark.mean() == pytest.approx(plain.mean() / 2, abs=1)
    assert flat.mean() == pytest.approx(plain.mean(), abs=2)
    assert flat.std() < 0.8 * plain.std()


def test_classifiers_see_shifted_images_and_those_as_they_are(world):
    grid = [chosen().model_copy(update={"seed": seed, "chosen_from": 0}) for seed in (0, 1)]
    plain = results_of(world, grid)
    shifted = [run.model_copy(update={"test_sets": SETS}) for run in grid]
    rows = results_of(world, shifted)
    assert len(rows) == 2 * (1 + len(shifts.SHIFTS))
    same = rows[rows["shift"] == "none"]
    for seed in (0, 1):
        first, second = (x[x["seed"] == seed]["predictions"].iloc[0] for x in (plain, same))
        assert np.array_equal(first, second)
    assert all((c >= 0.5).all() and (c <= 1).all() for c in rows["confidences"])  # two classes
    again = results_of(world, shifted)
    pd.testing.assert_frame_equal(rows, again)


def test_gains_on_shifted_images_are_over_the_baseline_on_the_same(world):
    grid = [
        chosen().model_copy(update={"draw": draw, "chosen_from": 0, **arm})
        for draw in (0, 1)
        for arm in ({}, {"technique": None, "synthetic_per_class": 0})
    ]
    rows = results_of(world, [run.model_copy(update={"test_sets": SETS}) for run in grid])
    table = claims.gains(rows, ["arm", "real_percent", "shift"], {"arm": "baseline"})
    assert len(table) == 2 * (1 + len(shifts.SHIFTS))
    assert (table[table["arm"] == "baseline"]["gain_points"] == 0).all()
    [noisy] = table[(table["arm"] != "baseline") & (table["shift"] == "noise")].to_dict("records")
    own, base = (
        np.mean(
            [s.mean() for s in rows[(rows["arm"] == arm) & (rows["shift"] == "noise")]["scores"]]
        )
        for arm in (noisy["arm"], "baseline")
    )
    assert noisy["score"] == pytest.approx(own)
    assert noisy["gain_points"] == pytest.approx(100 * (own - base))
