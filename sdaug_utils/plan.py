"""What a notebook needs, what of it the store has, and how long the rest takes. Nothing starts."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sdaug_utils import experiments, params
from sdaug_utils.data import datasets, photos
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import subjects
from sdaug_utils.evidence.claims import TABLES
from sdaug_utils.experiments import Beside
from sdaug_utils.generation.foundation import revision
from sdaug_utils.generation.personalisation import Personalised
from sdaug_utils.generation.pools import is_given_up, read_pool
from sdaug_utils.generation.technique import Request, technique_requests
from sdaug_utils.params import Settings
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store, digest
from sdaug_utils.study import Study, open_study
from sdaug_utils.training import cells, features
from sdaug_utils.training.cells import Cell

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
PNG_BYTES = 1.8  # per pixel of a photograph
COMPILATION = "compilation of a network"  # as rates have it
GIB = 2**30


@dataclass
class Needs:
    """What notebooks ask of the store, by its keys: what several of them need counts once."""

    images: dict[str, set[int]] = field(default_factory=dict)  # indices, by pool
    runs: dict[str, Cell] = field(default_factory=dict)
    models: dict[str, Personalised] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)  # one for each pool
    beside: dict[str, Beside] = field(default_factory=dict)
    unshared: int = 0  # images, if each setting made its own, as in the thesis

    def ask(self, requests: Iterable[Request]) -> "Needs":
        """Add what is needed for some pools."""
        for request in requests:
            key = digest(request.spec)
            self.images.setdefault(key, set()).update(request.indices)
            self.requests[key] = request
            if request.model:
                self.models[digest(request.model)] = request.technique
        return self

    def add(self, other: "Needs") -> None:
        """Add what another notebook needs."""
        self.ask(other.requests.values())
        for key, indices in other.images.items():
            self.images[key] |= indices
        self.runs |= other.runs
        self.beside |= other.beside
        self.unshared += other.unshared

    def counts(self) -> tuple[int, int, int]:
        """How many images, personalised models and training runs."""
        return sum(map(len, self.images.values())), len(self.models), len(self.runs)


def missing(study: Study, wanted: Needs, done: Needs) -> Needs:
    """What of ``wanted`` has to be made where ``done`` is made, too.

    The models of ``done`` are those that are learnt for it; they are there until all images are.
    """
    root, rest = study.store.root, Needs()
    for key, indices in wanted.images.items():
        request, new = wanted.requests[key], indices - done.images.get(key, set())
        most = request.technique.sampling(study.settings).max_attempts
        rows = read_pool(root / "pools" / key)
        new -= {i for i, row in rows.items() if row["size"] != "0" or is_given_up(row, most)}
        rest.images[key], rest.requests[key] = new, request
        if new and request.model:
            technique, name = request.technique, digest(request.model)
            is_there = study.store.is_whole(root / technique.shelf / name)
            if not (is_there or name in done.models):
                rest.models[name] = technique
    for key, cell in wanted.runs.items():
        if key not in done.runs and not study.store.is_whole(root / "cells" / key):
            rest.runs[key] = cell
    return rest


def rates(settings: Settings) -> tuple[str, dict[str, float]]:
    """Where rates come from, and the seconds that each kind of work takes there.

    Those of ``benchmarks/rates.py`` for small models; for models of full size those that
    ``benchmarks/gpu_check.py`` has measured, and the thesis's for the rest. An image takes a fixed
    time and a time per step where both are known, else as long as its number of steps.
    """
    content, steps = _measured(settings), _steps(settings)

    def seconds(kind: str, rate: Any) -> float:
        if isinstance(rate, dict):
            return rate["once"] + steps[kind] * rate["step"]
        return rate * (steps[kind] / content["steps"] if kind in steps else 1.0)

    return content["source"], {kind: seconds(kind, x) for kind, x in content["seconds"].items()}


def limits(settings: Settings) -> dict[str, float]:
    """The seconds below which no code brings each kind of work on the hardware of :func:`rates`.

    They are floating-point operations, as ``benchmarks/flops.py`` counts them, divided by the peak:
    of a card by its data sheet, of a processor by a large matrix product.
    """
    size = "stable-diffusion-1.5" if is_at_scale(settings) else "miniature"
    counted = json.loads((MEASURED / "flops.json").read_text())[size]
    peak, steps = _measured(settings)["peak FLOP/s"], _steps(settings)
    least = {
        kind: (steps.get(kind, 0) * each.get("step", 0.0) + each["once"]) / peak
        for kind, each in counted.items()
    }
    return {COMPILATION: 0.0, **least}


def _measured(settings: Settings) -> dict[str, Any]:
    """A table of rates: ``source``, ``seconds``, ``steps`` of an image, ``peak FLOP/s``."""
    at_scale = is_at_scale(settings)
    measured = MEASURED / ("gpu.json" if at_scale else "rates.json")
    logged = json.loads((TABLES / "rates-a100.json").read_text()) if at_scale else {"seconds": {}}
    if not measured.exists():
        return logged
    content = json.loads(measured.read_text())
    machine, lacking = content["machine"], logged["seconds"].keys() - content["seconds"].keys()
    name = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    rest = f"; {', '.join(sorted(lacking))}: {logged['source']}" if lacking else ""
    seconds = {
        "source": f"{name}, measured{rest}",
        "seconds": logged["seconds"] | content["seconds"],
    }
    return {**logged, **content, **seconds}


def _steps(settings: Settings) -> dict[str, int]:
    """How many steps an image takes, by the kind of work that it is."""
    every = [technique for technique in techniques().values() if technique.is_generative]
    return {t.image_cost: t.sampling(settings).num_inference_steps for t in every}


def is_at_scale(settings: Settings) -> bool:
    """Whether models are of Stable Diffusion's size, not the miniature's."""
    return settings.sampling.resolution >= 256


def models(settings: Settings) -> list[tuple[str, str]]:
    """Name and part of all models that a profile names: the foundation and what goes with it."""
    beside = [technique.models(settings).values() for technique in techniques().values()]
    return [(settings.foundation, ""), *(model for each in beside for model in each)]


def planned(profile: str, domain: params.Domain) -> tuple[Study, list[str]]:
    """A study to plan with, and what of it is not here yet.

    In the place of absent models stand others, whose images are not in the store either; in the
    place of an absent data set stands one of the published sizes.

    Raises:
        InputError: as :func:`open_study`; the data are not here and their sizes are not known.
    """
    settings, absent = params.load_settings(profile, domain), []
    for name, part in models(settings):
        try:
            revision(name, part)
        except InputError:
            absent.append(name)
    changes: dict[str, Any] = {}
    for key, value in settings:
        if value in absent:
            changes[key] = "miniature"
        elif isinstance(value, params.Parameters):
            here = {own: "miniature" for own, name in value if name in absent}
            changes[key] = value.model_copy(update=here)
    if is_at_scale(settings) and settings.device == settings.precision == "auto":
        changes["precision"] = "float16"  # the GPU host's, though the plan be made elsewhere
    chosen = settings.data[domain]
    try:
        data = open_study(profile, domain=domain, download=False).data
    except InputError:
        if chosen.name not in photos.SIZES:
            raise
        absent.append(chosen.name)
        whole = photos.stand_in(chosen.name)
        data = datasets.restricted(whole, chosen.classes, chosen.max_images_per_class)
    return Study(profile, settings.model_copy(update=changes), data, Store()), absent


def needs(study: Study, p: params.Experiment) -> Needs:
    """All that a notebook asks for, given its parameters."""
    total = Needs()
    if isinstance(p, params.Subjects):
        is_known = features.have_features(study, study.data.splits["train"].images())
        everyone = (subjects.of_experiment if is_known else subjects.stand_ins)(study, p)
        for technique in p.techniques:
            total.ask(subjects.subject_requests(study, technique, everyone, p))
        if isinstance(p, params.DifferentSubjects):
            total.ask(subjects.hypernym_requests(study, p))
        total.unshared = total.counts()[0]
        return total
    assert isinstance(p, params.Runs)
    asked, settings = dict[tuple[Any, ...], None](), set()  # in order, which a set has not
    for cell in experiments.every_cell(study, p):
        total.runs[digest(cells.spec(study, cell))] = cell
        if cell.technique:
            settings.add((cell.arm, cell.draw, cell.synthetic_per_class, cell.real_percent))
            percent = cells.pool_percent(study, cell)
            asked[cell.technique, cell.draw, cell.num_made, percent] = None
    for arguments in asked:
        total.ask(technique_requests(study, *arguments))
    total.beside = experiments.beside(study, p)
    total.unshared = len(study.data.class_names) * sum(count for _, _, count, _ in settings)
    return total


def gibibytes(study: Study, wanted: Needs) -> float:
    """Disk that what is wanted takes: images, kept or passing models, features."""
    settings = study.settings
    size = wanted.counts()[0] * PNG_BYTES * settings.sampling.resolution**2
    size += _views(study, wanted) * 1280 * 4
    if is_at_scale(settings):
        every = wanted.models.values()
        size += sum(t.model_bytes for t in every if t.keeps_models(settings))
        size += max((t.model_bytes for t in every if not t.keeps_models(settings)), default=0)
    return size / GIB


def thesis_hours(experiment: str) -> float:
    """GPU hours in the thesis's run logs: training, and what they tell of generation."""
    runs = pd.read_csv(TABLES / "published_results.csv")
    runs = runs[runs["experiment"] == experiment].drop_duplicates("run")
    per_class = runs[["generation_seconds_per_class_median", "finetune_seconds_per_class_mean"]]
    sizes = {name: count for name, (count, _) in photos.SIZES.items()}
    num_classes = runs["dataset"].map(sizes).astype(float)  # of no runs they would be texts
    generation = per_class.fillna(0).sum(axis=1) * num_classes
    return float(runs["elapsed_train_seconds"].fillna(0).sum() + generation.sum()) / 3600


