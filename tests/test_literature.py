"""Techniques that the thesis does not know, as their papers have them."""

from dataclasses import replace

import numpy as np
import pytest

from sdaug_utils import params
from sdaug_utils.data import datasets
from sdaug_utils.errors import InputError
from sdaug_utils.generation import pool_files, pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store


def changed(study, **sections):
    update = {
        name: getattr(study.settings, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return replace(study, settings=study.settings.model_copy(update=update))


def stacked(some):
    return np.stack(list(pool_files.images_of(some))).astype(float)


def test_da_fusion_uses_the_words_of_textual_inversion(world):
    pools.technique_pools(world, "textual-inversion", 0, 1)
    learnt = sorted((world.store.root / "textual-inversion").iterdir())
    made = pools.technique_pools(world, "da-fusion", 0, 4, 50)
    assert sorted((world.store.root / "textual-inversion").iterdir()) == learnt
    assert not (world.store.root / "da-fusion").exists()
    train, allowed = (
        world.data.splits["train"],
        datasets.subset(world.data.splits["train"].labels, 50),
    )
    for label, pool in enumerate(made):
        assert set(pool.source_rows) <= set(allowed)
        assert (train.labels[list(pool.source_rows)] == label).all()


def test_da_fusion_draws_a_strength_for_each_image_whatever_else_is_asked_for(world):
    own = techniques()["da-fusion"]
    fusion = changed(world, da_fusion={"strengths": [0.5, 1.0]})
    drawn = [own.batch_key(fusion.settings, index) for index in range(400)]
    assert 150 < drawn.count(0.5) < 250
    few, many = (
        pools.technique_pools(
            replace(fusion, store=Store(world.store.root / str(count))), "da-fusion", 0, count, 100
        )
        for count in (3, 6)
    )
    for first, second in zip(few, many, strict=True):
        assert first.seeds == second.seeds[:3]
        a, b = stacked([first]), stacked([second])[:3]
        assert np.abs(a - b).mean() < 1  # passes have other images beside them: rounding


def test_less_noise_leaves_more_of_the_image(world):
    distances = []
    for strength in (0.5, 1.0):
        fusion = changed(world, da_fusion={"strengths": [strength]})
        made = pools.technique_pools(fusion, "da-fusion", 0, 4)
        rows = [row for pool in made for row in pool.source_rows]
        real = np.stack(list(world.data.splits["train"].images(rows))).astype(float)
        distances.append(np.abs(stacked(made) - real).mean())
    assert distances[0] < 0.8 * distances[1]


def test_a_strength_that_leaves_no_step_is_refused(world):
    weak = changed(world, da_fusion={"strengths": [0.1]}).settings
    with pytest.raises(InputError, match=r"da_fusion: a strength of 0\.1 leaves none of 2 steps"):
        techniques()["da-fusion"].check(weak)
    weak = changed(world, real_guidance={"strength": 0.1}).settings
    with pytest.raises(InputError, match=r"real_guidance: a strength of 0\.1 leaves none"):
        techniques()["real-guidance"].check(weak)


def test_datadream_learns_a_class_from_all_that_the_subset_has_of_it(world):
    half, whole = (technique_requests(world, "datadream", 0, 1, percent) for percent in (50, 100))
    sizes = {
        label: count for label, count in enumerate(np.bincount(world.data.splits["train"].labels))
    }
    for label in sizes:
        assert len(whole[label].inputs) == sizes[label] == 2 * len(half[label].inputs)
        assert whole[label].model != half[label].model
        assert world.data.class_names[label] in whole[label].spec["prompt"]
    seen = []
    technique = techniques()["datadream"]
    pipeline = pools.loaded(technique, world.settings)
    tokenizer = pipeline.tokenizer
    original = type(tokenizer).__call__

    def noted(self, prompts, *more, **options):
        seen.extend(prompts)
        return original(self, prompts, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tokenizer), "__call__", noted)
        unet = technique.tuned(world, pipeline, half[0])
    assert f"a photo of a {world.data.class_names[0]}" in seen
    assert any("lora_A" in name for name, _ in unet.named_parameters())


def test_personalised_subjects_have_no_images_to_follow():
    with pytest.raises(InputError, match="techniques"):
        params.check_notebook(
            "02-different-subjects",
            params.parameters_cell(
                params.PARAMS_FOLDER.parent / "notebooks/02-different-subjects.ipynb"
            )
            | {"techniques": ["da-fusion"]},
        )


def test_shifted_images_are_tried_where_there_is_a_baseline(world):
    values = params.parameters_cell(NOTEBOOKS / "11-rivals.ipynb")
    values |= params.notebook_section("smoke", "11-rivals")
    elsewhere = params.check_notebook("11-rivals", values | {"shifted_percents": [25]})
    with pytest.raises(InputError, match="shifted_percents: 25 is not among"):
        elsewhere.check(world)
    changes = elsewhere.fitted(world)
    fitting = params.check_notebook("11-rivals", values | changes)
    assert set(fitting.shifted_percents) <= set(fitting.real_percents)
