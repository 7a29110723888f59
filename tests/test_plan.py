"""Units: what experiments need, each thing once, and the sums that are told of it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdaug_utils import notebooks, params, plan, summary, units
from sdaug_utils.experiments import base
from sdaug_utils.generation.pools import technique_pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.registry import experiments, techniques
from sdaug_utils.store import Store, digest
from sdaug_utils.study import ROOT, open_study, write_config
from sdaug_utils.training import runs

ASKED = ("02-different-subjects", "09-food-101")


def parameters(notebook, profile="smoke"):
    path = notebooks.NOTEBOOKS / f"{notebook}.ipynb"
    values = params.parameters_cell(path) | params.notebook_section(profile, notebook)
    return params.check_notebook(notebook, values)


def asked(store=None, names=ASKED, profile="smoke"):
    """Some notebooks, with their studies."""
    opened = {d: open_study(profile, store, domain=d) for d in ("main", "second")}
    return [(name, opened[experiments()[name].domain], parameters(name)) for name in names]


def units_of(some):
    return plan.units(plan.wanted(some))


def unit(key, seconds=1.0, needs=(), **more):
    given = {"kind": "images", "items": 1, "left": lambda: 1, "make": lambda: None} | more
    return units.Unit(name=key, key=key, seconds=seconds, needs=frozenset(needs), **given)


def thesis_units(**changes):
    """The thesis profile, planned by its published sizes: nothing of it need be here."""
    paths = notebooks.chosen(None)
    jobs = notebooks.check(paths, "thesis", Path(os.environ["SDAUG_STORE"]), offline=True)
    return units_of(summary.asked_for(jobs))


def test_every_process_plans_the_same_list():
    script = (
        "from tests.test_plan import asked, plan, units_of;"
        "print([unit.key for unit in (*plan.first_units(asked()), *units_of(asked()))])"
    )
    lists = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(lists) == 1


def test_the_list_is_what_the_notebooks_need_each_thing_once(store):
    names = ("03-training-percentage", "04-generation-percentage", "06-controlnet")
    some = asked(store, names)
    listed = units_of(some)
    before = set()
    for one in listed:  # what a unit needs comes before it
        assert one.needs <= before
        assert one.key not in before
        before.add(one.key)
    images, models, keys = set(), set(), set()
    for _, study, p in some:
        for run in p.runs(study):
            keys.add(digest(runs.spec(study, run)))
            if not run.technique:
                continue
            percent = runs.pool_percent(study, run)
            for request in technique_requests(
                study, run.technique, run.draw, run.num_made, percent
            ):
                images |= {(digest(request.spec), index) for index in request.indices}
                if request.model:
                    models.add(digest(request.model))
    counts = units.Work(listed).counts()
    assert counts["images"] == (len(images), len(images))
    assert counts["models"] == (len(models), len(models))
    assert counts["runs"] == (len(keys), len(keys))
    by_notebook = [units.Work(listed).of(name).counts() for name in names]
    for kind, total in counts.items():
        parts = [part.get(kind, (0, 0)) for part in by_notebook]
        assert tuple(map(sum, zip(*parts, strict=True))) == total or kind == "features"


def test_what_is_made_is_not_left(store):
    some = asked(store, ["09-food-101"])
    for one in units_of(some):
        one.make()
    again = units.Work(units_of(some))
    assert not again.waiting
    assert again.seconds() == again.gibibytes() == again.hours_on(1) == 0
    assert all(left == 0 < items for left, items in again.counts().values() if items)


def test_sums_and_bounds():
    half = {"items": 4, "left": lambda: 2, "num_bytes": 8 * units.GIB}
    work = units.Work(
        [
            unit("base", 2),
            unit("upon it", 9, {"base"}),
            unit("half", 8, **half),
            unit("made", 100, left=lambda: 0),
            unit("passing", 1, temporary_bytes=3 * units.GIB, temporary_models=1),
        ]
    )
    assert work.seconds() == 2 + 9 + 4 + 1
    assert work.longest_paths() == {"base": 11, "upon it": 9, "half": 4, "passing": 1}
    assert work.counts() == {"images": (5, 8), "models": (1, 1), "runs": (0, 0)}
    assert work.gibibytes(workers=2) == 4 + 3 * 3
    assert work.hours_on(1) * 3600 == pytest.approx(16)
    assert work.hours_on(16) * 3600 == pytest.approx(11)  # no sooner than the longest path


def test_a_model_that_is_not_kept_lives_with_its_images():
    listed = thesis_units()
    dreambooth = techniques()["dreambooth"]
    passing = [one for one in listed if one.temporary_bytes]
    assert {one.temporary_bytes for one in passing} == {dreambooth.model_bytes}
    assert len(passing) == sum(one.temporary_models for one in passing) > 200
    assert not [one for one in listed if one.name.startswith("dreambooth: models")]
    work = units.Work(listed)
    lasting = sum(one.num_bytes for one in listed) / units.GIB
    for workers in (1, 8):  # never more than workers + 1 of them, however the list is gone through
        there = (workers + 1) * dreambooth.model_bytes / units.GIB
        assert work.gibibytes(workers) == pytest.approx(lasting + there)


def test_it_is_learnt_once_and_gone_when_its_images_are_there(store, monkeypatch):
    learnt, most = [], []
    dreambooth = techniques()["dreambooth"]
    learn = type(dreambooth).learn

    def noted(self, study, pipeline, requests, *rest):
        learnt.extend(digest(request.model) for request in requests)
        learn(self, study, pipeline, requests, *rest)
        most.append(len(list((store.root / "dreambooth").glob("*"))))

    monkeypatch.setattr(type(dreambooth), "learn", noted)
    [(name, study, p)] = asked(store, ["02-different-subjects"])
    section = study.settings.dreambooth.model_copy(update={"keep_models": False})
    settings = study.settings.model_copy(update={"dreambooth": section})
    own = [(name, dataclasses.replace(study, settings=settings), p)]
    for listed in (plan.first_units, units_of):
        for one in listed(own):
            one.make()
    assert len(set(learnt)) == len(learnt) > 1
    assert max(most) == 1  # the one that is learnt
    assert not [path for path in (store.root / "dreambooth").iterdir() if path.name in learnt]
    assert not units.Work(units_of(own)).waiting


def test_many_gpus_are_kept_busy():
    work = units.Work(thesis_units())
    alone = work.hours_on(1)
    for number in (8, 64):
        assert alone / (number * work.hours_on(number)) >= 0.85


def test_two_domains_of_one_data_set_are_told_apart(store):
    few = {"train": 20, "validation": 5, "test": 5}
    second = {"name": "fashion-mnist", "classes": ["coat", "dress"], "max_images_per_class": few}
    profile, _ = write_config("smoke", changes=[(["common", "data", "second"], second)])
    some = asked(store, ("04-generation-percentage", "09-food-101"), profile)
    needed = plan.wanted(some)
    for study, what in needed.items():
        made = {request.spec["class"] for request in what.requests.values()}
        assert made == set(study.data.class_names)
    listed = plan.units(needed)
    assert sum(one.name == "features of fashion-mnist" for one in listed) == 2
    assert len({one.key for one in listed}) == len(listed)


@pytest.mark.parametrize(
    ("technique", "override"),
    [
        ("dreambooth", ("dreambooth.max_train_steps", 1)),
        ("stable-diffusion-prompt", ("sampling.guidance_scale", 4.0)),
    ],
)
def test_units_make_images_by_the_settings_that_a_run_overrides(
    world, tmp_path, technique, override
):
    arms = base.synthetic([technique], [(50, [1])])
    plain = runs.repeated(arms, "controlled", 1, 1)
    other = [run.changed(dict([override])) for run in plain]
    p = SimpleNamespace(requests=lambda _: [], runs=lambda _: plain + other)
    made = plan.units(plan.wanted([("any", world, p)]))
    assert units.Work(made).counts()["runs"] == (2, 2)
    for unit in made:
        unit.make()
    changed = open_study("smoke", Store(tmp_path / "other")).changed(dict([override]))
    expected = technique_pools(changed, technique, 0, 1, runs.pool_percent(changed, plain[0]))
    for pool in expected:
        [file] = pool.files
        there = world.store.root / "pools" / file.parent.name / file.name
        assert there.read_bytes() == file.read_bytes()


def test_techniques_that_share_a_model_make_their_own_images(world, tmp_path):
    names = ["textual-inversion", "da-fusion", "diff-mix"]
    asked_for = runs.repeated(base.synthetic(names, [(50, [2])]), "controlled", 1, 1)
    p = SimpleNamespace(requests=lambda _: [], runs=lambda _: asked_for)
    made = plan.units(plan.wanted([("any", world, p)]))
    assert units.Work(made).counts()["models"] == (2, 2)  # a word for each class
    for unit in made:
        unit.make()
    alone = open_study("smoke", Store(tmp_path / "alone"))
    for name in names:
        for pool in technique_pools(alone, name, 0, 2, 50):
            for file in pool.files:
                there = world.store.root / "pools" / file.parent.name / file.name
                assert there.read_bytes() == file.read_bytes(), name
