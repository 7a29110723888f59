"""The work list: all that notebooks need, in pieces that may be made anywhere.

The list is the same on every machine, whatever its store has got: a task is known by its key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdaug_utils import params, plan
from sdaug_utils.data import shifts
from sdaug_utils.experiments import Beside
from sdaug_utils.generation.pools import BLOCK, fill, learn_models, number_missing
from sdaug_utils.generation.technique import Request
from sdaug_utils.plan import Needs
from sdaug_utils.registry import techniques
from sdaug_utils.store import KINDS, digest
from sdaug_utils.study import Study
from sdaug_utils.training import cells, features
from sdaug_utils.training.cells import Cell

MOST_IMAGES, LONGEST = 500, 120  # of a task: images, and the seconds that their generation takes
Rates = Mapping[str, Any]  # seconds, by kind of work


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """A piece of work that is safe to do again: what of it the store has is not made twice."""

    study: Study
    name: str  # for people
    key: str
    items: int  # how many it makes
    seconds: float  # by the rates in use
    after: frozenset[str] = frozenset()  # keys of the tasks whose results it needs
    home: str = ""  # what a worker has at hand that has done such a task before
    compiles: str = ""  # what a worker compiles first that has not done such a task before
    kind = "tasks"  # what it makes

    def left(self) -> int:
        """How many of its items the store has not got."""
        raise NotImplementedError

    def make(self) -> None:
        """Make what is left."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Images(Task):
    """Images of a model's pools, or of pools by a model that is given, in whole blocks."""

    requests: Sequence[Request]  # of these images and no others
    kind = "images"

    def left(self) -> int:
        return sum(number_missing(self.study, request) for request in self.requests)

    def make(self) -> None:
        fill(self.study, self.requests, keep=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Models(Task):
    """Personalised models, as many as learn in one go; none whose images are all there."""

    pools: Sequence[Sequence[Request]]  # of each model
    kind = "models"

    def _lacking(self) -> list[Request]:
        firsts = [pools[0] for pools in self.pools if not self._is_served(pools)]
        return [request for request in firsts if not self._is_there(request)]

    def _is_there(self, request: Request) -> bool:
        return self.study.store.is_whole(self._folder(request))

    def _is_served(self, pools: Sequence[Request]) -> bool:
        return not any(number_missing(self.study, request) for request in pools)

    def _folder(self, request: Request) -> Path:
        return self.study.store.folder(request.technique.shelf, request.model)

    def left(self) -> int:
        return len(self._lacking())

    def make(self) -> None:
        learn_models(self.study, self._lacking())

    def drop(self) -> None:
        """Delete those that are not to be kept, once all their images are there."""
        for pools in self.pools:
            first, technique = pools[0], pools[0].technique
            if technique.keeps_models(self.study.settings) or not self._folder(first).exists():
                continue
            if self._is_served(pools):
                self.study.store.drop(technique.shelf, first.model)


@dataclass(frozen=True, eq=False, kw_only=True)
class Features(Task):
    """Features of the data set, or of what some cells train on."""

    cells: Sequence[Cell] = ()
    kind = "features"

    def left(self) -> int:
        if self.cells:
            is_needed = not all(cells.is_made(self.study, cell) for cell in self.cells)
            return self.items * is_needed
        every = self.study.data.splits.values()
        return sum(len(s) for s in every if not features.have_features(self.study, s.images()))

    def make(self) -> None:
        trainer = cells.trainer_of(self.study)
        for cell in sorted(self.cells, key=lambda cell: -cell.num_made):
            trainer.prepare(cell)
        for name in self.study.data.splits if not self.cells else ():
            trainer.features_of(name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Runs(Task):
    """Training runs: heads side by side, anything else alone."""

    cells: Sequence[Cell]
    kind = "runs"

    def left(self) -> int:
        return sum(not cells.is_made(self.study, cell) for cell in self.cells)

    def make(self) -> None:
        cells.make(self.study, self.cells, trainer=cells.trainer_of(self.study))


@dataclass(frozen=True, eq=False, kw_only=True)
class RunsBeside(Task):
    """What an experiment measures beside its main table; that it is made is noted in the store."""

    beside: Beside
    spec: dict[str, Any] = field(default_factory=dict)
    kind = "runs"

    def left(self) -> int:
        store = self.study.store
        return self.items * (not store.is_whole(store.folder("beside", self.spec)))

    def make(self) -> None:
        def run(_: Path) -> None:
            self.beside.run()

        self.study.store.get("beside", self.spec, run)


def first_tasks(pairs: Iterable[tuple[Study, params.Experiment]]) -> list[Task]:
    """What has to be there before a plan: subjects are chosen by the features of real images."""
    studies = dict.fromkeys(study for study, p in pairs if isinstance(p, params.Subjects))
    return [_of_splits(study, plan.rates(study.settings)[1]) for study in studies]


def work_list(pairs: Iterable[tuple[Study, params.Experiment]]) -> list[Task]:
    """All that experiments need of their studies; what several need counts once."""
    wanted: dict[Study, Needs] = {}
    for study, p in pairs:
        wanted.setdefault(study, Needs()).add(plan.needs(study, p))
    return [
        task
        for study, needs in wanted.items()
        for task in tasks(study, needs, plan.rates(study.settings)[1])
    ]


def hours(study: Study, wanted: Needs, rates: Rates) -> Any:
    """How long it takes to make what is wanted, one piece after the other, where the rates are of.

    Rates may be arrays: several in one go.
    Start of the notebooks and drawing of the figures are left out.
    """
    every = tasks(study, wanted, rates)
    compiled = {task.compiles for task in every} - {""}
    parts = [task.seconds for task in every] + [rates[plan.COMPILATION] for _ in compiled]
    return sum(parts, start=0.0 * next(iter(rates.values()))) / 3600


def left_to_make(study: Study, p: params.Experiment) -> str:
    """One line: what of an experiment is still to be made, and about how long that takes here."""
    needed = plan.needs(study, p)
    missing = plan.missing(study, needed, plan.Needs())
    pairs = zip(missing.counts(), needed.counts(), strict=True)
    counts = dict(zip(KINDS.values(), pairs, strict=True))
    if not any(lacking for lacking, _ in counts.values()):
        made = ", ".join(f"{whole:,} {what}" for what, (_, whole) in counts.items() if whole)
        return f"All made already: {made}."
    lacks = ", ".join(
        f"{lacking:,} of {whole:,} {what}" for what, (lacking, whole) in counts.items() if whole
    )
    source, rates = plan.rates(study.settings)
    took = hours(study, missing, rates)
    shown = f"{took:.1f} hours" if took > 1 else f"{60 * took:.1f} minutes"
    return f"To be made: {lacks}: about {shown} in one process (rates: {source})."


def tasks(study: Study, wanted: Needs, rates: Rates) -> list[Task]:
    """All that is wanted of one study, in pieces."""
    of_model: dict[str, list[Request]] = {}  # pools, by model or else by technique
    for key, request in wanted.requests.items():
        own = replace(request, indices=sorted(wanted.images[key]), at=None)
        home = digest(request.model) if request.model else request.technique.name
        of_model.setdefault(home, []).append(own)
    models = _models(study, wanted, of_model, rates)
    learnt = {digest(pools[0].model): task.key for task in models for pools in task.pools}
    images = [
        task
        for home, requests in of_model.items()
        for task in _images(study, home, requests, rates, learnt.get(home))
    ]
    of_pool: dict[str, set[str]] = {}  # keys of the tasks that make a pool's images
    for task in images:
        for request in task.requests:
            of_pool.setdefault(digest(request.spec), set()).add(task.key)
    return [*models, *images, *_training(study, wanted, of_pool, rates)]


def _models(
    study: Study, wanted: Needs, of_model: dict[str, list[Request]], rates: Rates
) -> list[Models]:
    by_technique: dict[str, list[str]] = {}
    for key, technique in wanted.models.items():
        by_technique.setdefault(technique.shelf, []).append(key)
    made = []
    for name, keys in by_technique.items():
        technique = techniques()[name]
        size = technique.at_once(study.settings)
        cost, number = technique.model_cost(study.settings)
        for start in range(0, len(keys), size):
            some = keys[start : start + size]
            made.append(
                Models(
                    study=study,
                    name=f"{name}: models {start + 1} to {start + len(some)} of {len(keys)}",
                    key=f"models {digest({'models': some})}",
                    items=len(some),
                    seconds=len(some) * number * rates[cost],
                    home=technique.kind,
                    compiles=f"learning by {name}" if study.settings.compile else "",
                    pools=[of_model[key] for key in some],
                )
            )
    return made


def _images(
    study: Study, home: str, requests: Sequence[Request], rates: Rates, model: str | None
) -> list[Images]:
    """Whole blocks of pools, in tasks that are neither large nor long."""
    technique = requests[0].technique
    each = rates[technique.image_cost]
    most = max(BLOCK, min(MOST_IMAGES, int(LONGEST / max(np.max(each), 1e-9))))
    blocks = [
        replace(request, indices=list(some))
        for request in requests
        for _, some in itertools.groupby(request.indices, lambda index: index // BLOCK)
    ]
    parts: list[list[Request]] = [[]]
    for block in blocks:
        if parts[-1] and sum(len(r.indices) for r in parts[-1]) + len(block.indices) > most:
            parts.append([])
        parts[-1].append(block)
    if not blocks:
        return []
    made = []
    for part in parts:
        count, first = sum(len(request.indices) for request in part), part[0]
        known = {"images": [[digest(r.spec), r.indices[0], r.indices[-1]] for r in part]}
        whole = [  # blocks of one pool are one request again
            replace(alike[0], indices=[index for r in alike for index in r.indices])
            for _, group in itertools.groupby(part, lambda r: digest(r.spec))
            for alike in [list(group)]
        ]
        made.append(
            Images(
                study=study,
                name=f"{technique.name}, {first.spec['class']}: {count} images from "
                f"{first.indices[0]}, draw {first.spec['draw']}",
                key=f"images {digest(known)}",
                items=count,
                seconds=count * each,
                after=frozenset([model] if model else ()),
                home=home if model else technique.kind,
                compiles=f"images by {technique.network}" if study.settings.compile else "",
                requests=whole,
            )
        )
    return made


def _of_splits(study: Study, rates: Rates) -> Features:
    sizes = {name: len(split) for name, split in study.data.splits.items()}
    known = {"features": [study.data.name, study.data.class_names, sizes]}
    number = sum(sizes.values())
    return Features(
        study=study,
        name=f"features of {study.data.name}",
        key=f"features {digest(known)}",
        items=number,
        seconds=number * rates["feature"],
    )


def _training(
    study: Study, wanted: Needs, of_pool: dict[str, set[str]], rates: Rates
) -> list[Task]:
    """Features, runs, and what comes beside them."""
    if not wanted.runs:
        return []
    first, every = _of_splits(study, rates), list(wanted.runs.values())
    others = (cell for beside in wanted.beside.values() for cell in beside.cells)
    with_features = list(dict.fromkeys([*every, *others]))
    before: dict[Cell, set[str]] = {}  # keys of the tasks whose results a cell's run needs
    for cell in with_features:
        pools = plan.pool_keys(study, cell)
        before[cell] = {first.key}.union(*(of_pool.get(key, ()) for key in pools))
    prepared, views = [], dict[tuple[Any, ...], int]()
    for alike in _with_features_in_common(study, with_features):
        key = digest({"features": [cell.model_dump() for cell in alike]})
        number = plan.num_views(study, alike, views)
        shared = Features(
            study=study,
            name=f"features of {alike[0].arm}, draw {alike[0].draw}",
            key=f"features {key}",
            items=number,
            seconds=number * rates["feature"],
            after=frozenset().union(*(before[cell] for cell in alike)),
            home="backbone",
            cells=alike,
        )
        prepared.append(shared)
        for cell in alike:
            before[cell] = before[cell] | {shared.key}
    runs, of_run = [], dict[Cell, str]()
    for part in cells.stacks(every):
        whole = part[0].task == "segmentation" or part[0].protocol == "published"
        task = Runs(
            study=study,
            name=f"{len(part)} runs from {part[0].arm}, {part[0].real_percent:g} % real, "
            f"draw {part[0].draw}",
            key=f"runs {digest({'runs': [cell.model_dump() for cell in part]})}",
            items=len(part),
            seconds=sum(_run_seconds(study, cell, rates) for cell in part),
            after=frozenset().union(*(before[cell] for cell in part)),
            home=f"{part[0].task}, draw {part[0].draw}" if whole else "backbone",
            cells=part,
        )
        runs.append(task)
        of_run |= {cell: task.key for cell in part if whole}
    return [first, *prepared, *runs, *_beside(study, wanted, before, of_run, rates)]


def _with_features_in_common(study: Study, every: Iterable[Cell]) -> list[list[Cell]]:
    """Heads' cells in groups: one for a technique and draw, or for an augmentation of real images.

    Cells that differ in their seed alone have one set of features.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in every:
        if cell.task != "classification" or cell.protocol != "controlled" or cell.seed:
            continue
        percent = cell.real_percent if cell.augmentation != "none" else 0
        if cell.technique:
            own = (cell.draw, cells.pool_percent(study, cell), cell.controls_from_outside, percent)
            groups.setdefault((cell.technique, cell.augmentation, *own), []).append(cell)
        elif cell.augmentation != "none":
            groups.setdefault((cell.augmentation,), []).append(cell)
    return list(groups.values())


def _beside(
    study: Study,
    wanted: Needs,
    before: dict[Cell, set[str]],
    of_run: dict[Cell, str],
    rates: Rates,
) -> list[Task]:
    made: list[Task] = []
    for name, beside in wanted.beside.items():
        specs = [digest(cells.spec(study, cell)) for cell in beside.cells]
        spec = {
            "name": name,
            "cells": specs,
            "numbers": beside.numbers,
            "settings": study.settings.classifier.model_dump(mode="json"),
            "shifts": shifts.CODE_VERSION,
        }
        seconds = sum(_run_seconds(study, cell, rates) for cell in beside.cells)
        made.append(
            RunsBeside(
                study=study,
                name=f"runs beside the main table: {name}",
                key=f"beside {digest(spec)}",
                items=len(beside.cells),
                seconds=beside.times * seconds,
                after=frozenset().union(
                    *(before[cell] for cell in beside.cells),
                    {of_run[cell] for cell in beside.cells if cell in of_run},
                ),
                home="backbone",
                beside=beside,
                spec=spec,
            )
        )
    return made


def _run_seconds(study: Study, cell: Cell, rates: Rates) -> float:
    settings, classes = study.settings, len(study.data.class_names)
    real = len(study.data.splits["train"]) * cell.real_percent / 100
    images = real + classes * cell.synthetic_per_class
    if cell.task == "segmentation":
        segmenter = settings.segmenter
        seen = segmenter.max_train_steps * segmenter.batch_size
        if cell.protocol == "published":
            seen = int(segmenter.max_epochs * images)
        return seen * rates["image, training of a segmenter"]
    if cell.protocol != "published":
        controlled = settings.classifier.controlled
        seen = controlled.max_train_steps * controlled.batch_size
        return seen * rates["image, training of a head"]
    published = settings.classifier.published
    tested = published.max_epochs * len(study.data.splits["validation"])
    tested += len(study.data.splits["test"])
    trained = published.max_updates(int(images)) * published.batch_size
    smaller = (published.image_size / settings.classifier.image_size) ** 2
    whole = trained * rates["image, training of the whole network"]
    return smaller * (whole + tested * rates["feature"])
