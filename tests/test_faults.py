"""Faults that would change what the study finds and raise no error: each has a test here.

``make mutants`` plants them, one by one, and shows that the tests see them.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.transforms import v2

from sdaug_utils.data import augment
from sdaug_utils.data.datasets import subset
from sdaug_utils.data.images import digests
from sdaug_utils.evidence import claims, metrics, subjects
from sdaug_utils.experiments import base
from sdaug_utils.generation import pools
from sdaug_utils.generation.foundation import load_pipeline
from sdaug_utils.generation.personalisation import NoisyLatents
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training import classifier, features, runs, segmenter
from sdaug_utils.training.trainer import Trainer
from tests import mutants

PROMPTS = "stable-diffusion-prompt"


def run(**chosen):
    [made] = runs.repeated([{"real_percent": 50, **chosen}], "controlled", 1, 1)
    return made


def changed(world, section, **changes):
    own = getattr(world.settings, section).model_copy(update=changes)
    settings = world.settings.model_copy(update={section: own})
    return Study(world.profile, settings, world.data, world.store)


def test_pixels_are_normalised_as_the_backbone_learnt_them():
    backbone = features.load_backbone("efficientnet-lite0")
    mean, std = (torch.tensor(backbone.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    made = features.normalise((mean + 2 * std).expand(1, 3, 4, 4), backbone)
    torch.testing.assert_close(made, torch.full((1, 3, 4, 4), 2.0))


def test_a_cell_learns_from_several_views_that_differ(world):
    [views] = Trainer(world).features(run(augmentation="custom"))
    number = world.settings.classifier.controlled.min_views
    assert number > 1
    assert views.shape[1] >= number
    assert not torch.equal(views[:, 0], views[:, 1])


def test_autoaugment_is_the_policy_for_imagenet():
    _, policy = augment.build("autoaugment", 32).transforms
    assert policy.policy == v2.AutoAugmentPolicy.IMAGENET


def test_every_run_of_an_arm_has_a_seed_of_its_own_and_arms_share_them():
    arms = base.baselines([100, 50]) + base.synthetic([PROMPTS], [(100, [5])])
    grid = runs.repeated(arms, "controlled", 3, 3)
    of_arms = pd.DataFrame(
        [(c.arm, c.real_percent, runs.training_seed(c)) for c in grid], columns=["a", "p", "seed"]
    )
    sets = {tuple(group) for _, group in of_arms.groupby(["a", "p"])["seed"]}
    assert len(sets) == 1
    assert len(set(sets.pop())) == 9


def test_a_cell_sees_its_draws_subset_of_training_images_under_their_labels(world):
    chosen = run(technique=PROMPTS, synthetic_per_class=3, real_percent=10).model_copy(
        update={"draw": 1}
    )
    trainer, train = Trainer(world), world.data.splits["train"]
    rows = subset(train.labels, 10, 1)
    assert set(rows) != set(subset(train.labels, 10, 0))
    images, labels = trainer.training_set(chosen)
    assert digests(images)[: len(rows)] == digests(train.images(rows))
    assert labels[: len(rows)].tolist() == train.labels[rows].tolist()
    asked = [image for pool in trainer.pools_of(chosen) for image in digests(pool.images())]
    assert digests(images)[len(rows) :] == asked
    assert labels[len(rows) :].tolist() == [0, 0, 0, 1, 1, 1]
    real = features.image_features(world, train.images(rows))
    torch.testing.assert_close(trainer.features(chosen)[0], real)


def test_weights_are_chosen_on_validation_images(world, monkeypatch):
    seen = []
    trained = classifier.train_controlled
    monkeypatch.setattr(
        classifier, "train_controlled", lambda *given: seen.append(given) or trained(*given)
    )
    trainer = Trainer(world)
    trainer.controlled([run()])
    _, (validation, labels), test, *_ = seen[0]
    split = world.data.splits["validation"]
    assert torch.equal(validation, features.image_features(world, split.images())[:, 0])
    assert labels.tolist() == split.labels.tolist()
    assert torch.equal(test, trainer.features_of("test")[:, 0])


def test_a_key_knows_the_pools_and_a_model_its_steps(world):
    chosen = run(technique=PROMPTS, synthetic_per_class=1)
    other = changed(world, "sampling", num_inference_steps=3)
    assert runs.spec(world, chosen) != runs.spec(other, chosen)
    for name in ("dreambooth", "textual-inversion"):
        longer = changed(world, name.replace("-", "_"), max_train_steps=7)
        models = [techniques()[name].model_spec(x.settings, [], 0) for x in (world, longer)]
        assert models[0] != models[1]


@pytest.fixture
def losses(monkeypatch, seen):
    """Validation losses of a segmenter as a test wants them; the last one stays."""
    planned = []

    def loss(head, features, targets):
        seen.append(segmenter.predict(head, features, targets) + 1)
        return planned.pop(0) if planned[1:] else planned[0]

    monkeypatch.setattr(segmenter, "_loss", loss)
    return planned


@pytest.fixture
def seen():
    """What segmenters made of the validation images, look by look."""
    return []


def segmented(world, protocol="controlled", trimaps=range(8), which=None, **changes):
    study, train = changed(world, "segmenter", **changes), world.data.splits["train"]
    return segmenter.train(
        segmenter.FeatureMaps(study),
        train.images(np.arange(8)),
        [train.trimap(row) for row in trimaps],
        dict.fromkeys(("validation", "test"), world.data.splits["test"]),
        protocol,
        0,
        which,
    )


def test_images_that_share_a_trimap_need_it_once(world):
    shared = (5, 2, 2, 5, 5, 2, 5, 2)
    alone, together, others = (
        segmented(world, **more).labels
        for more in (
            {"trimaps": shared},
            {"trimaps": (2, 5), "which": [(2, 5).index(row) for row in shared]},
            {"trimaps": (2, 5), "which": [0] * 8},
        )
    )
    np.testing.assert_array_equal(together, alone)
    assert (others != alone).any()


def test_a_segmenter_is_tested_with_its_best_weights(world, losses, seen):
    for planned, best in (([0.1, 0.9], 0), ([0.9, 0.1], 1)):
        losses[:] = planned
        seen.clear()
        outcome = segmented(world, max_train_steps=4, validation_steps=2)
        assert (outcome.num_updates, outcome.selected_step) == (4, 2 + 2 * best)
        np.testing.assert_array_equal(outcome.labels, seen[best])
        assert (seen[0] != seen[1]).any()


def test_a_segmenters_patience_ends_what_no_longer_improves(world, losses):
    losses += [0.1, 0.2]
    few = {"max_epochs": 6, "patience": 2, "batch_size": 4}  # two updates per epoch
    assert segmented(world, "published", **few).num_updates == 6
    losses[:] = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert segmented(world, "published", **few).num_updates == 12


def test_a_synthetic_image_has_the_trimap_that_it_follows(world, monkeypatch):
    seen = []
    monkeypatch.setattr(segmenter, "train", lambda *given: seen.append(given))
    chosen = run(task="segmentation", technique="controlnet-segmentation", synthetic_per_class=3)
    trainer, train = Trainer(world), world.data.splits["train"]
    trainer._segmentation(chosen)
    _, images, trimaps, *_, which = seen[0]
    rows = [*subset(train.labels, 50, 0)]
    rows += [row for pool in trainer.pools_of(chosen) for row in pool.source_rows]
    assert len(images) == len(which) == len(rows)
    assert len(trimaps) == len(set(rows))
    for place, row in zip(which, rows, strict=True):
        np.testing.assert_array_equal(trimaps[place], train.trimap(int(row)))


@pytest.fixture
def examples(world):
    """What DreamBooth draws from five images, with latents that are not encoded anew each time."""
    pipeline = load_pipeline(world.settings)
    pipeline.vae.register_to_config(scaling_factor=0.25)
    made = NoisyLatents(pipeline, world.data.splits["train"].images(np.arange(5)), 32, seed=0)
    made.std = torch.zeros_like(made.std)
    return made


def test_latents_are_scaled_as_the_model_knows_them(examples, monkeypatch):
    monkeypatch.setattr(examples.scheduler, "add_noise", lambda latents, noise, steps: latents)
    latents, _, _ = examples(6)
    expected = 0.25 * examples.mean
    for one in latents:
        assert min((one - of_image).abs().max() for of_image in expected) < 1e-6


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_model_predicts(examples, monkeypatch, kind):
    seen = []
    add_noise = examples.scheduler.add_noise
    monkeypatch.setattr(
        examples.scheduler, "add_noise", lambda *given: seen.append(given) or add_noise(*given)
    )
    examples.scheduler.register_to_config(prediction_type=kind)
    noisy, timesteps, target = examples(4)
    latents, noise, _ = seen[0]
    share = examples.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # of the signal
    velocity = share.sqrt() * noise - (1 - share).sqrt() * latents
    torch.testing.assert_close(noisy, share.sqrt() * latents + (1 - share).sqrt() * noise)
    torch.testing.assert_close(target, noise if kind == "epsilon" else velocity)


def test_guidance_and_words_change_an_image(world):
    def first(study, label=0):
        asked = technique_requests(study, PROMPTS, 0, 1)[label]
        sampler = pools.pipeline_sampler(
            load_pipeline(study.settings),
            study.settings.sampling,
            [asked.spec["prompt"]],
            [asked.technique.arguments(study, asked)],
        )
        return np.asarray(sampler([(0, 0)], [5])[0]).astype(int)

    weak, strong = (first(changed(world, "sampling", guidance_scale=s)) for s in (1.0, 3.0))
    assert np.abs(weak - strong).max() > 10
    assert np.abs(first(world) - first(world, label=1)).max() > 30


def test_control_images_take_turns(world):
    [asked, _] = technique_requests(world, "controlnet-canny", 0, 3)
    images = asked.technique.arguments(world, asked)([0, 1, 2, len(asked.rows)])["image"]
    assert len({image.tobytes() for image in images[:3]}) == 3
    assert images[0].tobytes() == images[3].tobytes()


def test_chance_is_nothing(world):
    judge = subjects.Judge(world)
    judge.head = lambda made: torch.tensor([[1.0, 0.0]]).expand(len(made), 2)  # always class 0
    [pool, _] = pools.technique_pools(world, PROMPTS, 0, 2)
    for labels, expected in (((0,), 0.5), ((1,), -0.5), ((0, 1), 0.0)):
        subject = subjects.Subject("one", labels, (0, 1))
        assert judge([pool], {"A {}": None}, subject)["in_class"] == pytest.approx(expected)


def test_subjects_are_judged_by_images_that_no_model_saw(world):
    """What repeats an input earns what the input shares with those held back, and no more."""
    judge, train = subjects.Judge(world), world.data.splits["train"]
    for subject in subjects.nearest_subjects(world, 2, 3):
        assert len(subject.rows) == len(subject.held_back) == 3
        assert not set(subject.rows) & set(subject.held_back)
        copies = Copies(train.images(subject.rows[:1]))
        found = judge([copies], {"A {}": None}, subject)
        real = judge.real[[subject.rows[0], *subject.held_back]]
        cosines = [a @ real[0] / np.linalg.norm(a) / np.linalg.norm(real[0]) for a in real[1:]]
        assert found["fidelity"] == pytest.approx(np.mean(cosines), abs=1e-4)
        assert found["nearest_input"] == pytest.approx(1, abs=1e-4)


class Copies:
    """A pool of given images."""

    def __init__(self, images):
        self.shown = images + images
        self.files = list(self.shown)

    def images(self):
        return self.shown


def test_in_context_counts_fidelity_where_the_prompt_is_obeyed(world, monkeypatch):
    judge, train = subjects.Judge(world), world.data.splits["train"]
    [subject, _] = subjects.nearest_subjects(world, 2, 3)
    pool, prompts = Copies(train.images(subject.rows[:1])), {"A {}": None, "A dark {}": "dark"}
    for obeyed, share in ((True, 1.0), (False, 0.0)):
        monkeypatch.setattr(subjects, "obeys", lambda *_, does=obeyed: does)
        found = judge([pool, pool], prompts, subject)
        assert found["in_context"] == pytest.approx(share * found["fidelity"])
        assert found["prompt_fidelity"] == share
    assert np.isnan(judge([pool], {"A {}": None}, subject)["in_context"])


def test_a_kind_is_more_than_its_classes(world):
    judge = subjects.Judge(world, [["trouser", "bag"]])
    judge.head = lambda made: torch.tensor([[1.0, 0.0]]).expand(len(made), 2)  # always class 0
    [pool, _] = pools.technique_pools(world, PROMPTS, 0, 2)
    other = subjects.Subject("bags", (1,), (20, 21))
    assert judge([pool], {"A {}": None}, other)["in_kind"] == 1
    assert subjects.Judge(world).kind_of_class.tolist() == ["trouser", "bag"]


def test_few_draws_ask_for_a_wider_interval():
    """Student's quantile times the standard deviation over the root of n, both by hand."""
    for quantile, scores in ((4.3027, [1, 2, 6]), (2.5706, [1, 2, 6, 3, 3, 3])):
        found = metrics.estimate(np.array(scores, float).reshape(-1, 1, 1))
        distances = [(score - sum(scores) / len(scores)) ** 2 for score in scores]
        error = (sum(distances) / (len(scores) - 1) / len(scores)) ** 0.5
        assert found.high - found.mean == pytest.approx(quantile * error, rel=1e-4)


