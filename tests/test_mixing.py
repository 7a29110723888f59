"""Mixed images and labels: mixup, CutMix, Diff-Mix."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sdaug_utils.data import datasets
from sdaug_utils.errors import InputError
from sdaug_utils.experiments import base
from sdaug_utils.generation import pools
from sdaug_utils.registry import techniques
from sdaug_utils.training import classifier, mixing
from sdaug_utils.training.runs import Run, label_weight, spec
from sdaug_utils.training.trainer import Trainer, results_of


def changed(study, **sections):
    update = {
        name: getattr(study.settings, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return replace(study, settings=study.settings.model_copy(update=update))


def run(**more):
    return Run(**{"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0, **more})


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
            base.require_trainable(world, [own])
    base.require_trainable(world, [run(technique="diff-mix"), run(augmentation="mixup")])


def test_mixup_mixes_features_and_labels_alike():
    values = torch.eye(5)
    drawn = mixing.draw_mixture("mixup", 5, 40, seed=0)
    mixed = drawn.mixed(values)
    assert mixed.shape == (5, 40, 5)
    assert torch.allclose(mixed.sum(dim=2), torch.ones(5, 40))
    own = mixed[torch.arange(5), :, torch.arange(5)].numpy()
    alone = drawn.rows == np.arange(5)[:, None]
    assert np.allclose(own[~alone], drawn.shares[~alone], atol=1e-6)
    assert (drawn.shares.round(1) != 0.5).mean() > 0.8  # Beta(0.2, 0.2) is at its ends


def test_cutmix_pastes_as_much_as_its_label_says():
    images = [np.full((10, 10, 3), value, np.uint8) for value in (0, 100, 200)]
    drawn = mixing.draw_mixture("cutmix", 3, 30, seed=1, side=32)
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
    drawn = mixing.draw_mixture("mixup", 40, 20, seed=0)
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
