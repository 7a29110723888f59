import numpy as np
import pandas as pd
import pytest
import scipy
from sklearn.metrics import jaccard_score

from sdaug_utils.evidence import metrics
from sdaug_utils.evidence.metrics import estimate, paired_difference
from sdaug_utils.training.segmenter import jaccard


def planted(accuracy, num_draws=3, num_seeds=2, num_images=2000, seed=0, spread=0.0):
    rng = np.random.default_rng(seed)
    levels = accuracy + spread * rng.standard_normal((num_draws, 1, 1))
    return rng.random((num_draws, num_seeds, num_images)) < levels


def test_the_interval_is_that_of_a_binomial_when_draws_do_not_differ():
    values = np.repeat(planted(0.7, num_draws=1, num_seeds=1), 3, axis=0)
    result = estimate(values)
    half_width = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert result.mean == pytest.approx(values.mean())
    assert result.high - result.low == pytest.approx(2 * half_width, rel=0.15)
    assert result.low < result.mean < result.high
    assert result.num_runs == 3


def test_intervals_hold_the_truth_as_often_as_they_say():
    """With three draws whose differences dominate: the hard case, where a bootstrap fails."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        luck = rng.random((1, 1, 300))
        values = luck < 0.7 + 0.04 * rng.standard_normal((3, 1, 1))
        result = estimate(values)
        held += result.low <= 0.7 <= result.high
    assert 90 <= held <= 100


def test_draws_that_differ_widen_the_interval():
    same, different = planted(0.7), planted(0.7, spread=0.05)
    widths = [e.high - e.low for e in (estimate(same), estimate(different))]
    assert widths[1] > 1.5 * widths[0]


def test_draws_and_images_are_told_apart_by_their_mean_squares():
    """Planted: draws 0.02, images 0.3, luck 0.1; one mean over 400 images and 30 draws of each."""
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        scores = 0.02 * rng.standard_normal((30, 1)) + 0.3 * rng.standard_normal(400)
        spread = metrics.components(scores + 0.1 * rng.standard_normal(scores.shape))
        found.append((spread.of_draws, spread.of_images))
    of_draws, of_images = np.mean(found, axis=0)
    assert of_draws == pytest.approx(0.02**2 + 0.1**2 / 400, rel=0.15)
    assert of_images == pytest.approx(0.3**2 / 400, rel=0.15)


def test_the_p_value_is_that_of_the_interval():
    """And, of a single score per draw, SciPy's."""
    values = np.random.default_rng(0).normal(0.5, 0.1, (6, 2, 300))
    found = metrics.estimate(values)
    assert found.p_value(found.low) == pytest.approx(0.05)
    assert found.p_value(found.high) == pytest.approx(0.05)
    assert found.p_value(found.low, side=1) == pytest.approx(0.025)
    assert found.p_value(found.low, side=-1) == pytest.approx(0.975)
    assert found.p_value(found.mean) == 1
    scores = np.array([0.1, 0.2, 0.3, 0.25])
    one = metrics.estimate(scores.reshape(-1, 1, 1))
    assert one.p_value(0) == pytest.approx(scipy.stats.ttest_1samp(scores, 0).pvalue)


def test_a_detectable_difference_is_found_four_times_in_five():
    rng, num_draws, spread = np.random.default_rng(1), 6, 0.04
    values = spread * rng.standard_normal((2000, num_draws))
    planted_error = metrics.Spread(spread**2, 0.0)
    known = metrics.Estimate(0, 0, 0, num_draws, num_draws, 1, planted_error)
    difference = known.detectable()
    found = scipy.stats.ttest_1samp(values + difference, 0, axis=1).pvalue < 0.05
    assert 0.75 < found.mean() < 0.87


def test_pairing_removes_what_the_arms_share():
    first = planted(0.7, num_draws=5, spread=0.05)
    rng = np.random.default_rng(1)
    second = first & (
        rng.random(first.shape) > 0.02
    )  # the same runs, two points of a hundred worse
    difference = paired_difference(first, second)
    assert 0.005 < difference.low < difference.mean < difference.high < 0.025
    unpaired = estimate(first)
    assert difference.high - difference.low < (unpaired.high - unpaired.low) / 3


