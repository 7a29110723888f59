"""What experiments need, as a list of units: pieces of work that any process or machine can do.

The list is the same on every machine, whatever its store has got. Every estimate (time, disk,
counts) is a sum over this list, and everything that makes artefacts works through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sdaug_utils import params, rates
from sdaug_utils.data import datasets, photos
from sdaug_utils.errors import InputError
from sdaug_utils.experiments.base import Experiment
from sdaug_utils.generation.foundation import revision
from sdaug_utils.generation.pools import BLOCK, fill
from sdaug_utils.generation.technique import Request, technique_requests
from sdaug_utils.params import Settings
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store, digest
from sdaug_utils.study import Study, open_study
from sdaug_utils.training import runs, trainer
from sdaug_utils.training.runs import Run
from sdaug_utils.units import (
    FEATURE_BYTES,
    Unit,
    features_left,
    features_of_data,
    images_left,
    learn,
    models_left,
    runs_left,
)

MOST_IMAGES, LONGEST = 500, 120  # of a unit: images, and the seconds that their generation takes
PNG_BYTES = 1.8  # per pixel of a photograph
Asked = Sequence[tuple[str, Study, Experiment]]  # notebooks' names, studies, parameters


@dataclass
class Wanted:
    """What notebooks ask of a study, each thing once, with the first notebook that asks for it."""

    images: dict[str, dict[int, str]] = field(default_factory=dict)  # by pool and index
    requests: dict[str, Request] = field(default_factory=dict)  # one for each pool
    runs: dict[Run, str] = field(default_factory=dict)
    unshared: int = 0  # images, if no two settings shared any, as in the thesis

    def counts(self) -> dict[str, int]:
        """How many images, personalised models and training runs."""
        models = {digest(request.model) for request in self.requests.values() if request.model}
        images = sum(map(len, self.images.values()))
        return {"images": images, "models": len(models), "runs": len(self.runs)}

    def folders(self, study: Study) -> list[Path]:
        """The store's folders of all pools, models and runs, whether they exist yet or not."""
        with_model = [request for request in self.requests.values() if request.model]
        return [
            *(study.store.root / "pools" / key for key in self.images),
            *(study.store.folder(one.technique.model_folder, one.model) for one in with_model),
            *(runs.folder_of(study, run) for run in self.runs),
        ]

    def ask(self, requests: Iterable[Request], notebook: str = "") -> None:
        """Add the images of some requests."""
        for request in requests:
            key = digest(request.spec)
            self.requests.setdefault(key, request)
            # An image that is asked for already keeps its first notebook.
            self.images[key] = dict.fromkeys(request.indices, notebook) | self.images.get(key, {})

    def add(self, notebook: str, study: Study, p: Experiment) -> None:
        """Add what a notebook needs, given its parameters."""
        requests = p.requests(study)
        self.ask(requests, notebook)
        self.unshared += sum(len(request.indices) for request in requests)
        # A dictionary keeps the order, which a set does not.
        pools, settings = dict[tuple[Any, ...], None](), set()
        for run in p.runs(study):
            self.runs.setdefault(run, notebook)
            if run.technique:
                settings.add((run.arm, run.draw, run.num_made, run.real_percent))
                own = runs.study_of(study, run)
                percent = runs.pool_percent(own, run)
                pools[own, run.technique, run.draw, run.num_made, percent] = None
        for arguments in pools:
            self.ask(technique_requests(*arguments), notebook)
        self.unshared += len(study.data.class_names) * sum(count for _, _, count, _ in settings)


def wanted(asked: Asked) -> dict[Study, Wanted]:
    """What notebooks need of each study."""
    found: dict[Study, Wanted] = {}
    for notebook, study, p in asked:
        what = found.setdefault(study, Wanted())
        earlier, what.requests = what.requests, {}
        what.add(notebook, study, p)
        # Later notebooks' first. Any order would do, but another would group models anew.
        what.requests |= earlier
    return found


def by_notebook(asked: Asked) -> dict[str, Wanted]:
    """What each notebook needs, by its name."""
    found: dict[str, Wanted] = {}
    for job in asked:
        [found[job[0]]] = wanted([job]).values()  # of its one study
    return found


def first_units(asked: Asked) -> list[Unit]:
    """What has to be there before a plan: subjects are chosen by the features of real images."""
    studies = dict.fromkeys(study for _, study, p in asked if p.needs_features)
    return [features_of_data(study, "") for study in studies]


