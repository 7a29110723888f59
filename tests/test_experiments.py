"""Experiments: what each asks for; one of a user's own, from its parameters to its figure."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from sdaug_utils import plan, units
from sdaug_utils.errors import InputError
from sdaug_utils.experiments import base
from sdaug_utils.registry import experiments
from sdaug_utils.store import digest
from sdaug_utils.study import ROOT, open_study
from sdaug_utils.training import classifier, runs
from sdaug_utils.training.trainer import Trainer, accuracies, results_of
from tests.test_plan import parameters

NAME = "03-training-percentage"


def changed(p, **values):
    """Parameters with some others."""
    return type(p).model_validate(p.model_dump() | values)


def test_every_notebook_has_an_experiment_and_only_its_own_file_names_it():
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert list(experiments()) == names
    for path in (ROOT / "sdaug_utils").rglob("*.py"):
        module = f"experiments.{path.stem}"
        own = [name for name, one in experiments().items() if one.__module__.endswith(module)]
        for name in names:
            assert name in own or name not in path.read_text(), f"{path} names {name}"
        number = r'"(?:0[1-9]|1[0-2])"|(?:xperiment|otebook)s? (?:0[1-9]|1[0-2])'
        if "experiments" not in path.parts:
            assert not re.findall(number, path.read_text()), f"{path} names a number"


@pytest.mark.parametrize("name", list(experiments()))
def test_runs_are_listed_once_and_all_of_them_are_in_the_plan(world, store, name):
    p = parameters(name)
    study = open_study("smoke", store, domain=p.domain)
    asked = p.runs(study)
    keys = {digest(runs.spec(study, run)) for run in asked}
    assert len(set(asked)) == len(keys)
    p.check(study)
    work = units.Work(plan.units(plan.wanted([(name, study, p)])))
    assert work.counts()["runs"] == (len(keys), len(keys))
    assert work.counts()["images"][1] > 0


def test_views_are_varied_up_to_those_in_use(world):
    p = changed(parameters(NAME), view_numbers=[1, 2, 3], augmentations=["none", "custom"])
    asked = [run for run in p.by_views(world) if run.draw == run.seed == 0]
    found = results_of(world, asked).assign(num_views=[p.num_views(run) for run in asked])
    assert found.groupby("num_views")["real_percent"].apply(list).to_dict() == {
        1: [100, 10],
        2: [100, 10],
        3: [10],  # 12 views of 4 images; of 40 images two each
    }
    own = next(run for run in p.grid(world) if run.arm == "custom")
    same = found[(found["num_views"] == 2) & (found["real_percent"] == 100)].iloc[0]
    [plain] = results_of(world, [own]).to_dict("records")
    assert (same["scores"] == plain["scores"]).all()
    assert same["validation_score"] == plain["validation_score"]


def test_a_frozen_twin_has_the_same_updates_at_the_same_rate(world, monkeypatch):
    settings, train = [], classifier.train_controlled

    def recorded(sets, validation, test_features, recipe, num_classes):
        settings.append(recipe)
        return train(sets, validation, test_features, recipe, num_classes)

    monkeypatch.setattr(classifier, "train_controlled", recorded)
    world = world.changed({"classifier.published.image_size": 40})
    asked = parameters(NAME).by_protocol(world)
    sizes = [runs.study_of(world, run).settings.classifier.image_size for run in asked]
    assert sizes == [32] * 6 + [40] * 6  # twins see what their partners see
    results = results_of(world, asked[len(asked) // 2 :] + asked[: len(asked) // 2])
    twins, published = results[:6], results[6:]  # twins were asked for first
    assert set(published["protocol"]) == {"published"}
    assert set(twins["protocol"]) == {"controlled"}
    same = ["arm", "draw", "seed", "num_real", "num_synthetic", "num_updates"]
    pd.testing.assert_frame_equal(twins[same], published[same].reset_index(drop=True))
    assert twins["selected_step"].tolist() == twins["num_updates"].tolist()  # the last weights
    like = world.settings.classifier.published
    assert {(one.learning_rate, one.batch_size) for one in settings} == {
        (like.learning_rate, like.batch_size)
    }


def test_a_run_after_some_updates_is_the_beginning_of_a_longer_one(world):
    p = changed(parameters(NAME), curve_steps=[5, 10], augmentations=["none"])
    some = [run for run in p.by_length(world) if run.arm == "baseline"][:3]
    curve = accuracies(world, some)
    assert curve["step"].tolist() == [5, 10, 20]  # and the profile's own
    [whole, *_] = [run for run in p.grid(world) if run.arm == "baseline"]
    trainer, looks = Trainer(world), []
    [data] = trainer.head_sets([whole])
    held_out = trainer.test_features(whole), torch.from_numpy(world.data.splits["test"].labels)

    def look(step, head):
        looks.append((step, classifier.accuracy(head, *held_out)))

    classifier.train_head(data, world.settings.classifier.controlled, 2, 5, look)
    seen = dict(looks)
    assert curve["test_accuracy"].tolist() == [seen[5], seen[10], seen[20]]


def test_segmenters_are_trained_for_other_numbers_of_updates(world):
    p = parameters("08-segmentation")
    found = results_of(world, p.by_updates(world))
    assert found["num_updates"].tolist() == [3, 3, 6, 6]
    [baseline, *_] = p.by_updates(world)
    plain = baseline.model_copy(update={"overrides": ()})
    said = plain.changed({"segmenter.max_train_steps": 6})  # the profile's own, but said
    own, same = results_of(world, [plain, said])["scores"]
    assert (own == same).all()
    assert (found["scores"][2] == own).all()
    assert found["scores"][0].shape == own.shape


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"protocol": "published", "test_sets": ("none", "blur")}, "test_sets"),
        ({"protocol": "published", "updates_as": "published"}, "updates_as"),
        ({"protocol": "pixels", "augmentation": "custom"}, "an augmentation"),
        ({"task": "segmentation", "rule": "chance", "chosen_from": 2}, "a rule"),
        ({"overrides": (("data.main.folder", "x"),)}, "other data"),
    ],
)
def test_what_a_run_would_ignore_is_refused(world, more, message):
    run = runs.Run(**{"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0} | more)
    with pytest.raises(InputError, match=message):
        base.require_trainable(world, [run])
    fine = {"protocol": "controlled", "real_percent": 50, "draw": 0, "seed": 0}
    base.require_trainable(world, [runs.Run(**fine, overrides=(("datadream.rank", 1),))])


def test_extra_runs_are_of_the_controlled_protocol_whatever_the_main_table_is(world):
    p = changed(parameters(NAME), protocol="published")
    assert {run.protocol for run in p.grid(world)} == {"published"}
    extra = [*p.by_length(world), *p.by_views(world)]
    assert {run.protocol for run in extra} == {"controlled"}
    keys = {digest(runs.spec(world, run)) for run in extra}
    assert len(keys) == len(set(extra))
    p.check(world)


def test_runs_that_a_figure_could_not_tell_apart_are_refused(world):
    class Doubled(type(parameters("04-generation-percentage"))):
        def arms(self, study):
            arms = super().arms(study)
            return arms + [{**arm, "overrides": (("sampling.prompt", "a {}"),)} for arm in arms]

    p = Doubled.model_validate(dict(parameters("04-generation-percentage")))
    with pytest.raises(InputError, match="need a 'variant' each"):
        p.check(world)


EXPERIMENT = '''"""Experiment 12: does the prompt's wording matter?"""

