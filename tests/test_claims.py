import numpy as np
import pandas as pd
import pytest

from sdaug_utils.evidence import claims, figures, metrics, report
from sdaug_utils.training import runs

PETS = "oxford-iiit-pet"
NAME = "03-training-percentage"
COLUMNS = {
    *(*runs.SETTING, *claims.MORE_KEYS),
    *("augmentation", "technique", "rule", "weight", "reduce"),
}
ARMS = (
    "baseline",
    "custom",
    "autoaugment",
    "randaugment",
    "dreambooth",
    "textual-inversion",
    "stable-diffusion-prompt",
)
PROMPTS = "stable-diffusion-prompt"


def planted_results(accuracies, protocol="controlled", num_draws=3, num_seeds=2):
    """Runs with given true accuracies, {(arm, percent): accuracy}."""
    rng = np.random.default_rng(0)
    luck = rng.random((num_draws, num_seeds, 4000))  # shared by all arms, as test images are
    rows = [
        {
            "task": "classification",
            "protocol": protocol,
            "arm": arm,
            "real_percent": percent,
            "synthetic_per_class": 50 * (arm in ARMS[4:]),
            "draw": draw,
            "seed": seed,
            "num_updates": 100,
            "scores": luck[draw, seed] < accuracy,
            "validation_score": accuracy,
        }
        for (arm, percent), accuracy in accuracies.items()
        for draw in range(num_draws)
        for seed in range(num_seeds)
    ]
    return pd.DataFrame(rows)


def as_in_the_thesis():
    """Accuracies for which every claim of section 4.3.3 holds."""
    synthetic = dict(zip(ARMS[4:], (0.05, 0.12, 0.12), strict=True))
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


def interval(low, high):
    """An estimate with a given interval, by test images alone: a normal distribution's."""
    spread = metrics.Spread(0.0, ((high - low) / 2 / 1.959964) ** 2)
    return metrics.Estimate((low + high) / 2, low, high, 6, 6, 500, spread)


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
        (-0.05, 0.009, "at most", "supported"),
        (-0.05, 0.02, "at most", "inconclusive"),
        (0.011, 0.02, "at most", "contradicted"),
    ],
)
def test_verdicts(low, high, expect, expected):
    judged = claims.verdict(interval(low, high), expect, 0.01)
    assert judged == expected
    decided = min(claims.p_values(interval(low, high), expect, 0.01)) <= 0.05
    assert decided == (judged != "inconclusive")


def test_that_there_is_nothing_takes_two_one_sided_tests():
    """By hand: 90 % of a normal distribution lie within 1.645 standard errors, 95 % in 1.960."""
    half = 0.01 * 1.8  # a standard error of 0.01: the margin lies between the two
    for expect in ("within", "at most"):
        assert claims.verdict(interval(-0.0196, 0.0196), expect, half) == "supported"
        assert claims.verdict(interval(-0.0196, 0.0196), expect, 0.016) == "inconclusive"
    assert claims.verdict(interval(-0.0196, 0.0196), "above") == "inconclusive"
    assert claims.verdict(interval(0.018 - 0.0196, 0.018 + 0.0196), "above") == "inconclusive"
    assert claims.verdict(interval(0.018, 0.018 + 2 * 0.0196), "within", 0.017) == "contradicted"


def test_an_open_comparison_says_what_it_would_have_found():
    """Standard error 0.01: 80 % power for 1.96 + 0.84 of them, for 1.645 + 0.84 of equivalence."""
    found = claims.detectable(interval(0.01 - 0.0196, 0.01 + 0.0196), "above")
    assert found == pytest.approx(0.0280, abs=1e-4)
    found = claims.detectable(interval(-0.0196, 0.0196), "within", 0.01)
    assert found == pytest.approx(0.0249, abs=1e-4)


def test_holm_takes_the_smallest_first_and_never_turns_back():
    """Against Holm's own steps: 0.01 · 4, 0.02 · 3, then 0.03 · 2 may not fall below, 0.5."""
    table = pd.DataFrame(
        {
            "id": ["a", "b", "b", "c", "d", "e"],
            "primary": [True, True, False, True, True, True],
            "p_value": [0.02, 0.01, 1e-9, 0.5, 0.025, np.nan],
            "comparison_verdict": ["supported"] * 3 + ["inconclusive", "supported", "not tested"],
            "verdict": ["supported"] * 3 + ["inconclusive", "supported", "not tested"],
        }
    )
    adjusted = claims.holm(table)
    assert adjusted["p_holm"][[0, 1, 3, 4]].tolist() == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert adjusted["verdict_holm"].tolist() == [
        *("inconclusive", "supported", "supported", "inconclusive", "inconclusive", "not tested")
    ]


