import numpy as np
import pandas as pd
import pytest

from sdaug_utils import claims

NAME = "03-training-percentage"
ARMS = (
    "baseline",
    "custom",
    "autoaugment",
    "randaugment",
    "dreambooth",
    "textual-inversion",
    "stable-diffusion-prompt",
)


def planted_results(accuracies, protocol="controlled", num_draws=3, num_seeds=2):
    """Runs with given true accuracies, {(arm, percent): accuracy}."""
    rng = np.random.default_rng(0)
    luck = rng.random((num_draws, num_seeds, 4000))  # shared by all arms, as test images are
    rows = [
        {
            "protocol": protocol,
            "arm": arm,
            "real_percent": percent,
            "draw": draw,
            "seed": seed,
            "num_updates": 100,
            "correct": luck[draw, seed] < accuracy,
        }
        for (arm, percent), accuracy in accuracies.items()
        for draw in range(num_draws)
        for seed in range(num_seeds)
    ]
    return pd.DataFrame(rows)


def as_in_the_thesis():
    """Accuracies for which every claim of section 4.3.3 holds."""
    synthetic = dict(zip(ARMS[4:], (0.05, 0.12, 0.11), strict=True))
    accuracies = {}
    for percent in (100, 50, 25, 10, 5):
        for arm in ARMS:
            gain = 0.0
            if arm in synthetic:
                gain = synthetic[arm] if percent <= 10 else 0.001
            elif arm != "baseline":
                gain = -0.05 if percent <= 10 else 0.02 + 0.02 * (arm == "randaugment")
            accuracies[arm, percent] = 0.7 + gain
    return accuracies


@pytest.mark.parametrize(
    ("low", "high", "expect", "expected"),
    [
        (0.01, 0.03, "above", "supported"),
        (-0.03, -0.01, "above", "contradicted"),
        (-0.01, 0.01, "above", "inconclusive"),
        (-0.03, -0.01, "below", "supported"),
        (0.01, 0.03, "below", "contradicted"),
        (-0.009, 0.009, "within", "supported"),
        (-0.009, 0.02, "within", "inconclusive"),
        (0.011, 0.02, "within", "contradicted"),
        (-0.02, -0.011, "within", "contradicted"),
        (-0.02, 0.02, "within", "inconclusive"),
    ],
)
def test_verdicts(low, high, expect, expected):
    assert claims.verdict(low, high, expect, 0.01 * (expect == "within")) == expected


def test_one_fallen_part_fells_a_claim():
    assert claims.all_of(["supported", "supported"]) == "supported"
    assert claims.all_of(["supported", "inconclusive"]) == "inconclusive"
    assert claims.all_of(["inconclusive", "contradicted", "supported"]) == "contradicted"


def test_results_like_the_thesis_support_every_claim():
    judged = claims.judge(planted_results(as_in_the_thesis()), NAME)
    assert list(dict.fromkeys(judged["id"])) == [f"03-{letter}" for letter in "abcdefghij"]
    assert set(judged["verdict"]) == {"supported"}


def test_the_opposite_contradicts_and_nothing_is_inconclusive():
    accuracies = as_in_the_thesis()
    accuracies["dreambooth", 5] = 0.6
    accuracies["textual-inversion", 10] = accuracies["baseline", 10]
    judged = claims.judge(planted_results(accuracies), NAME)
    verdicts = judged.drop_duplicates("id").set_index("id")["verdict"]
    assert verdicts["03-b"] == "contradicted"
    assert verdicts["03-d"] == "inconclusive"
    assert verdicts["03-a"] == "supported"


def test_claims_without_runs_are_left_out():
    accuracies = {key: value for key, value in as_in_the_thesis().items() if key[1] == 10}
    judged = claims.judge(planted_results(accuracies), NAME)
    assert list(dict.fromkeys(judged["id"])) == ["03-d", "03-e", "03-f"]
    none = claims.judge(planted_results({("baseline", 20): 0.5}), NAME)
    assert none.empty
    assert "verdict" in none


def test_published_values_are_the_thesis_own():
    published = claims.published_results(NAME).set_index(["technique", "real_percent"])["value"]
    assert len(published) == 35
    assert published["baseline", 5] == pytest.approx(0.6238, abs=1e-4)
    assert published["textual-inversion", 5] == pytest.approx(0.7431, abs=1e-4)
    fourth = claims.published_results("04-generation-percentage")
    assert "041" not in set(fourth["run"])  # trained without any synthetic image


def test_summary_puts_published_beside_reproduced():
    accuracies = as_in_the_thesis()
    table = claims.summary(planted_results(accuracies), NAME).set_index(["arm", "real_percent"])
    row = table.loc[("textual-inversion", 5)]
    assert row["published_gain_points"] == pytest.approx(11.92, abs=0.01)
    assert row["published_gain_relative"] == pytest.approx(19.11, abs=0.01)
    assert row["gain_points"] == pytest.approx(12, abs=0.7)
    assert row["gain_points_low"] < row["gain_points"] < row["gain_points_high"]
    assert row["gain_relative"] == pytest.approx(100 * 0.12 / 0.7, abs=1)
    assert (row["num_draws"], row["num_seeds"], row["num_test_images"]) == (3, 2, 4000)
    baseline = table.loc[("baseline", 5)]
    assert baseline["gain_points"] == baseline["gain_points_high"] == 0


def test_gains_of_two_protocols_are_compared():
    gains = {"published": 0.2, "controlled": 0.05}
    results = pd.concat(
        planted_results({("baseline", 5): 0.6, ("dreambooth", 5): 0.6 + gain}, protocol)
        for protocol, gain in gains.items()
    )
    table = claims.compare_protocols(results, "dreambooth", 5).set_index("protocol")
    assert table.loc["published", "gain_points"] == pytest.approx(20, abs=1)
    last = table.loc["published − controlled"]
    assert last["gain_points_low"] < 15 < last["gain_points_high"]
    assert last["gain_points"] == pytest.approx(15, abs=1)
