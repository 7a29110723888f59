"""How like real images synthetic ones are, what they cost, and what helps."""

import numpy as np
import pandas as pd
import pytest

from sdaug_utils import plan, rates
from sdaug_utils.evidence import claims, likeness, metrics


def test_the_calibration_error_is_how_far_certainty_is_off():
    sure = np.full(1000, 0.9)
    right = np.arange(1000) < 900
    assert metrics.calibration_error(sure, right) == pytest.approx(0)
    assert metrics.calibration_error(sure, np.arange(1000) < 600) == pytest.approx(0.3)
    mixed = np.concatenate([np.full(500, 0.6), np.full(500, 1.0)])
    right = np.concatenate([np.arange(500) < 400, np.arange(500) < 450])  # off by 0.2 and by 0.1
    assert metrics.calibration_error(mixed, right) == pytest.approx(0.15)


def test_prdc_has_the_values_that_its_paper_derives():
    """Naeem et al., 2020: of one distribution, density is 1 on average, coverage 1 - 2**-k."""
    rng, size, k = np.random.default_rng(0), 1500, 5
    real, same = rng.normal(size=(2, size, 16))
    found = metrics.prdc(real, same, k)
    expected = 1 - np.prod([(size - i) / (2 * size - i) for i in range(1, k + 1)])
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["coverage"] == pytest.approx(expected, abs=0.02)
    far = metrics.prdc(real, same + 20, k)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    one_point = metrics.prdc(real, real[:1] + 1e-3 * same, k)  # real, and all alike
    assert one_point["precision"] == 1
    assert one_point["recall"] < 0.02


def test_copies_are_nearer_to_a_known_image_than_that_is_to_others():
    rng = np.random.default_rng(0)
    known = rng.normal(size=(200, 32))
    assert metrics.copies(known + 0.01 * rng.normal(size=known.shape), known) == 1
    fresh = rng.normal(size=(200, 32))
    assert metrics.copies(fresh, known) < 0.7
    half = np.concatenate([known[:100] + 1e-3, fresh[:100] + 30])
    assert metrics.copies(half, known) == pytest.approx(0.5)


def test_likeness_has_a_row_for_each_technique_and_draw(world):
    found = likeness.likeness(world, ["stable-diffusion-prompt", "real-guidance"], 2, 3, 50)
    assert found[["arm", "draw"]].to_numpy().tolist() == [
        ["stable-diffusion-prompt", 0],
        ["stable-diffusion-prompt", 1],
        ["real-guidance", 0],
        ["real-guidance", 1],
    ]
    shares = found.drop(columns=["arm", "draw", "density"])
    assert ((shares >= 0) & (shares <= 1)).all(axis=None)


def test_costs_are_those_of_the_plan(world):
    found = plan.costs(world, ["retrieval", "stable-diffusion-prompt", "dreambooth-lora"], 4, 50)
    seconds = rates.seconds_by_kind(world.settings)
    assert found["images"].tolist() == [8, 8, 8]
    assert found["models"].tolist() == [0, 0, 2]
    assert found["sampling"].iloc[1] == pytest.approx(8 * seconds["image by a prompt"])
    assert found["learning"].iloc[2] > 0 == found["learning"].iloc[1]


def test_one_sentence_says_what_helps():
    rows = [("baseline", 0.5, 0, 0, 0), ("mixup", 0.6, 10, 4, 16), ("cutmix", 0.5, 1, -2, 4)]
    columns = ["arm", "score_low", "gain_points", "gain_points_low", "gain_points_high"]
    gains = pd.DataFrame(rows, columns=columns).assign(real_percent=5.0)
    assert claims.what_helps(gains, 10, str.title) == (
        "At 5 % real images the highest mean has Mixup, +10.0 points [4.0, 16.0]. "
        "Better than real images alone, by their 95 % intervals: Mixup."
    )
    without = claims.what_helps(gains[gains["arm"] != "mixup"], 10, str.title)
    assert "nothing is shown to help: the highest mean has Cutmix, +1.0 points" in without
    assert "at chance" in claims.what_helps(gains, 2, str.title)
