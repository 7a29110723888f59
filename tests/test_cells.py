import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from sdaug_utils import experiments
from sdaug_utils.data import augment
from sdaug_utils.training import cells, classifier, features, segmenter


@pytest.fixture
def grid():
    arms = experiments.baselines([100, 50], ["none", "custom"])
    arms += experiments.synthetic(["dreambooth"], [(100, [3]), (50, [3])])
    return cells.repeated(arms, "controlled", num_draws=2, num_seeds=2)


def test_a_grid_has_every_combination_once(grid):
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2
    assert {cell.arm for cell in grid} == {"baseline", "custom", "dreambooth"}
    counts = {cell.arm: cell.synthetic_per_class for cell in grid}
    assert counts == {"baseline": 0, "custom": 0, "dreambooth": 3}


def test_cells_are_trained_once_and_say_what_they_saw(world, grid, monkeypatch):
    assert cells.plan(world, grid)["already in the store"].sum() == 0
    results = cells.run(world, grid)
    assert cells.plan(world, grid)["already in the store"].sum() == len(grid)
    baseline = results[(results["arm"] == "baseline") & (results["real_percent"] == 50)]
    assert set(baseline["num_real"]) == {20}
    assert set(baseline["num_synthetic"]) == {0}
    assert set(results[results["arm"] == "dreambooth"]["num_synthetic"]) == {6}
    assert len(set(results["num_updates"])) == 1
    assert all(
        row["scores"].mean() == pytest.approx(row["test_score"]) for _, row in results.iterrows()
    )
    assert cells.scores(results, arm="baseline", real_percent=100).shape == (2, 2, 10)

    monkeypatch.setattr(classifier, "train_controlled", lambda *_: pytest.fail("trained again"))
    again = cells.run(world, grid)
    arrays = ["scores", "predictions"]
    assert again.drop(columns=arrays).equals(results.drop(columns=arrays))


def test_a_cell_depends_on_its_settings_and_data(world, grid):
    folder = cells.folder(world, grid[0])
    settings = world.settings.classifier
    controlled = settings.controlled.model_copy(update={"learning_rate": 0.5})
    changed = world.settings.model_copy(
        update={"classifier": settings.model_copy(update={"controlled": controlled})}
    )
    other = type(world)(world.profile, changed, world.data, world.store)
    assert cells.folder(other, grid[0]) != folder
    published = grid[0].model_copy(update={"protocol": "published"})
    assert cells.folder(other, published) == cells.folder(world, published)


def test_a_missing_arm_is_an_error(world, grid):
    results = cells.run(world, grid[:1])
    with pytest.raises(KeyError, match=r"no run of .*dreambooth"):
        cells.scores(results, arm="dreambooth", real_percent=5)


def test_incomplete_double_and_mixed_runs_are_refused(world, grid):
    results = cells.run(world, grid)
    doubled = pd.concat([results, results])
    lacking = results.drop(index=0)
    mixed = results.assign(protocol=["published"] * 3 + ["controlled"] * (len(results) - 3))
    for frame in (doubled, lacking, mixed):
        with pytest.raises(ValueError, match="not of one setting"):
            cells.scores(frame, arm="baseline", real_percent=100)


def test_curves_are_read_at_the_steps_asked_for(world, grid):
    curve = cells.accuracy_curves(world, grid[:1], 0.1, [4, 10])
    assert curve["step"].tolist() == [4, 10]
    assert curve["test_accuracy"].between(0, 1).all()


def test_an_arm_that_comes_twice_is_run_once():
    arms = experiments.baselines([100, 100, 50])
    assert len(cells.repeated(arms, "controlled", 2, 3)) == 2 * 2 * 3


def test_synthetic_images_alone_and_augmented_ones_are_trained_on(world):
    arms = [
        {"technique": "stable-diffusion-prompt", "real_percent": 0, "synthetic_per_class": 2},
        {
            "technique": "stable-diffusion-prompt",
            "real_percent": 10,
            "synthetic_per_class": 2,
            "augmentation": "randaugment",
        },
    ]
    alone, both = cells.repeated(arms, "controlled", 1, 1)
    assert both.arm == "stable-diffusion-prompt+randaugment"
    results = cells.run(world, [alone, both])
    assert results["num_real"].tolist() == [0, 4]
    assert results["num_synthetic"].tolist() == [4, 4]


def test_segmenters_share_trimaps_with_their_control_images_and_learn(world):
    arms = [
        {**arm, "task": "segmentation"}
        for arm in experiments.baselines([100])
        + experiments.synthetic(["controlnet-segmentation"], [(100, [2])])
    ]
    grid = cells.repeated(arms, "controlled", 1, 1)
    results = cells.run(world, grid)
    assert results["num_synthetic"].tolist() == [0, 4]
    assert results["scores"].map(lambda scores: scores.shape == (10,)).all()
    assert results["mean_iou"].map(lambda iou: iou.min() >= 0 and iou.max() <= 1).all()
    rows, labels = cells.examples(world, grid[1])
    assert labels.shape == (2, 32, 32)
    assert set(world.data.splits["test"].labels[rows]) == {0, 1}
    again = cells.run(world, grid)
    assert again["test_score"].tolist() == results["test_score"].tolist()


def test_controls_from_outside_are_an_arm_of_their_own(world):
    arm = {"technique": "controlnet-canny", "real_percent": 10, "synthetic_per_class": 3}
    inside, outside = cells.repeated(
        [arm, {**arm, "controls_from_outside": True}], "controlled", 1, 1
    )
    assert (inside.arm, cells.pool_percent(world, inside)) == ("controlnet-canny", 10)
    assert (outside.arm, cells.pool_percent(world, outside)) == ("controlnet-canny+outside", 100)
    results = cells.run(world, [inside, outside])
    assert results["num_real"].tolist() == [4, 4]
    assert cells.folder(world, inside) != cells.folder(world, outside)


