import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from sdaug_utils.data import augment
from sdaug_utils.errors import InputError
from sdaug_utils.experiments import base
from sdaug_utils.training import classifier, features, runs, segmenter
from sdaug_utils.training.trainer import Trainer, overview, results_of, stacks


@pytest.fixture
def grid():
    arms = base.baselines([100, 50], ["none", "custom"])
    arms += base.synthetic(["dreambooth"], [(100, [3]), (50, [3])])
    return runs.repeated(arms, "controlled", num_draws=2, num_seeds=2)


def test_a_grid_has_every_combination_once(grid):
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 2
    assert {run.arm for run in grid} == {"baseline", "custom", "dreambooth"}
    counts = {run.arm: run.synthetic_per_class for run in grid}
    assert counts == {"baseline": 0, "custom": 0, "dreambooth": 3}


def test_runs_are_trained_once_and_say_what_they_saw(world, grid, monkeypatch):
    assert overview(world, grid)["already in the store"].sum() == 0
    results = results_of(world, grid)
    assert overview(world, grid)["already in the store"].sum() == len(grid)
    baseline = results[(results["arm"] == "baseline") & (results["real_percent"] == 50)]
    assert set(baseline["num_real"]) == {20}
    assert set(baseline["num_synthetic"]) == {0}
    assert set(results[results["arm"] == "dreambooth"]["num_synthetic"]) == {6}
    assert len(set(results["num_updates"])) == 1
    assert all(
        row["scores"].mean() == pytest.approx(row["test_score"]) for _, row in results.iterrows()
    )
    assert runs.scores(results, arm="baseline", real_percent=100).shape == (2, 2, 10)

    monkeypatch.setattr(classifier, "train_controlled", lambda *_: pytest.fail("trained again"))
    again = results_of(world, grid)
    arrays = ["scores", "predictions"]
    assert again.drop(columns=arrays).equals(results.drop(columns=arrays))


def test_a_run_depends_on_its_settings_and_data(world, grid):
    folder = runs.folder_of(world, grid[0])
    settings = world.settings.classifier
    controlled = settings.controlled.model_copy(update={"learning_rate": 0.5})
    changed = world.settings.model_copy(
        update={"classifier": settings.model_copy(update={"controlled": controlled})}
    )
    other = type(world)(world.profile, changed, world.data, world.store)
    assert runs.folder_of(other, grid[0]) != folder
    published = grid[0].model_copy(update={"protocol": "published"})
    assert runs.folder_of(other, published) == runs.folder_of(world, published)


def test_a_missing_arm_is_an_error(world, grid):
    results = results_of(world, grid[:1])
    with pytest.raises(KeyError, match=r"no run of .*dreambooth"):
        runs.scores(results, arm="dreambooth", real_percent=5)


def test_incomplete_double_and_mixed_runs_are_refused(world, grid):
    results = results_of(world, grid)
    doubled = pd.concat([results, results])
    missing = results.drop(index=0)
    mixed = results.assign(protocol=["published"] * 3 + ["controlled"] * (len(results) - 3))
    for frame in (doubled, missing, mixed):
        with pytest.raises(ValueError, match="not of one setting"):
            runs.scores(frame, arm="baseline", real_percent=100)


def test_an_arm_that_comes_twice_is_run_once():
    arms = base.baselines([100, 100, 50])
    assert len(runs.repeated(arms, "controlled", 2, 3)) == 2 * 2 * 3


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
    alone, both = runs.repeated(arms, "controlled", 1, 1)
    assert both.arm == "stable-diffusion-prompt+randaugment"
    results = results_of(world, [alone, both])
    assert results["num_real"].tolist() == [0, 4]
    assert results["num_synthetic"].tolist() == [4, 4]