def _views(study: Study, wanted: Needs) -> int:
    """How many features: each image once, and the augmented views of it."""
    total = num_views(study, wanted.runs.values(), {})
    return total + (sum(map(len, study.data.splits.values())) if wanted.runs else 0)


def num_views(study: Study, every: Iterable[Cell], views: dict[tuple[Any, ...], int]) -> int:
    """How many features cells' heads need beside those of real images as they are.

    ``views``, those of each image that are there already, grow by them.
    """
    settings, classes = study.settings.classifier.controlled, len(study.data.class_names)
    before = sum(views.values())
    for cell in every:
        if cell.protocol != "controlled" or cell.task != "classification":
            continue
        pool = (cell.technique, cell.draw, cells.pool_percent(study, cell))
        if cell.augmentation in ("none", "mixup"):  # which mixes features
            here = classes * cell.num_made
            views[pool] = max(views.get(pool, 0), here)  # all the images of one view
            continue
        made = itertools.product(range(classes), range(cell.synthetic_per_class))
        rows = cells.real_rows(study, cell).tolist()
        number = len(rows) + classes * cell.synthetic_per_class
        for image in (*rows, *((*pool, *one) for one in made)):
            key = (cell.augmentation, image)
            wanted_views = settings.num_views(number, synthetic=isinstance(image, tuple))
            views[key] = max(views.get(key, 0), wanted_views)
    return sum(views.values()) - before


def costs(study: Study, names: Iterable[str], count: int, real_percent: float) -> pd.DataFrame:
    """What ``count`` images of each class cost by some techniques, for one draw: a row for each.

    Columns: ``technique``, ``images``, ``models``, and by the rates in use ``learning`` and
    ``sampling``, in seconds.
    """
    rates_in_use, rows = rates(study.settings)[1], []
    for name in names:
        technique = techniques()[name]
        needed = Needs().ask(technique_requests(study, name, 0, count, real_percent))
        num_images, num_models, _ = needed.counts()
        learning = 0.0
        if technique.learns:
            kind, number = technique.model_cost(study.settings)
            learning = num_models * number * rates_in_use[kind]
        rows.append(
            {
                "technique": name,
                "images": num_images,
                "models": num_models,
                "learning": learning,
                "sampling": num_images * rates_in_use[technique.image_cost],
            }
        )
    return pd.DataFrame(rows)


def pool_keys(study: Study, cell: Cell) -> list[str]:
    """Keys of the pools that a cell's synthetic images are of."""
    if not cell.technique:
        return []
    percent = cells.pool_percent(study, cell)
    return cells.pool_digests(study, cell.technique, cell.draw, percent)