def test_holm_of_a_claim_of_several_parts():
    """All must hold: the larger p counts; one that falls is enough: the smaller, times two."""
    parts = pd.DataFrame(
        {
            "id": ["a", "a", "b", "b"],
            "primary": True,
            "p_value": [0.001, 0.02, 0.001, 0.7],
            "comparison_verdict": ["supported", "supported", "contradicted", "inconclusive"],
            "verdict": ["supported", "supported", "contradicted", "contradicted"],
        }
    )
    assert claims.holm(parts)["p_holm"].tolist() == [0.02, 0.02, 0.004, 0.004]


def test_the_primary_comparison_decides():
    accuracies = as_in_the_thesis()
    accuracies["custom", 100] = 0.5  # shown beside: RandAugment alone decides claim 03-j
    judged = claims.judge(planted_results(accuracies), NAME)
    rows = judged[judged["id"] == "03-j"]
    assert rows["primary"].tolist() == [True, *[False] * (len(rows) - 1)]
    assert set(rows["verdict"]) == {"supported"}
    assert "contradicted" in set(rows["comparison_verdict"])


def test_one_fallen_part_fells_a_claim():
    assert claims.all_of(["supported", "supported"]) == "supported"
    assert claims.all_of(["supported", "inconclusive"]) == "inconclusive"
    assert claims.all_of(["inconclusive", "contradicted", "supported"]) == "contradicted"
    assert claims.all_of(["not tested", "supported"]) == "inconclusive"
    assert claims.all_of(["not tested"]) == "not tested"


def test_results_like_the_thesis_support_every_claim():
    judged = claims.judge(planted_results(as_in_the_thesis()), NAME)
    assert list(dict.fromkeys(judged["id"])) == [f"03-{letter}" for letter in "abcdefghijkl"]
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


def test_claims_without_runs_are_not_tested():
    accuracies = {key: value for key, value in as_in_the_thesis().items() if key[1] == 10}
    judged = claims.judge(planted_results(accuracies), NAME)
    tested = judged[judged["verdict"] != "not tested"]
    assert list(dict.fromkeys(tested["id"])) == ["03-d", "03-e", "03-f", "03-l"]
    [_, at_10] = judged[judged["id"] == "03-l"].to_dict("records")  # a part of it, at 5 %, is not
    assert (at_10["comparison_verdict"], at_10["verdict"]) == ("supported", "inconclusive")
    assert judged[judged["verdict"] == "not tested"]["difference"].isna().all()


def by_count(counts, accuracy, validation=None):
    """Runs of one technique at 5 % real with accuracy as a function of the number of images."""
    parts = []
    for count in counts:
        runs = planted_results({("dreambooth", 5): accuracy(count)})
        seen = (validation or accuracy)(count)
        parts.append(runs.assign(synthetic_per_class=count, validation_score=seen))
    return pd.concat([*parts, planted_results({("baseline", 5): 0.5})])


def test_the_best_setting_is_chosen_on_validation():
    results = by_count([5, 10], lambda n: {5: 0.8, 10: 0.6}[n], lambda n: {5: 0.6, 10: 0.7}[n])
    selector = {"arm": "dreambooth", "real_percent": 5, "reduce": "best"}
    [(weight, array)] = claims.terms(results, selector)
    assert weight == 1
    assert array.mean() == pytest.approx(0.6, abs=0.02)


def test_a_slope_is_per_doubling_and_a_trend_per_step():
    results = by_count([5, 10, 20, 40], lambda n: 0.5 + 0.03 * np.log2(n / 5))
    selector = {"arm": "dreambooth", "reduce": "slope over synthetic_per_class"}
    difference = claims.compared(results, {"first": selector})
    assert difference.low < 0.03 < difference.high
    assert difference.mean == pytest.approx(0.03, abs=0.004)
    some = {**selector, "synthetic_per_class": {"from": 10, "to": 20}}
    assert len(claims.terms(results, some)) == 2
    with pytest.raises(KeyError, match="needs two points"):
        claims.terms(results, {**selector, "synthetic_per_class": {"from": 40}})
    with pytest.raises(KeyError, match="no run"):
        claims.terms(results, {**selector, "synthetic_per_class": {"from": 80}})
    linear = by_count([1, 2, 3, 4], lambda n: 0.5 + 0.02 * n)
    trend = {"arm": "dreambooth", "reduce": "trend over synthetic_per_class"}
    assert claims.compared(linear, {"first": trend}).mean == pytest.approx(0.02, abs=0.004)