def test_segmenters_share_trimaps_with_their_control_images_and_learn(world):
    arms = [
        {**arm, "task": "segmentation"}
        for arm in base.baselines([100]) + base.synthetic(["controlnet-segmentation"], [(100, [2])])
    ]
    grid = runs.repeated(arms, "controlled", 1, 1)
    results = results_of(world, grid)
    assert results["num_synthetic"].tolist() == [0, 4]
    assert results["scores"].map(lambda scores: scores.shape == (10,)).all()
    assert results["mean_iou"].map(lambda iou: iou.min() >= 0 and iou.max() <= 1).all()
    rows, labels = runs.examples(world, grid[1])
    assert labels.shape == (2, 32, 32)
    assert set(world.data.splits["test"].labels[rows]) == {0, 1}
    again = results_of(world, grid)
    assert again["test_score"].tolist() == results["test_score"].tolist()


def test_controls_from_outside_are_an_arm_of_their_own(world):
    arm = {"technique": "controlnet-canny", "real_percent": 10, "synthetic_per_class": 3}
    inside, outside = runs.repeated(
        [arm, {**arm, "controls_from_outside": True}], "controlled", 1, 1
    )
    assert (inside.arm, runs.pool_percent(world, inside)) == ("controlnet-canny", 10)
    assert (outside.arm, runs.pool_percent(world, outside)) == ("controlnet-canny+outside", 100)
    results = results_of(world, [inside, outside])
    assert results["num_real"].tolist() == [4, 4]
    assert runs.folder_of(world, inside) != runs.folder_of(world, outside)


