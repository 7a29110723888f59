"""Adding a technique: real guidance, written as a user would, works from params to figure."""

import io
import tokenize

import numpy as np
import pytest
from matplotlib import pyplot as plt
from pydantic import ValidationError

from sdaug_utils import params, plan, units
from sdaug_utils.data import datasets
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import claims, figures
from sdaug_utils.experiments.base import baselines, synthetic
from sdaug_utils.generation import pools
from sdaug_utils.generation.technique import Technique, technique_requests
from sdaug_utils.generation.techniques import real_guidance
from sdaug_utils.registry import TECHNIQUES, techniques
from sdaug_utils.study import Study
from sdaug_utils.training import runs
from sdaug_utils.training.trainer import results_of


def with_strength(study, strength):
    own = study.settings.real_guidance.model_copy(update={"strength": strength})
    settings = study.settings.model_copy(update={"real_guidance": own})
    return Study(study.profile, settings, study.data, study.store)


def test_it_takes_at_most_thirty_lines():
    with open(real_guidance.__file__) as file:
        source = file.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kept = (tokenize.NAME, tokenize.OP, tokenize.STRING, tokenize.NUMBER)
    lines = {line for token in tokens if token.type in kept for line in (token.start[0],)}
    assert len(lines) <= 30


def test_its_parameter_is_checked_and_has_a_default(tmp_path, monkeypatch):
    assert params.load_settings("smoke").real_guidance.strength == 0.5
    text = (params.PARAMS_FOLDER / "smoke.yaml").read_text()
    monkeypatch.setattr(params, "PARAMS_FOLDER", tmp_path)
    for value, message in (("0.2", None), ("1.5", "real_guidance.strength: Input should be less")):
        section = f"  real_guidance:\n    strength: {value}\n  classifier:"
        (tmp_path / "other.yaml").write_text(text.replace("  classifier:", section, 1))
        if message is None:
            assert params.load_settings("other").real_guidance.strength == 0.2
        else:
            with pytest.raises(InputError, match=message):
                params.load_settings("other")


def test_its_images_begin_as_real_ones_of_the_subset(world):
    train = world.data.splits["train"]
    inside = set(datasets.subset(train.labels, 10, 0))
    distances = {}
    for strength in (0.5, 1.0):
        study = with_strength(world, strength)
        made = pools.technique_pools(study, "real-guidance", 0, 4, 10)
        assert {row for pool in made for row in pool.source_rows} <= inside
        distances[strength] = np.mean(
            [
                np.abs(image.astype(int) - train.load(row)).mean()
                for pool in made
                for image, row in zip(pool.images(), pool.source_rows, strict=True)
            ]
        )
    assert distances[0.5] < 0.7 * distances[1.0]
    few, all_of_them = (
        technique_requests(world, "real-guidance", 0, 4, percent)[0] for percent in (10, 100)
    )
    assert few.spec == all_of_them.spec
    assert few.indices != all_of_them.indices


def test_it_goes_from_parameters_to_plan_runs_and_figure(world):
    values = params.parameters_cell(
        params.PARAMS_FOLDER.parent / "notebooks" / "04-generation-percentage.ipynb"
    ) | params.notebook_section("smoke", "04-generation-percentage")
    chosen = {"techniques": ["real-guidance"], "further_numbers": {}, "profile": "smoke"}
    chosen["copies_per_class"] = {10: [1]}
    p = params.check_notebook("04-generation-percentage", values | chosen)
    work = units.Work(plan.units(plan.wanted([("04-generation-percentage", world, p)])))
    # 2 draws, 2 classes: 3 images of every class, and of few real ones others than of all
    counts = {kind: items for kind, (_, items) in work.counts().items()}
    assert counts["images"] == 2 * 2 * (3 + 1 + 1)  # and a copy
    assert counts["models"] == 0
    assert counts["runs"] == 2 * ((1 + 2) * 2 + 1)
    assert work.seconds() > 0
    arms = baselines([10]) + synthetic(["real-guidance"], [(10, [1, 3])])
    results = results_of(world, runs.repeated(arms, "controlled", 2, 1))
    table = claims.gains(results, dataset="oxford-iiit-pet")
    theirs = claims.published_settings(["real-guidance"], "oxford-iiit-pet")
    figure = figures.amounts(theirs, table, [10])
    [ours] = figure.axes  # the thesis has no values of it
    assert {line.get_label() for line in ours.get_lines()} == {"Real guidance", "Baseline"}
    assert "Real guidance" in figures.side_by_side(table).index.get_level_values("arm")
    plt.close(figure)


@pytest.mark.parametrize("percent", [10, 50])
def test_copies_are_the_subset_again_and_nothing_else(world, percent):
    train = world.data.splits["train"]
    made = pools.technique_pools(world, "copies", 1, 12, percent)
    for label, pool in enumerate(made):
        own = [
            row for row in datasets.subset(train.labels, percent, 1) if train.labels[row] == label
        ]
        expected = [train.load(int(own[i % len(own)])) for i in range(12)]
        assert all(np.array_equal(*pair) for pair in zip(pool.images(), expected, strict=True))
    again = pools.technique_pools(world, "copies", 1, 3, percent)
    assert [pool.files for pool in again] == [pool.files[:3] for pool in made]


def test_one_that_is_registered_in_a_notebook_is_known_at_once(world):
    known = dict(techniques())
    with pytest.raises(ValidationError, match="Input should be 'controlnet-canny'"):
        runs.Run(protocol="controlled", real_percent=5, draw=0, seed=0, technique="question")

    class Question(Technique):
        name, label, colour, marker = "question", "With a question", "#777777", "o"

        def subject_word(self, settings, class_name):
            return f"{class_name}?"

    try:
        [first, _] = technique_requests(world, "question", 0, 1)
        assert "photo of a trouser?" in first.spec["prompt"]
        runs.Run(protocol="controlled", real_percent=5, draw=0, seed=0, technique="question")
        assert figures.label_of("question") == "With a question"
    finally:
        TECHNIQUES.pop("question")
    assert techniques() == known


def test_the_readme_shows_it_as_it_is():
    readme = (params.PARAMS_FOLDER.parent / "README.md").read_text()
    with open(real_guidance.__file__) as file:
        assert f"```python\n{file.read().rstrip()}\n```" in readme