def test_weighted_terms_add_up():
    results = by_count([5, 10], lambda n: 0.6)
    half_way = {
        "terms": [
            {"weight": 1, "arm": "dreambooth", "reduce": "best"},
            {"weight": -0.5, "arm": "dreambooth", "reduce": "best"},
            {"weight": -0.5, "arm": "baseline"},
        ]
    }
    assert claims.compared(results, half_way).mean == pytest.approx(0.05, abs=0.01)


def test_every_claim_of_the_data_is_well_formed():
    ids = set()
    numbers = [f"{number:02d}" for number in range(1, 12)]
    for number in (*numbers, "X", "Y"):
        for claim in claims.read_claims(number):
            ids.add(claim["id"])
            is_beyond = number in ("10", "11", "Y")
            assert claim["section"].startswith("4.3.") != is_beyond
            for comparison in claim["comparisons"]:
                claims.region(comparison["expect"], comparison.get("margin", 0))
                assert ("terms" in comparison) != ("first" in comparison)
                for selector in comparison.get("terms") or [comparison["first"]]:
                    named = selector.get("arm", [])
                    names = [named] if isinstance(named, str) else named
                    assert all(figures.label_of(name) for name in names)
                    assert set(selector) <= COLUMNS
    assert len(ids) == 36 + 4 + 8


ROWS = {"02-a": "input_set", "03-g": "real_percent", "06-b": "real_percent"}
ROWS |= {"04-d": "arm", "07-a": "real_percent", "08-a": "real_percent"}


@pytest.mark.parametrize(("name", "column"), ROWS.items())
def test_settings_that_differ_have_a_row_each(name, column):
    [claim] = [one for one in claims.read_claims(name) if one["id"] == name]
    primary = [one for one in claim["comparisons"] if one["primary"]]
    values = [one["first"][column] for one in primary]
    assert len(set(values)) > 1
    assert not any(isinstance(value, list) for value in values)
    bounds = {(one["expect"], one.get("margin")) for one in primary}
    assert len(primary) == len(set(values)) * len(bounds)


def test_subjects_are_pairs_too():
    rng = np.random.default_rng(0)
    levels = rng.random(6)
    rows = [
        {"arm": arm, "num_inputs": n, "measure": "in_context", "draw": draw, "seed": 0}
        | {"scores": np.array([levels[draw] + 0.1 * (n == 5) + 0.01 * rng.random()])}
        for arm in ("dreambooth", "textual-inversion")
        for n in (1, 5)
        for draw in range(6)
    ]
    judged = claims.judge(pd.DataFrame(rows), "01-number-of-images").set_index("comparison")
    row = judged[(judged["id"] == "01-a") & judged["primary"]].iloc[0]
    assert row["verdict"] == "supported"
    assert row["low"] < 0.1 < row["high"]
    assert row["num_draws"] == 6


def test_published_values_are_the_thesis_own():
    published = claims.published_results(PETS)
    assert not published["run"].duplicated().any()
    assert not published["value"].isna().any()
    assert not {"041", "079"} & set(published["run"])  # trained without any synthetic image
    third = published[published["experiment"] == NAME]
    values = third.set_index(["technique", "real_percent"])["value"]
    assert len(values) == 35
    assert values["baseline", 5] == pytest.approx(0.6238, abs=1e-4)
    assert values["textual-inversion", 5] == pytest.approx(0.7431, abs=1e-4)
    food = claims.published_results("food-101")
    assert len(food) == 7
    assert not {"122", "123"} & set(food["run"])  # without any, and with almost none


def test_published_curves_have_the_columns_of_ours():
    table = claims.published_settings(["controlnet-segmentation", "baseline"], PETS, "segmentation")
    assert set(table["arm"]) == {"controlnet-segmentation", "baseline"}
    assert len(table) == 8
    assert table["score"].between(0.8, 0.9).all()