from pydantic import Field

from sdaug_utils.experiments.base import Arm, Runs, baselines, synthetic
from sdaug_utils.params import Percent
from sdaug_utils.study import Study


class PromptWording(Runs):
    """Images by several prompts, each beside the same real images."""

    notebook = "12-prompt-wording"
    in_thesis = False
    percents = ("real_percents",)

    real_percents: list[Percent] = Field(min_length=1)
    prompts: dict[str, str] = Field(min_length=2)  # by the name that figures show
    synthetic_per_class: int = Field(ge=1)

    def arms(self, study: Study) -> list[Arm]:
        """The baselines, and plain prompts in each wording."""
        counts = [(percent, [self.synthetic_per_class]) for percent in self.real_percents]
        arms = synthetic(["stable-diffusion-prompt"], counts)
        return baselines(self.real_percents) + [
            {**arm, "overrides": (("sampling.prompt", prompt),), "variant": name}
            for name, prompt in self.prompts.items()
            for arm in arms
        ]
'''
CELLS = [
    """# 12 Prompt wording\n\n**Question.** Does the prompt's wording matter?""",
    """profile = "miniature"  # params/<profile>.yaml
protocol = "controlled"
real_percents = [5, 100]
prompts = {"bare": "{}", "plain": "A photo of a {}", "long": "A cute photo of a {}, sharp focus"}
synthetic_per_class = 50
num_draws = 3  # draws of the real subset
num_seeds = 1  # training runs per draw""",
    """import matplotlib.pyplot as plt

from sdaug_utils import make, params
from sdaug_utils.evidence import claims, figures, records
from sdaug_utils.study import open_study
from sdaug_utils.training.trainer import overview, results_of

p = params.from_notebook("12-prompt-wording", globals())
study = open_study(p.profile)
p.check(study)""",
    "What there is to do:",
    "grid = p.grid(study)\noverview(study, grid)",
    "make.make(study, p)",
    """results = records.kept(p.profile, "12", lambda: results_of(study, grid))
table = claims.gains(results)
table""",
    """figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
order = list(dict.fromkeys(table.loc[table["arm"] != "baseline", "arm"]))
figures.dots(axes, table[table["real_percent"] == min(p.real_percents)], order)
axes.set(xlabel="gain, points of accuracy")
figures.save(figure, p.profile, "fig-12-wording", table)
figures.show(figure)""",
    "What to read in it: a prompt helps if its whole interval is above 0.",
    """# NBVAL_CHECK_OUTPUT
print("every wording has run:", len(order) == len(p.prompts))""",
]

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def notebook(cells):
    """A notebook of these cells: Markdown where they are no Python."""
    made = []
    for place, source in enumerate(cells):
        is_text = place in (0, 3, 8)
        more = {} if is_text else {"outputs": [], "execution_count": None}
        tags = {"tags": ["parameters"]} if place == 1 else {}
        kind = "markdown" if is_text else "code"
        made.append(
            {"cell_type": kind, "id": f"c{place}", "metadata": tags, "source": source} | more
        )
    return json.dumps(
        {"cells": made, "metadata": {"kernelspec": KERNEL}, "nbformat": 4, "nbformat_minor": 5}
    )


def test_an_experiment_of_a_user_s_own_is_one_file_and_a_notebook(tmp_path):
    assert len(EXPERIMENT.splitlines()) <= 40
    assert len(CELLS) == 10
    assert f"```python\n{EXPERIMENT.rstrip()}\n```" in (ROOT / "CONTRIBUTING.md").read_text()
    project = tmp_path / "project"
    for name in ("sdaug_utils", "params"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.py", project)
    (project / "miniature").symlink_to(ROOT / "miniature")
    (project / "benchmarks").symlink_to(ROOT / "benchmarks")
    (project / "notebooks").mkdir()
    (project / "sdaug_utils" / "experiments" / "prompt_wording.py").write_text(EXPERIMENT)
    (project / "notebooks" / "12-prompt-wording.ipynb").write_text(notebook(CELLS))
    changes = {"real_percents": "[50, 100]", "synthetic_per_class": "2", "num_draws": "2"}
    options = [part for key, value in changes.items() for part in ("-p", f"12.{key}", value)]
    environment = os.environ | {"PYTHONPATH": str(project), "SDAUG_OUTPUT": str(tmp_path)}
    command = [sys.executable, "run_all.py", "--profile", "smoke", "--only", "12", *options]
    for more in (["--dry-run"], ["--workers", "2"]):
        done = subprocess.run(
            [*command, *more], cwd=project, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    [figure] = tmp_path.glob("figures/*/fig-12-wording.png")
    table = pd.read_csv(figure.with_suffix(".csv"))
    arms = ["baseline", *(f"stable-diffusion-prompt+{x}" for x in ("bare", "plain", "long"))]
    assert list(dict.fromkeys(table["arm"])) == arms
    prompts = {
        json.loads(spec.read_text())["prompt"] for spec in tmp_path.glob("store/pools/*/spec.json")
    }
    assert {"trouser", "A photo of a bag", "A cute photo of a bag, sharp focus"} <= prompts