def test_intervals_are_the_same_every_time():
    assert estimate(planted(0.6)) == estimate(planted(0.6))


def test_unpaired_runs_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(planted(0.7), planted(0.7, num_draws=2))


def test_a_single_score_per_draw_has_students_interval():
    values = np.array([0.1, 0.2, 0.3, 0.2]).reshape(4, 1, 1)
    result = estimate(values)
    half = 3.182 * np.std([0.1, 0.2, 0.3, 0.2], ddof=1) / 2
    assert (result.low, result.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-3)


def test_jaccard_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (5, 8, 8))
    truth[4] = 1  # an image with one class only
    guess = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 3, truth.shape))
    weighted, mean = jaccard(guess, truth, 3)
    for i in range(5):
        pair = truth[i].ravel(), guess[i].ravel()
        assert weighted[i] == pytest.approx(jaccard_score(*pair, average="weighted"))
        assert mean[i] == pytest.approx(jaccard_score(*pair, average="macro"))


def test_attributes_measure_what_their_words_say():
    plain = np.zeros((32, 32, 3), np.uint8)
    plain[8:24, 8:24] = 100
    bright, large, patterned = plain * 2, np.zeros_like(plain), plain.copy()
    large[4:28, 4:28] = 100
    patterned[8:24:2, 8:24] = 200
    typical = metrics.typical_attributes([plain, plain, plain])
    assert metrics.obeys(bright, "bright", typical)
    assert not metrics.obeys(bright, "dark", typical)
    assert metrics.obeys(large, "large", typical)
    assert metrics.obeys(patterned, "patterned", typical)
    assert not metrics.obeys(plain, "patterned", typical)


def test_diversity_is_nothing_among_copies_and_one_among_strangers():
    assert metrics.diversity(np.ones((3, 4))) == pytest.approx(0)
    assert metrics.diversity(np.eye(3)) == pytest.approx(1)
    assert metrics.similarity(np.eye(2), -np.eye(2)).tolist() == [[-1, 0], [0, -1]]


@pytest.mark.parametrize(
    ("num_draws", "least", "most"), [(6, 0.935, 0.965), (3, 0.91, 0.955), (2, 0.85, 0.92)]
)
def test_intervals_hold_what_they_promise_with_draws_enough(num_draws, least, most):
    """Draws vary by 2.2 points, the mean of the test images by 0.8: about as in experiment 03."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        draws = rng.normal(0, 0.022, (num_draws, 1, 1))
        images = rng.normal(0, 0.16, (1, 1, 400))
        result = estimate(draws + images + rng.normal(0, 0.12, (num_draws, 1, 400)))
        held += result.low <= 0 <= result.high
    assert least < held / 2000 < most


def test_gains_over_splits_that_overlap_have_the_corrected_interval():
    """Nadeau and Bengio (2003), by hand for three splits."""
    gains = (0.10, 0.14, 0.09)
    rows = [
        {"split": n, "arm": arm, "updates": updates, "accuracy": accuracy}
        for n, gain in enumerate(gains)
        for arm, updates, accuracy in (("baseline", 4, 0.5), ("copies", 44, 0.5 + gain))
    ]
    [found] = metrics.resplit_gains(pd.DataFrame(rows)).to_dict("records")
    half = 4.302653 * np.sqrt(7.0 * (1 / 3 + 1))  # the 97.5 % quantile; the variance of 10, 14, 9
    assert found["points"] == pytest.approx(11)
    assert found["points_low"] == pytest.approx(11 - half, abs=1e-5)
    assert found["points_high"] == pytest.approx(11 + half, abs=1e-5)
    assert (found["arm"], found["baseline_updates"], found["updates"]) == ("copies", 4, 44)
    assert (found["splits"], found["baseline_accuracy"]) == (3, 0.5)