def test_combinations_are_paired_and_stand_beside_table_4_4():
    setting = {"real_percent": 5, "synthetic_per_class": 50, "technique": "textual-inversion"}
    without = planted_results({("textual-inversion", 5): 0.7}).assign(**setting)
    with_it = planted_results({("textual-inversion+randaugment", 5): 0.68}).assign(**setting)
    results = pd.concat(
        [without.assign(augmentation="none"), with_it.assign(augmentation="randaugment")]
    )
    by = ["technique", "real_percent", "synthetic_per_class", "augmentation"]
    plain, row = claims.gains(results, by, {"augmentation": "none"}, PETS).to_dict("records")
    assert plain["gain_points"] == 0
    assert row["published_gain_relative"] == pytest.approx(-1.83, abs=0.01)
    assert row["gain_points"] == pytest.approx(-2, abs=0.5)
    assert row["gain_points_low"] < row["gain_points"] < row["gain_points_high"]


def test_summary_puts_published_beside_reproduced():
    accuracies = as_in_the_thesis()
    table = claims.gains(planted_results(accuracies), dataset=PETS).set_index(
        ["arm", "real_percent"]
    )
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
    table = claims.gains(results, ["protocol", "arm"], {"arm": "baseline"})
    found = table.set_index(["arm", "protocol"])["gain_points"]["dreambooth"]
    assert found.to_dict() == {name: pytest.approx(100 * x, abs=1) for name, x in gains.items()}
    renamed = results.assign(arm=results["arm"].replace("dreambooth", PROMPTS))
    [change] = claims.judge(renamed, "X-b").to_dict("records")
    assert change["low"] < 0.15 < change["high"]


def test_gains_of_two_budgets_are_compared_draw_by_draw():
    prompts = PROMPTS
    accuracy = {("baseline", 10): 0.5, ("baseline", 90): 0.6, (prompts, 10): 0.6}
    accuracy[prompts, 90] = 0.65  # it learns for longer
    curve = pd.DataFrame(
        [
            {"arm": arm, "step": step, "draw": draw, "test_accuracy": value + 0.01 * draw}
            for (arm, step), value in accuracy.items()
            for draw in (2, 0, 1)
        ]
    )
    runs = claims.at_budgets(curve, 10, 90)
    gains = claims.gains(runs, ["arm", "budget"], {"arm": "baseline"})
    gains = gains.set_index(["arm", "budget"])["gain_points"]
    assert gains[prompts].round(6).to_dict() == {"own": 15.0, "many": 5.0, "few": 10.0}
    first, beside = claims.judge(runs, "X-c").to_dict("records")
    assert first["difference"] == pytest.approx(0.1)
    assert beside["difference"] == pytest.approx(0.05)
    assert (first["id"], first["verdict"]) == ("X-c", "contradicted")
    assert (first["primary"], beside["primary"]) == (True, False)


def test_nothing_is_judged_against_a_baseline_at_chance():
    results = pd.concat(
        planted_results({("baseline", 5): base, ("stable-diffusion-prompt", 5): 0.5}, protocol)
        for protocol, base in (("published", 0.1), ("controlled", 0.4))
    )
    results["predictions"] = [np.arange(10)] * len(results)  # ten classes
    [row] = claims.judge(results, "X-b").to_dict("records")
    assert row["difference"] == pytest.approx(0.3, abs=0.02)
    assert row["verdict"] == "not tested"
    judged = claims.judge(results[results["protocol"] == "controlled"], NAME).set_index("id")
    assert judged.loc["03-c", "verdict"] == "supported"


def test_deviations_tell_draws_from_seeds():
    """Planted: 3 points between draws, 1 between seeds; over eight draws, an arm against itself."""
    rng, rows = np.random.default_rng(0), []
    for draw in range(40):
        of_draw = 0.03 * rng.standard_normal()
        for seed in range(3):
            gain = of_draw + 0.01 * rng.standard_normal()
            for arm, score in (("baseline", 0.5), ("dreambooth", 0.5 + gain)):
                setting = {"real_percent": 5, "synthetic_per_class": 3 * (arm != "baseline")}
                scores = np.full(50, score)
                rows.append({"arm": arm, **setting, "draw": draw, "seed": seed, "scores": scores})
    [found] = report.deviations(pd.DataFrame(rows)).to_dict("records")
    assert found["draw"] == pytest.approx(3, rel=0.3)
    assert found["seed"] == pytest.approx(1, rel=0.2)
    assert found["test images"] == 0
    assert report.deviations(pd.DataFrame(rows).assign(real_percent=0)).empty
