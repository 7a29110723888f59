"""Techniques and mixtures that the thesis does not know, as their papers have them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sdaug_utils import params
from sdaug_utils.data import corpus, datasets
from sdaug_utils.errors import InputError
from sdaug_utils.experiments import base
from sdaug_utils.generation import pool_files, pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.training import classifier, mixing
from sdaug_utils.training.runs import Run, label_weight, spec
from sdaug_utils.training.trainer import Trainer, results_of


def changed(study, **sections):
    update = {
        name: getattr(study.settings, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return replace(study, settings=study.settings.model_copy(update=update))


def stacked(some):
    return np.stack(list(pool_files.images_of(some))).astype(float)


def run(**more):
    return Run(**{"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0, **more})


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


def test_diff_mix_turns_images_of_other_classes_and_mixes_their_labels(world):
    train = world.data.splits["train"]
    allowed = datasets.subset(train.labels, 50)
    made = pools.technique_pools(world, "diff-mix", 0, 3, 50)
    for label, pool in enumerate(made):
        assert set(pool.source_rows) <= set(allowed)
        assert (train.labels[list(pool.source_rows)] != label).all()
    mixed = run(technique="diff-mix", synthetic_per_class=3)
    targets = Trainer(world).targets(mixed)
    assert torch.allclose(targets.sum(dim=1), torch.ones(len(targets)))
    own = 0.7**0.5
    assert targets[-1].tolist() == pytest.approx([1 - own, own])  # a bag that was trousers
    assert set(targets[: len(allowed)].flatten().tolist()) == {0.0, 1.0}
    assert results_of(world, [mixed])["num_synthetic"].tolist() == [6]
    other = changed(world, diff_mix={"gamma": 1.0})
    assert spec(other, mixed) != spec(world, mixed)


def test_other_classes_take_turns_in_the_order_of_the_draw():
    orders = [np.array([0, 1]), np.array([2, 3, 4]), np.array([5])]
    rows = techniques()["diff-mix"].source_order(orders, 0)
    assert rows.tolist() == [2, 5, 3, 4]


def test_mixed_labels_are_refused_where_they_cannot_be(world):
    for own, arm in (
        (run(technique="diff-mix", synthetic_per_class=1, protocol="published"), "diff-mix"),
        (run(augmentation="mixup", protocol="published"), "mixup"),
        (run(augmentation="cutmix", task="segmentation"), "cutmix"),
    ):
        with pytest.raises(InputError, match=f"{arm}: its labels are mixed"):
            base.require_whole_labels(world, [own])
    base.require_whole_labels(world, [run(technique="diff-mix"), run(augmentation="mixup")])


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


def test_retrieved_images_are_the_corpus_s_own(world):
    first, second = (pools.technique_pools(world, "retrieval", draw, 5) for draw in (0, 1))
    for label, pool in enumerate(first):
        known = {image.tobytes() for image in corpus.naming("miniature", pool.class_name)}
        assert len(known) == 200
        assert {image.tobytes() for image in pool.images()} <= known
        assert pool.digests != second[label].digests
    study = {image.tobytes() for split in world.data.splits.values() for image in split.images()}
    assert not study & {image.tobytes() for pool in first for image in pool.images()}
    with pytest.raises(InputError, match=r"200 of its captions name 'trouser'"):
        pools.technique_pools(world, "retrieval", 0, 201)


def test_no_image_of_the_corpus_is_as_near_to_the_study_as_its_own_are_to_each_other():
    whole = datasets.load("fashion-mnist")
    study = np.concatenate([np.stack(list(s.images())) for s in whole.splits.values()])
    sample = np.concatenate(
        [np.stack(list(corpus.naming("miniature", name))) for name in whole.class_names]
    )
    study, sample = (
        torch.from_numpy(x[:, 2:-2, 2:-2, 0].reshape(len(x), -1).astype(np.float32)) / 28
        for x in (study, sample)
    )
    among = torch.cdist(study, study).fill_diagonal_(torch.inf)
    assert torch.cdist(sample, study).min() >= among.min() - 0.01


def test_a_folder_with_captions_is_a_corpus(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    listing = tmp_path / "metadata.csv"
    with pytest.raises(InputError, match=r"needs a metadata\.csv with columns file_name and text"):
        corpus.revision(str(tmp_path))
    corpus._listed.cache_clear()
    listing.write_text(
        "file_name,text\n0.png,A red Bag\n1.png,two handbags\n2.png,a bag of crisps\n"
    )
    assert [image[0, 0, 0] for image in corpus.naming(str(tmp_path), "bag")] == [0, 2]
    before = corpus.revision(str(tmp_path))
    corpus._listed.cache_clear()
    corpus.revision.cache_clear()
    listing.write_text("file_name,text\n0.png,a bag\n3.png,a bag\n")
    with pytest.raises(InputError, match=r"3\.png is listed and missing"):
        corpus.revision(str(tmp_path))
    assert before


def test_mixup_mixes_features_and_labels_alike():
    values = torch.eye(5)
    drawn = mixing.partners("mixup", 5, 40, seed=0)
    mixed = drawn.mixed(values)
    assert mixed.shape == (5, 40, 5)
    assert torch.allclose(mixed.sum(dim=2), torch.ones(5, 40))
    own = mixed[torch.arange(5), :, torch.arange(5)].numpy()
    alone = drawn.rows == np.arange(5)[:, None]
    assert np.allclose(own[~alone], drawn.shares[~alone], atol=1e-6)
    assert (drawn.shares.round(1) != 0.5).mean() > 0.8  # Beta(0.2, 0.2) is at its ends


def test_cutmix_pastes_as_much_as_its_label_says():
    images = [np.full((10, 10, 3), value, np.uint8) for value in (0, 100, 200)]
    drawn = mixing.partners("cutmix", 3, 30, seed=1, side=32)
    made = mixing.cut_and_pasted(images, drawn, 32)
    assert len(made) == 90
    assert len(set(made.digests())) > 80
    for place, (row, view) in enumerate(np.ndindex(3, 30)):
        pixels, partner = made[place][..., 0], int(drawn.rows[row, view])
        assert set(np.unique(pixels)) <= {100 * row, 100 * partner}
        if partner != row:
            assert (pixels == 100 * row).mean() == pytest.approx(drawn.shares[row, view])
    assert 0.3 < drawn.shares.mean() < 0.8


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_classifier_learns_from_mixed_images(world, name):
    mixed = run(augmentation=name)
    trainer = Trainer(world)
    [features], targets = trainer.features(mixed), trainer.targets(mixed)
    assert features.shape[:2] == targets.shape[:2]
    assert features.shape[1] == world.settings.classifier.controlled.num_views(len(features))
    assert torch.allclose(targets.sum(dim=2), torch.ones(targets.shape[:2]))
    result = results_of(
        world, [mixed, run(augmentation=name, technique="diff-mix", synthetic_per_class=2)]
    )
    assert result["arm"].tolist() == [name, f"diff-mix+{name}"]
    assert set(result["num_synthetic"]) == {0, 4}


def test_a_head_separates_classes_that_it_has_only_seen_mixed(world):
    labels = torch.arange(40) % 2
    values = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    values[:, 0] += 2.0 * labels - 1
    drawn = mixing.partners("mixup", 40, 20, seed=0)
    data = classifier.TrainingSet(
        drawn.mixed(values), drawn.mixed(torch.nn.functional.one_hot(labels, 2).float()), 0
    )
    recipe = world.settings.classifier.controlled.model_copy(
        update={"max_train_steps": 300, "learning_rate": 0.5}
    )
    scores = []
    classifier.train_head(
        data,
        recipe,
        2,
        300,
        lambda _, head: scores.append(classifier.accuracy(head, values, labels)),
    )
    assert scores == [1.0]


def test_whole_labels_are_learnt_bit_for_bit_however_they_are_given(world):
    features = torch.randn(12, 3, 8)
    labels = torch.arange(12) % 2
    shares = torch.nn.functional.one_hot(labels, 2).float()
    recipe = world.settings.classifier.controlled
    heads = []

    def keep(step, head):
        heads.append(head.weight.detach().clone())

    for given in (labels, shares, shares[:, None].expand(-1, 3, -1)):
        classifier.train_head(
            classifier.TrainingSet(features, given, 0), recipe, 2, recipe.max_train_steps, keep
        )
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_a_corpus_still_to_be_named_can_be_planned_for_and_not_searched(world, monkeypatch):
    unnamed = changed(world, retrieval={"corpus": None})
    assert technique_requests(unnamed, "retrieval", 0, 500)
    with pytest.raises(InputError, match=r"retrieval\.corpus: null: name a folder"):
        pools.technique_pools(unnamed, "retrieval", 0, 1)
    values = params.parameters_cell(NOTEBOOKS / "11-rivals.ipynb")
    p = params.check_notebook("11-rivals", values | params.overrides("smoke", "11-rivals"))
    p.check(unnamed)
    with pytest.raises(InputError, match="or do without 'retrieval'"):
        p.check_techniques(unnamed)
    assert "retrieval" not in p.fitted(unnamed)["techniques"]
    p.check_techniques(world)


def test_labels_are_mixed_for_the_images_that_a_rule_keeps(world):
    run = Run(
        protocol="controlled",
        real_percent=100,
        draw=0,
        seed=0,
        technique="diff-mix",
        synthetic_per_class=2,
        rule="chance",
        chosen_from=4,
    )
    trainer, train = Trainer(world), world.data.splits["train"]
    targets, number = trainer.targets(run), len(train)
    assert torch.equal(targets[:number].argmax(dim=1), torch.from_numpy(train.labels))
    assert torch.equal(targets[:number].amax(dim=1), torch.ones(number))
    followed = np.array([row for pool in trainer.pools_of(run) for row in pool.source_rows])
    others = train.labels[followed[trainer.kept(run)]]
    own = label_weight(world, run)
    wanted = (1 - own) * torch.nn.functional.one_hot(torch.from_numpy(others), 2)
    wanted += own * torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1]), 2)
    assert torch.allclose(targets[number:], wanted.float())


def test_shifted_images_are_tried_where_there_is_a_baseline(world):
    values = params.parameters_cell(NOTEBOOKS / "11-rivals.ipynb")
    values |= params.overrides("smoke", "11-rivals")
    elsewhere = params.check_notebook("11-rivals", values | {"shifted_percents": [25]})
    with pytest.raises(InputError, match="shifted_percents: 25 is not among"):
        elsewhere.check(world)
    changes = elsewhere.fitted(world)
    fitting = params.check_notebook("11-rivals", values | changes)
    assert set(fitting.shifted_percents) <= set(fitting.real_percents)