def test_a_claim_compares_at_its_own_percentage():
    """The baseline differs by percentage, and each claim at 5 or 10 % has its own one."""
    accuracy = {("baseline", 5): 0.5, ("baseline", 10): 0.7, (PROMPTS, 5): 0.6, (PROMPTS, 10): 0.72}
    rows = [
        {
            **{"task": "classification", "protocol": "controlled", "arm": arm},
            **{"real_percent": percent, "synthetic_per_class": 50 * (arm != "baseline")},
            **{"draw": draw, "seed": 0, "validation_score": 0.5},
            "scores": np.arange(1000) < 1000 * value,
        }
        for (arm, percent), value in accuracy.items()
        for draw in range(3)
    ]
    judged = claims.judge(pd.DataFrame(rows), "03-training-percentage").set_index("id")
    assert judged.loc["03-c", "difference"] == pytest.approx(0.1)
    assert judged.loc["03-f", "difference"] == pytest.approx(0.02)


PUBLISHED = {  # of all runs of a technique: accuracy by the logs, and by the thesis's text
    "autoaugment": (3.7632, 3.763),
    "baseline": (6.5931, 6.5927),
    "controlnet-canny": (13.2879, 12.5309),
    "controlnet-canny+randaugment": (2.4774, 0.0),
    "custom": (3.8427, 3.8425),
    "dreambooth": (15.0049, 15.7209),
    "dreambooth+randaugment": (0.8819, 0.0),
    "randaugment": (3.9151, 3.9149),
    "stable-diffusion-prompt": (18.9615, 19.6771),
    "stable-diffusion-prompt+randaugment": (2.5199, 0.0),
    "textual-inversion": (16.8106, 17.686),
    "textual-inversion+randaugment": (4.2259, 0.0),
}


def test_no_published_value_is_mistyped():
    runs = pd.read_csv(claims.TABLES / "published_results.csv")
    sums = runs.groupby("technique")[["value", "value_in_thesis"]].sum()
    assert {name: tuple(pair.round(4)) for name, pair in sums.iterrows()} == PUBLISHED


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.what)
def test_every_fault_has_its_place(fault):
    assert (mutants.ROOT / fault.file).read_text().count(fault.before) == 1
