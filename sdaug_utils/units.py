"""Units: pieces of work that any process or machine can do, and sums over a list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sdaug_utils import rates
from sdaug_utils.data.images import Images
from sdaug_utils.generation.pools import learn_models, number_missing
from sdaug_utils.generation.technique import Request
from sdaug_utils.store import KINDS, digest
from sdaug_utils.study import Study
from sdaug_utils.training import features, runs
from sdaug_utils.training.runs import Run

FEATURE_BYTES = 1280 * 4  # 32-bit features of EfficientNet-Lite0; those of ResNet34 are smaller
GIB = 2**30


@dataclass(frozen=True, eq=False, kw_only=True)
class Unit:
    """A piece of work that is safe to do again: what of it the store has is not made twice."""

    name: str  # for people
    key: str
    kind: str  # what it makes: images, models, features, runs
    items: int  # how many
    left: Callable[[], int]  # how many of them the store has not got
    make: Callable[[], object]  # makes what is left
    seconds: float  # by the rates in use, for all items
    num_bytes: float = 0.0  # of disk, for all items
    temporary_bytes: float = 0.0  # of disk, while it is made: a model that is not kept
    temporary_models: int = 0  # that it learns and deletes again
    needs: frozenset[str] = frozenset()  # keys of the units whose results it needs
    notebook: str = ""  # the first that asks for it


class Work:
    """A list of units, and how many items each one lacked when this object was made."""

    def __init__(self, units: Sequence[Unit], left: dict[str, int] | None = None) -> None:
        """``units`` are in order: a unit comes after those that it needs."""
        self.units = units
        self.left = left or {unit.key: unit.left() for unit in units}
        self.waiting = [unit for unit in units if self.left[unit.key]]

    def of(self, notebook: str) -> Work:
        """The units that this notebook is the first to ask for."""
        return Work([unit for unit in self.units if unit.notebook == notebook], self.left)

    def counts(self) -> dict[str, tuple[int, int]]:
        """How much is left and how much there is in all, by kind, temporary models included."""
        found = {kind: (0, 0) for kind in KINDS}
        for unit in self.units:
            left, items = found.get(unit.kind, (0, 0))
            found[unit.kind] = (left + self.left[unit.key], items + unit.items)
            if unit.temporary_models:
                left, items = found["models"]
                missing = unit.temporary_models if self.left[unit.key] else 0
                found["models"] = (left + missing, items + unit.temporary_models)
        return found

    def done_by(self, unit: Unit) -> dict[str, int]:
        """How many items of each kind there are more when a unit has been made."""
        made = {unit.kind: self.left[unit.key]}
        return made | ({"models": unit.temporary_models} if unit.temporary_models else {})

    def seconds_left(self) -> dict[str, float]:
        """Seconds for what each unit lacks, by key."""
        return {u.key: u.seconds * self.left[u.key] / u.items for u in self.waiting}

    def seconds(self) -> float:
        """How long it takes to make what is left, one unit after the other."""
        return sum(self.seconds_left().values())

    def gibibytes(self, workers: int = 1) -> float:
        """GiB of disk for what is left, with a temporary model per worker.

        There may be one more of those, which a worker that died has left.
        """
        parts = (unit.num_bytes * self.left[unit.key] / unit.items for unit in self.waiting)
        temporary = max((unit.temporary_bytes for unit in self.waiting), default=0.0)
        return (sum(parts) + temporary * (workers + 1)) / GIB

    def longest_paths(self) -> dict[str, float]:
        """Seconds of the longest chain of units that starts with each unit that is left, by key."""
        seconds = self.seconds_left()
        paths = dict(seconds)
        for unit in reversed(self.waiting):
            for key in unit.needs & paths.keys():
                paths[key] = max(paths[key], seconds[key] + paths[unit.key])
        return paths

    def hours_on(self, workers: int) -> float:
        """A lower bound, in hours, for what is left on this many workers."""
        longest = max(self.longest_paths().values(), default=0.0)
        return max(self.seconds() / workers, longest) / 3600


def features_of_data(study: Study, notebook: str, test_sets: Sequence[str] = ()) -> Unit:
    """Features of the data set itself, or of its test images alone, each shifted in some ways."""
    splits = study.data.splits
    images = [runs.images_tested_on(study, name) for name in test_sets]
    images = images or [split.images() for split in splits.values()]
    number, seconds = sum(map(len, images)), rates.seconds_by_kind(study.settings)["feature"]
    sizes = {name: len(split) for name, split in splits.items()}
    known: list[Any] = [study.data.name, study.data.class_names, sizes]
    known += [*runs.features_by(study), *test_sets]
    return Unit(
        name=" ".join([f"features of {study.data.name}", *test_sets]),
        key=f"features-{digest({'of': known})}",
        kind="features",
        items=number,
        left=partial(_data_features_left, study, images),
        make=partial(_prepare_data, study, images),
        seconds=number * seconds,
        num_bytes=number * FEATURE_BYTES,
        notebook=notebook,
    )


def images_left(study: Study, requests: Sequence[Request]) -> int:
    return sum(number_missing(study, request) for request in requests)


def _without_model(study: Study, pools: Sequence[Sequence[Request]]) -> list[Request]:
    """A request for each model that is missing, except models whose images are all made."""
    store, firsts = study.store, [some[0] for some in pools if images_left(study, some)]
    return [
        r for r in firsts if not store.is_whole(store.folder(r.technique.model_folder, r.model))
    ]


def models_left(study: Study, pools: Sequence[Sequence[Request]]) -> int:
    return len(_without_model(study, pools))


def learn(study: Study, pools: Sequence[Sequence[Request]]) -> None:
    learn_models(study, _without_model(study, pools))


def features_left(study: Study, some: Sequence[Run], number: int) -> int:
    """All of them until the runs are made: to look into each file would take longer."""
    return 0 if all(runs.is_made(study, run) for run in some) else number


def _data_features_left(study: Study, images: Sequence[Images]) -> int:
    return sum(len(some) for some in images if not features.have_features(study, some))


def _prepare_data(study: Study, images: Sequence[Images]) -> None:
    for some in images:
        features.fill(study, some)


def runs_left(study: Study, some: Sequence[Run]) -> int:
    return sum(not runs.is_made(study, run) for run in some)
