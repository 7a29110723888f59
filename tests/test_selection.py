"""Rules that choose among synthetic images, and experiment 10."""

import numpy as np
import pytest

from sdaug_utils import notebooks, params, plan
from sdaug_utils.evidence import figures
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.training import runs, selection
from sdaug_utils.training.runs import Run
from sdaug_utils.training.selection import RULES, Candidates
from sdaug_utils.training.trainer import Trainer, results_of


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


def test_the_plan_knows_what_is_chosen_from(world):
    p = params.check_notebook(
        "10-selection",
        params.parameters_cell(NOTEBOOKS / "10-selection.ipynb")
        | params.notebook_section("smoke", "10-selection"),
    )
    [what] = plan.wanted([("10-selection", world, p)]).values()
    # two classes, four images of each; prompts and textual inversion, whose words differ by draw
    assert {len(indices) for indices in what.images.values()} == {4}
    assert sum(run.rule is not None for run in what.runs) == 3 * 2 * 3
    p.check(world)


def test_rules_have_names_in_figures():
    assert figures.label_of("distribution") == "Distribution"
    assert set(figures.RULES) == set(RULES)
