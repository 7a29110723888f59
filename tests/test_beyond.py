"""Choosing images, shifted test images, calibration, copies: what notebooks 10 and 11 measure."""

import numpy as np
import pandas as pd
import pytest

from sdaug_utils import notebooks, params, plan, rates
from sdaug_utils.data import shifts
from sdaug_utils.evidence import claims, figures, likeness, metrics
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.training import runs, selection
from sdaug_utils.training.runs import Run
from sdaug_utils.training.selection import RULES, Candidates
from sdaug_utils.training.trainer import Trainer, results_of

SETS = ("none", *shifts.SHIFTS)


def candidates(features, probabilities=None, label=0, real=None):
    features = np.asarray(features, float)
    if probabilities is None:
        probabilities = np.full((len(features), 2), 0.5)
    real = features[:1] if real is None else np.asarray(real, float)
    return Candidates(features, np.asarray(probabilities), label, real, np.random.default_rng(0))


def line(*places):
    return [[place, 0.0] for place in places]


@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_keeps_as_many_different_images_as_it_is_asked_to(rule):
    rng = np.random.default_rng(1)
    made = candidates(
        rng.normal(size=(30, 8)), rng.dirichlet([1, 1], 30), 1, rng.normal(size=(5, 8))
    )
    for number in (1, 7, 30):
        assert len(set(RULES[rule](made, number).tolist())) == number


def test_chance_depends_on_nothing_but_the_draw():
    first, again = (selection.chance(candidates(line(*range(9))), 4) for _ in range(2))
    assert first.tolist() == again.tolist() != [0, 1, 2, 3]


def test_confidence_keeps_those_whose_class_is_surest():
    shares = np.array([0.1, 0.9, 0.5, 0.7])
    made = candidates(line(0, 1, 2, 3), np.stack([1 - shares, shares], axis=1), label=1)
    assert selection.confidence(made, 2).tolist() == [1, 3]


def test_agreement_takes_others_only_where_too_few_agree():
    shares = np.array([0.1, 0.9, 0.4, 0.7, 0.2])
    made = candidates(line(*range(5)), np.stack([1 - shares, shares], axis=1), label=1)
    assert set(selection.agreement(made, 2)) == {1, 3}
    assert {1, 3} < set(selection.agreement(made, 3))


def test_nearness_is_to_the_real_images():
    made = candidates([[1, 0], [0, 1], [-1, 0], [0.9, 0.1]], real=[[2, 0], [3, 0.1]])
    assert set(selection.nearness(made, 2)) == {0, 3}


def test_diversity_begins_in_the_middle_and_goes_far():
    made = candidates(line(0, 1, 4, 5, 6, 10))
    assert selection.diversity(made, 3).tolist() == [2, 5, 0]


def test_distribution_matches_mean_and_spread():
    rng = np.random.default_rng(0)
    real = rng.normal(2.0, 1.0, size=(50, 1))
    made = np.concatenate([rng.normal(2.0, 1.0, size=(40, 1)), rng.normal(-3.0, 0.1, size=(60, 1))])
    kept = selection.distribution(candidates(made, real=real), 30)
    assert (kept < 40).all()
    assert made[kept].mean() == pytest.approx(real.mean(), abs=0.05)
    assert made[kept].std() == pytest.approx(real.std(), abs=0.05)


def chosen(**more):
    arm = {"technique": "stable-diffusion-prompt", "synthetic_per_class": 2, "chosen_from": 6}
    common = {"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0}
    return Run(**common, **arm, **more)


def test_a_cell_trains_on_what_its_rule_keeps(world):
    confident, any_of_them = chosen(rule="confidence"), chosen(rule="chance")
    assert confident.arm == "stable-diffusion-prompt+confidence"
    trainer = Trainer(world)
    pools = [pool.images() for pool in trainer.pools_of(confident)]
    assert [len(pool) for pool in pools] == [6, 6]
    kept = trainer.kept(confident)
    images, labels = trainer.training_set(confident)
    first = len(runs.real_rows(world, confident))
    every = [image for pool in pools for image in pool]
    assert all(np.array_equal(images[first + i], every[row]) for i, row in enumerate(kept))
    assert labels[first:].tolist() == [row // 6 for row in kept] == [0, 0, 1, 1]
    assert sum(map(len, trainer.features(confident))) == len(images)
    results = results_of(world, [confident, any_of_them])
    assert set(results["rule"]) == {"confidence", "chance"}
    assert set(results["num_synthetic"]) == {4}


def test_only_the_cell_s_own_real_images_judge(world):
    few, many = (
        chosen(rule="confidence"),
        chosen(rule="confidence").model_copy(update={"real_percent": 100}),
    )
    judged = []
    original = selection.RULES["confidence"]

    def noted(made, number):
        judged.append(made.real)
        return original(made, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selection.RULES, "confidence", noted)
        for run in (few, many):
            Trainer(world).kept(run)
    train = world.data.splits["train"]
    for run, of_class in ((few, judged[:2]), (many, judged[2:])):
        rows = runs.real_rows(world, run)
        features = Trainer(world).features_of("train")[rows, 0].numpy()
        for label, real in enumerate(of_class):
            assert np.array_equal(real, features[train.labels[rows] == label])


def test_runs_without_a_rule_are_what_they_were(world):
    plain = chosen().model_copy(update={"chosen_from": 0})
    assert "rule" not in runs.spec(world, plain)["run"]
    assert "chosen_from" not in results_of(world, [plain])


def test_more_cannot_be_kept_than_there_are():
    path = NOTEBOOKS / "10-selection.ipynb"
    values = params.parameters_cell(path)
    for wrong, message in (
        ({"kept_per_class": 300}, "chosen_from: 200"),
        ({"rules": ["confidence", "agreement"]}, "'chance' must be among them"),
        ({"rules": ["chance", "luck"]}, "rules"),
    ):
        with pytest.raises(params.InputError, match=message):
            params.check_notebook("10-selection", values | wrong)


def test_what_lies_beyond_runs_only_where_it_is_asked_for():
    assert [path.stem[:2] for path in notebooks.chosen(None)][-1] == "09"
    assert [path.stem[:2] for path in notebooks.chosen(["10", "11"])] == ["10", "11"]


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
    seconds = rates.rates(world.settings)[1]
    assert found["images"].tolist() == [8, 8, 8]
    assert found["models"].tolist() == [0, 0, 2]
    assert found["sampling"].iloc[1] == pytest.approx(8 * seconds["image by a prompt"])
    assert found["learning"].iloc[2] > 0 == found["learning"].iloc[1]


def test_the_plan_knows_what_is_chosen_from(world):
    p = params.check_notebook(
        "10-selection",
        params.parameters_cell(NOTEBOOKS / "10-selection.ipynb")
        | params.overrides("smoke", "10-selection"),
    )
    [what] = plan.wanted([("10-selection", world, p)]).values()
    # two classes, four images of each; prompts and textual inversion, whose words differ by draw
    assert {len(indices) for indices in what.images.values()} == {4}
    assert sum(run.rule is not None for run in what.runs) == 3 * 2 * 3
    p.check(world)


def test_rules_have_names_in_figures():
    assert figures.label_of("distribution") == "Distribution"
    assert set(figures.RULES) == set(RULES)


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