def test_keys_know_the_versions_of_all_that_a_run_uses(world, monkeypatch):
    arms = [{"real_percent": 50, "task": task} for task in ("classification", "segmentation")]
    both = cells.repeated(arms, "controlled", 1, 1)
    before = [cells.folder(world, cell) for cell in both]
    for module in (cells, features, augment):
        with monkeypatch.context() as patch:
            patch.setattr(module, "CODE_VERSION", 99)
            assert not set(before) & {cells.folder(world, cell) for cell in both}
    for module, index in ((classifier, 0), (segmenter, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "CODE_VERSION", 99)
            changed = [
                cells.folder(world, cell) != old for cell, old in zip(both, before, strict=True)
            ]
            assert changed == [index == 0, index == 1]


def test_there_may_be_more_than_256_classes(world, tmp_path, monkeypatch):
    outcome = classifier.Outcome(np.arange(10) + 295, 0.5, 10, 10)
    monkeypatch.setattr(classifier, "train_controlled", lambda *_: [outcome])
    [cell] = cells.repeated([{"real_percent": 50}], "controlled", 1, 1)
    cells.Trainer(world).train([cell], [tmp_path])
    assert np.load(tmp_path / "predictions.npy").tolist() == list(range(295, 305))


def test_real_images_have_more_views_than_synthetic_ones(world):
    """Where the two differ, each view of a synthetic image comes up more often."""
    arm = {"technique": "stable-diffusion-prompt", "synthetic_per_class": 4, "real_percent": 10}
    [chosen] = cells.repeated([{**arm, "augmentation": "custom"}], "controlled", 1, 1)
    real, synthetic = cells.Trainer(world).features(chosen)
    assert real.shape[:2] == (4, 2)  # four real images: 12 views would make one of each
    assert not torch.equal(real[0, 0], real[0, 1])
    assert synthetic.shape[:2] == (8, 1)
    [seen] = cells.Trainer(world).head_sets([chosen])
    assert seen.num_views.tolist() == [2] * 4 + [1] * 8
    assert torch.equal(seen.features, torch.cat([real.flatten(0, 1), synthetic.flatten(0, 1)]))


def test_views_are_varied_up_to_those_in_use(world):
    arms = [{"real_percent": percent, "augmentation": "custom"} for percent in (100, 10)]
    grid = cells.repeated(arms, "controlled", 1, 1)
    own = cells.run(world, grid)
    found = cells.with_views(world, grid, [1, 2, 3])
    assert found.groupby("num_views")["real_percent"].apply(list).to_dict() == {
        1: [100, 10],
        2: [100, 10],
        3: [10],  # 12 views of 4 images; of 40 images two each
    }
    same = found[(found["num_views"] == 2) & (found["real_percent"] == 100)].iloc[0]
    assert (same["scores"] == own["scores"][0]).all()
    assert same["validation_score"] == own["validation_score"][0]


def test_a_frozen_twin_has_the_same_updates_at_the_same_rate(world, monkeypatch):
    arms = experiments.baselines([50])
    arms += experiments.synthetic(["stable-diffusion-prompt"], [(50, [2])])
    asked, train = [], classifier.train_controlled

    def recorded(sets, validation, test_features, settings, num_classes):
        asked.append(settings)
        return train(sets, validation, test_features, settings, num_classes)

    monkeypatch.setattr(classifier, "train_controlled", recorded)
    both = cells.with_twins(world, cells.repeated(arms, "published", 2, 1))
    published, twins = both[:4], both[4:].reset_index(drop=True)
    assert set(published["protocol"]) == {"published"}
    assert set(twins["protocol"]) == {"controlled"}
    same = ["arm", "draw", "seed", "num_real", "num_synthetic", "num_updates"]
    assert twins[same].equals(published[same])
    assert twins["selected_step"].tolist() == twins["num_updates"].tolist()  # the last weights
    like = world.settings.classifier.published
    assert {(one.learning_rate, one.batch_size) for one in asked} == {
        (like.learning_rate, like.batch_size)
    }


def test_segmenters_are_trained_for_other_numbers_of_updates(world):
    arm = {"task": "segmentation", "real_percent": 10}
    grid = cells.repeated([arm], "controlled", 1, 1)
    own = cells.run(world, grid)
    found = cells.with_updates(world, grid, [3, 6])
    assert found["num_updates"].tolist() == [3, 6]
    assert (found["scores"][1] == own["scores"][0]).all()  # six are the profile's own


def test_a_classifier_on_pixels_learns_without_a_network(world, monkeypatch):
    monkeypatch.setattr(features, "load_backbone", lambda *_: pytest.fail("a network"))
    grid = cells.repeated(experiments.baselines([100]), "pixels", 1, 1)
    [row] = cells.run(world, grid).to_dict("records")
    assert row["protocol"] == "pixels"
    assert row["test_score"] > 0.8  # trousers and bags
    assert row["num_updates"] == world.settings.classifier.controlled.max_train_steps


def test_maps_are_freed_with_the_trainer_that_made_them(world):
    cell = cells.Cell(task="segmentation", protocol="controlled", real_percent=100, draw=0, seed=0)
    trainer = cells.Trainer(world)
    maps = weakref.ref(trainer.maps())
    maps().held_out(world.data.splits["validation"])
    assert maps().known
    trainer.prepare(cell)
    del trainer
    gc.collect()
    assert maps() is None