def test_keys_know_the_versions_of_all_that_a_run_uses(world, monkeypatch):
    arms = [{"real_percent": 50, "task": task} for task in ("classification", "segmentation")]
    both = runs.repeated(arms, "controlled", 1, 1)
    before = [runs.folder_of(world, run) for run in both]
    for module in (runs, features, augment):
        with monkeypatch.context() as patch:
            patch.setattr(module, "CODE_VERSION", 99)
            assert not set(before) & {runs.folder_of(world, run) for run in both}
    for module, index in ((classifier, 0), (segmenter, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, "CODE_VERSION", 99)
            changed = [
                runs.folder_of(world, run) != old for run, old in zip(both, before, strict=True)
            ]
            assert changed == [index == 0, index == 1]


def test_there_may_be_more_than_256_classes(world, tmp_path, monkeypatch):
    outcome = classifier.Outcome(np.arange(10) + 295, 0.5, 10, 10)
    monkeypatch.setattr(classifier, "train_controlled", lambda *_: [outcome])
    [run] = runs.repeated([{"real_percent": 50}], "controlled", 1, 1)
    Trainer(world).train([run], [tmp_path])
    assert np.load(tmp_path / "predictions.npy").tolist() == list(range(295, 305))


def test_real_images_have_more_views_than_synthetic_ones(world):
    """Where the two differ, each view of a synthetic image comes up more often."""
    arm = {"technique": "stable-diffusion-prompt", "synthetic_per_class": 4, "real_percent": 10}
    [chosen] = runs.repeated([{**arm, "augmentation": "custom"}], "controlled", 1, 1)
    real, synthetic = Trainer(world).features(chosen)
    assert real.shape[:2] == (4, 2)  # four real images: 12 views would make one of each
    assert not torch.equal(real[0, 0], real[0, 1])
    assert synthetic.shape[:2] == (8, 1)
    [seen] = Trainer(world).head_sets([chosen])
    assert seen.num_views.tolist() == [2] * 4 + [1] * 8
    assert torch.equal(seen.features, torch.cat([real.flatten(0, 1), synthetic.flatten(0, 1)]))


def test_a_classifier_on_pixels_learns_without_a_network(world, monkeypatch):
    monkeypatch.setattr(features, "load_backbone", lambda *_: pytest.fail("a network"))
    grid = runs.repeated(base.baselines([100]), "pixels", 1, 1)
    [row] = results_of(world, grid).to_dict("records")
    assert row["protocol"] == "pixels"
    assert row["test_score"] > 0.8  # trousers and bags
    assert row["num_updates"] == world.settings.classifier.controlled.max_train_steps


def test_maps_are_freed_with_the_trainer_that_made_them(world):
    run = runs.Run(task="segmentation", protocol="controlled", real_percent=100, draw=0, seed=0)
    trainer = Trainer(world)
    maps = weakref.ref(trainer.maps())
    maps().held_out(world.data.splits["validation"])
    assert maps().known
    trainer.prepare(run)
    del trainer
    gc.collect()
    assert maps() is None


def test_the_validation_curve_is_kept(world, grid):
    outcome = results_of(world, grid[:1]).iloc[0]
    curve = pd.Series(dict(runs.read_result(world, grid[0])["validation_curve"]))
    assert curve.index.tolist() == [10, 20]  # every validation_steps
    assert curve[outcome["selected_step"]] == curve.max() == outcome["validation_score"]


def test_settings_are_overridden_for_one_run_alone(world, grid):
    plain = grid[0]
    slow = plain.changed({"classifier.controlled.max_train_steps": 10})
    both = results_of(world, [plain, slow])
    assert both["num_updates"].tolist() == [20, 10]
    assert runs.folder_of(world, plain) != runs.folder_of(world, slow)
    with pytest.raises(InputError, match="learning_speed: unknown"):
        results_of(world, [plain.changed({"classifier.controlled.learning_speed": 1})])


def test_another_prompt_gives_other_images(world):
    arms = base.synthetic(["stable-diffusion-prompt"], [(50, [2])])
    [plain] = runs.repeated(arms, "controlled", 1, 1)
    other = plain.changed({"sampling.prompt": "a {}"}).model_copy(update={"variant": "short"})
    assert not set(runs.pool_keys(world, plain)) & set(runs.pool_keys(world, other))
    results = results_of(world, [plain, other])
    assert results["arm"].tolist() == [plain.arm, f"{plain.arm}+short"]
    [pool, _] = Trainer(runs.study_of(world, other)).pools_of(other)
    assert "a trouser" in (pool.files[0].parent / "metadata.csv").read_text()


def test_keys_tell_runs_apart_and_labels_do_not(world, grid):
    plain = grid[0]
    assert runs.folder_of(world, plain) == runs.folder_of(
        world, plain.model_copy(update={"variant": "another name"})
    )
    ways = [(("a", 1), ("b", 2)), (("b", 2), ("a", 1))]
    first, second = (runs.Run(**{**dict(plain), "overrides": way}) for way in ways)
    assert first == second
    with pytest.raises(ValueError, match="no test images are called"):
        runs.Run(**{**dict(plain), "test_sets": ("fog",)})
    chosen = plain.model_copy(
        update={
            "protocol": "published",
            "technique": "stable-diffusion-prompt",
            "synthetic_per_class": 1,
            "rule": "confidence",
            "chosen_from": 2,
        }
    )
    longer = world.changed({"classifier.controlled.max_train_steps": 30})  # of what judges
    assert runs.folder_of(longer, chosen) != runs.folder_of(world, chosen)


def test_a_run_that_is_listed_twice_is_trained_once(world, grid):
    results = results_of(world, [grid[0], grid[1], grid[0]])
    assert results["test_score"][0] == results["test_score"][2]


def test_a_partner_sees_the_same_images(world, grid):
    twin = grid[0].changed({"sampling.prompt": "a {}", "classifier.image_size": 40})
    twin = twin.model_copy(update={"updates_as": "published"})
    assert dict(twin.partner.overrides) == {"sampling.prompt": "a {}"}
    assert twin.partner.protocol == "published"
    longer = world.changed({"classifier.controlled.max_train_steps": 30})
    assert runs.folder_of(longer, twin) == runs.folder_of(world, twin)  # its partner decides


def test_a_run_comes_after_its_partner(grid):
    partner = grid[0]
    twin = partner.changed({"classifier.image_size": 40})
    twin = twin.model_copy(update={"updates_as": "controlled"})
    assert stacks([twin, partner]) == [[partner], [twin]]