def units(needed: dict[Study, Wanted]) -> list[Unit]:
    """All that is needed, in pieces; what a unit needs comes before it."""
    return [unit for study, what in needed.items() for unit in Planner(study, what).units()]


STAGES = (first_units, lambda asked: units(wanted(asked)))
"""Two functions that list units. The units of the first must be made before the second is called,
since subjects are chosen by the features of real images."""


class Planner:
    """Cuts what is wanted of one study into units."""

    def __init__(self, study: Study, wanted: Wanted) -> None:
        self.study, self.settings, self.wanted = study, study.settings, wanted
        self.seconds = rates.seconds_by_kind(study.settings)
        self.image_bytes = PNG_BYTES * self.settings.sampling.resolution**2
        self.is_large = rates.is_at_scale(self.settings)
        self.makers: dict[str, set[str]] = {}  # of each pool: keys of the units that make images
        # To hash a specification is slow: its key is looked up by the object's id, which stays the
        # same in all parts of a request.
        self.keys = {id(request.spec): key for key, request in wanted.requests.items()}

    def units(self) -> list[Unit]:
        """Models before their images, images before what trains on them."""
        # Pools that a unit may make together: of one technique, its settings and its model.
        together: dict[tuple[str, Study, str], list[Request]] = {}
        # Models that stay in the store, by who learns them: of each, the pools that it serves.
        kept: dict[tuple[str, Study], dict[str, list[Request]]] = {}
        owners: dict[str, tuple[str, Study]] = {}  # who learns a model that several share
        for key, request in self.wanted.requests.items():
            whole = replace(request, indices=sorted(self.wanted.images[key]))
            technique, study = request.technique, request.study
            model = digest(request.model) if request.model else ""
            together.setdefault((technique.name, study, model), []).append(whole)
            if model and technique.keeps_models(study.settings):
                owner = owners.setdefault(model, (technique.model_folder, study))
                kept.setdefault(owner, {}).setdefault(model, []).append(whole)
        made, learnt = list[Unit](), dict[str, Unit]()
        for (model_folder, study), models in kept.items():
            made += self.models(model_folder, study, models, learnt)
        for (_, _, model), requests in together.items():
            if model and model not in learnt:  # one unit learns it, uses it and deletes it
                counts = [[self.pool_of(r), len(r.indices)] for r in requests]
                made.append(self._image_unit(requests, counts, None, learns_model=True))
            else:
                made += self.images(requests, learnt.get(model))
        return [*made, *self.training()]

    def pool_of(self, request: Request) -> str:
        """The key of the pool that a part of a request is of."""
        return self.keys[id(request.spec)]

    def models(
        self,
        model_folder: str,
        study: Study,
        models: dict[str, list[Request]],
        learnt: dict[str, Unit],
    ) -> list[Unit]:
        """Units for models that are kept, each with as many models as are learnt together.

        The units are added to ``learnt``, by the models' keys.
        """
        technique, made = techniques()[model_folder], []
        size, keys = technique.at_once(study.settings), list(models)
        cost, number = technique.model_cost(study.settings)
        for start in range(0, len(keys), size):
            some = keys[start : start + size]
            pools = [models[key] for key in some]
            unit = Unit(
                name=f"{model_folder}: models {start + 1} to {start + len(some)} of {len(keys)}",
                key=f"models-{digest({'models': some})}",
                kind="models",
                items=len(some),
                left=partial(models_left, study, pools),
                make=partial(learn, study, pools),
                seconds=len(some) * number * self.seconds[cost],
                num_bytes=len(some) * technique.model_bytes * self.is_large,
                notebook=self._first_notebook(pools[0]),
            )
            learnt |= dict.fromkeys(some, unit)
            made.append(unit)
        return made

    def images(self, requests: Sequence[Request], model: Unit | None) -> list[Unit]:
        """Units for a model's images. Each has whole blocks of pools, for one notebook.

        A unit has at most ``MOST_IMAGES`` images and takes about ``LONGEST`` seconds, but has at
        least one block.
        """
        each = self.seconds[requests[0].technique.image_cost]
        most = max(BLOCK, min(MOST_IMAGES, int(LONGEST / max(each, 1e-9))))
        blocks = [
            replace(request, indices=list(some))
            for request in requests
            for _, some in itertools.groupby(request.indices, lambda index: index // BLOCK)
        ]
        parts: list[list[Request]] = []
        for _, same_notebook in itertools.groupby(blocks, lambda one: self._first_notebook([one])):
            count = most  # so that the first block opens a part
            for block in same_notebook:
                if count + len(block.indices) > most:
                    parts.append([])
                    count = 0
                parts[-1].append(block)
                count += len(block.indices)
        made = []
        for part in parts:
            known = [[self.pool_of(b), b.indices[0], b.indices[-1], len(b.indices)] for b in part]
            whole = []  # blocks of one pool are one request again
            for _, group in itertools.groupby(part, self.pool_of):
                first, *others = group
                indices = itertools.chain(first.indices, *(block.indices for block in others))
                whole.append(replace(first, indices=list(indices)))
            made.append(self._image_unit(whole, known, model))
        return made

    def _image_unit(
        self,
        parts: Sequence[Request],
        known: list[Any],
        model: Unit | None,
        learns_model: bool = False,
    ) -> Unit:
        """One unit that makes the images of ``parts``.

        Args:
            known: what is hashed into the unit's key.
            model: the unit that learns the personalised model, if there is one.
            learns_model: this unit learns the model itself, and deletes it in the end.
        """
        first, count = parts[0], sum(len(request.indices) for request in parts)
        technique = first.technique
        key = f"images-{digest({'images': known})}"
        for request in parts:
            self.makers.setdefault(self.pool_of(request), set()).add(key)
        learning = temporary = 0.0
        if learns_model:
            cost, number = technique.model_cost(first.study.settings)
            learning = number * self.seconds[cost]
            temporary = technique.model_bytes * self.is_large
        model_too = "a model, " if learns_model else ""
        return Unit(
            name=f"{technique.name}, {first.spec['class']}: {model_too}{count} images from "
            f"{first.indices[0]}, draw {first.spec['draw']}",
            key=key,
            kind="images",
            items=count,
            left=partial(images_left, first.study, parts),
            make=partial(fill, first.study, parts),
            seconds=learning + count * self.seconds[technique.image_cost],
            num_bytes=count * self.image_bytes,
            temporary_bytes=temporary,
            temporary_models=int(learns_model),
            needs=frozenset([model.key] if model else ()),
            notebook=self._first_notebook(parts),
        )

    def _first_notebook(self, requests: Sequence[Request]) -> str:
        first = requests[0]
        return self.wanted.images[self.pool_of(first)][first.indices[0]]

    def _key(self, kind: str, some: Sequence[Run]) -> str:
        known = {"domain": self.study.domain, kind: [run.model_dump() for run in some]}
        return f"{kind}-{digest(known)}"

    def training(self) -> list[Unit]:
        """Units for features and training runs."""
        data: dict[tuple[Any, ...], Unit] = {}  # features of the data set
        needs: dict[Run, set[str]] = {}
        for run, notebook in self.wanted.runs.items():
            own = runs.study_of(self.study, run)
            units = []
            for test_sets in dict.fromkeys([(), run.test_sets]):  # the data set's own first
                features = (*runs.features_by(own), test_sets)
                if features not in data:
                    data[features] = features_of_data(own, notebook, test_sets)
                units.append(data[features].key)
            makers = (self.makers.get(key, set()) for key in runs.pool_keys(self.study, run))
            needs[run] = set(units).union(*makers)
        shared = self._features(needs)
        return [*data.values(), *shared, *dict.fromkeys(self._runs(needs).values())]

    def _features(self, needs: dict[Run, set[str]]) -> list[Unit]:
        """Units for features that runs share; each is added to the ``needs`` of its runs."""
        made, views = [], dict[tuple[Any, ...], int]()
        for group in _with_features_in_common(self.study, needs):
            number = rates.features_to_compute(self.study, group, views)
            unit = Unit(
                name=f"features of {group[0].arm}, draw {group[0].draw}",
                key=self._key("features", group),
                kind="features",
                items=number,
                left=partial(features_left, self.study, group, number),
                make=partial(trainer.prepare, self.study, group),
                seconds=number * self.seconds["feature"],
                num_bytes=number * FEATURE_BYTES,
                needs=frozenset().union(*(needs[run] for run in group)),
                notebook=self.wanted.runs.get(group[0], ""),
            )
            made.append(unit)
            for run in group:
                needs[run] = needs[run] | {unit.key}
        return made

    def _runs(self, needs: dict[Run, set[str]]) -> dict[Run, Unit]:
        """The unit that trains each run."""
        by_notebook: dict[str, list[Run]] = {}
        for run, notebook in self.wanted.runs.items():
            by_notebook.setdefault(notebook, []).append(run)
        made: dict[Run, Unit] = {}
        for notebook, own in by_notebook.items():
            for some in trainer.stacks(own):
                partners = {made[run.partner].key for run in some if run.partner in made}
                unit = Unit(
                    name=f"{len(some)} runs from {some[0].arm}, {some[0].real_percent:g} % real, "
                    f"draw {some[0].draw}",
                    key=self._key("runs", some),
                    kind="runs",
                    items=len(some),
                    left=partial(runs_left, self.study, some),
                    make=partial(trainer.make, self.study, some),
                    seconds=sum(rates.run_seconds(self.study, run, self.seconds) for run in some),
                    needs=frozenset(partners).union(*(needs[run] for run in some)),
                    notebook=notebook,
                )
                made |= dict.fromkeys(some, unit)
        return made


def _with_features_in_common(study: Study, asked: Iterable[Run]) -> list[list[Run]]:
    """Runs of heads, grouped by pools and augmentation or, without pools, by the augmentation.

    Runs that differ in their seed alone have one set of features.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in asked:
        if run.task != "classification" or run.protocol != "controlled" or run.seed:
            continue
        seen_by = runs.features_by(runs.study_of(study, run))
        # Of fewer images, augmentation makes more views.
        percent = run.real_percent if run.augmentation != "none" else 0
        if run.technique:
            pools = (run.draw, *runs.pool_keys(study, run), run.controls_from_outside, percent)
            key = (run.technique, run.augmentation, *seen_by, *pools)
            groups.setdefault(key, []).append(run)
        elif run.augmentation != "none":
            groups.setdefault((run.augmentation, *seen_by), []).append(run)
    return list(groups.values())


def models(settings: Settings) -> list[tuple[str, str]]:
    """Name and part of all models that a profile names: the foundation and what goes with it."""
    others = [technique.models(settings).values() for technique in techniques().values()]
    return [(settings.foundation, ""), *(model for each in others for model in each)]


def planned(profile: str, domain: params.Domain) -> tuple[Study, list[str]]:
    """A study for planning without a download, and the names of the models and data it lacks.

    The miniature model replaces each missing model; the store has no such images, so all count as
    missing. A stand-in with the published number of images replaces a missing data set. Raises
    InputError if the sizes of a missing data set are not known.
    """
    settings, absent = params.load_settings(profile, domain), []
    for name, part in models(settings):
        try:
            revision(name, part)
        except InputError:
            absent.append(name)
    changes: dict[str, Any] = {}  # of all fields that name a missing model
    for key, value in settings:
        if value in absent:
            changes[key] = "miniature"
        elif isinstance(value, params.Parameters):
            here = {field: "miniature" for field, name in value if name in absent}
            changes[key] = value.model_copy(update=here)
    if rates.is_at_scale(settings) and settings.device == settings.precision == "auto":
        changes["precision"] = "float16"  # as on the GPU host, wherever the plan is made
    chosen = settings.data[domain]
    try:
        data = open_study(profile, domain=domain, download=False).data
    except InputError:
        if chosen.name not in photos.SIZES:
            raise
        absent.append(chosen.name)
        whole = photos.stand_in(chosen.name)
        data = datasets.restricted(whole, chosen.classes, chosen.max_images_per_class)
    return Study(profile, settings.model_copy(update=changes), data, Store(), domain), absent


def costs(study: Study, names: Iterable[str], count: int, real_percent: float) -> pd.DataFrame:
    """What ``count`` images of each class cost by some techniques, for one draw: a row for each.

    Columns: ``technique``, ``images``, ``models``, and by the rates in use ``learning`` and
    ``sampling``, in seconds.
    """
    seconds, rows = rates.seconds_by_kind(study.settings), []
    for name in names:
        technique, needed = techniques()[name], Wanted()
        needed.ask(technique_requests(study, name, 0, count, real_percent))
        counts = needed.counts()
        row = {"technique": name, "images": counts["images"], "models": counts["models"]}
        kind, number = technique.model_cost(study.settings) if technique.learns else ("", 0)
        row["learning"] = counts["models"] * number * seconds.get(kind, 0.0)
        rows.append(row | {"sampling": counts["images"] * seconds[technique.image_cost]})
    return pd.DataFrame(rows)
