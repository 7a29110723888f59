"""What a notebook needs, what of it the store has, and how long the rest takes. Nothing starts."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sdaug_utils import cells, experiments, foundation, params, photos, subjects, training
from sdaug_utils.cells import Cell
from sdaug_utils.claims import DATA_FOLDER
from sdaug_utils.datasets import restricted
from sdaug_utils.errors import InputError
from sdaug_utils.params import Domain, Settings
from sdaug_utils.pools import Request, read_pool, technique_requests
from sdaug_utils.store import Store, digest
from sdaug_utils.study import Study, open_study

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
UNET_BYTES = 1.72e9  # of Stable Diffusion 1.5, in half precision
PNG_BYTES = 1.8  # per pixel of a photograph
GIB = 2**30


@dataclass
class Needs:
    """Images by pool, personalised models and training runs, each by its key in the store.

    Adding up the needs of several notebooks counts what they share once.
    """

    images: dict[str, set[int]] = field(default_factory=dict)
    controlled: set[str] = field(default_factory=set)  # the pools that follow control images
    model_of: dict[str, str] = field(default_factory=dict)  # the pools of personalised models
    models: dict[str, str] = field(default_factory=dict)  # key to technique
    runs: dict[str, Cell] = field(default_factory=dict)
    unshared: int = 0  # images, if each setting made its own, as in the thesis

    def add(self, other: "Needs") -> None:
        for key, indices in other.images.items():
            self.images.setdefault(key, set()).update(indices)
        self.controlled |= other.controlled
        self.model_of |= other.model_of
        self.models |= other.models
        self.runs |= other.runs
        self.unshared += other.unshared

    def request(self, request: Request) -> None:
        self.images.setdefault(digest(request.spec), set()).update(request.indices)
        if request.control_rows is not None:
            self.controlled.add(digest(request.spec))
        if request.personalisation:
            self.model_of[digest(request.spec)] = digest(request.personalisation)
            self.models[digest(request.personalisation)] = request.technique

    @property
    def num_images(self) -> int:
        return sum(map(len, self.images.values()))

    @property
    def num_models(self) -> int:
        return len(self.models)

    @property
    def num_runs(self) -> int:
        return len(self.runs)

    def without(self, other: "Needs") -> "Needs":
        """What is not among ``other``."""
        return Needs(
            {key: items - other.images.get(key, set()) for key, items in self.images.items()},
            self.controlled,
            self.model_of,
            {key: kind for key, kind in self.models.items() if key not in other.models},
            {key: cell for key, cell in self.runs.items() if key not in other.runs},
        )

    def missing(self, study: Study) -> "Needs":
        """What the store has not got yet."""
        root = study.store.root
        there = {
            key: set(read_pool(root / "pools" / key, sorted(self.images[key]), decode=False))
            for key in self.images
        }
        return Needs(
            {key: indices - there[key] for key, indices in self.images.items()},
            self.controlled,
            self.model_of,
            {key: kind for key, kind in self.models.items() if not (root / kind / key).exists()},
            {key: cell for key, cell in self.runs.items() if not (root / "cells" / key).exists()},
        )


@dataclass(frozen=True)
class Rates:
    """Seconds that the study's kinds of work take on one machine."""

    source: str
    seconds: dict[str, float]

    def __getitem__(self, kind: str) -> float:
        return self.seconds[kind]


def rates(settings: Settings) -> Rates:
    """Those of ``benchmarks/rates.py`` for small models.

    For models of full size those of ``benchmarks/gpu_check.py`` if it has run, else the thesis's.
    """
    if not is_at_scale(settings):
        return _of_the_miniature(settings)
    measured = MEASURED / "gpu.json"
    path = measured if measured.exists() else DATA_FOLDER / "rates-a100.json"
    content = json.loads(path.read_text())
    source = content.get("source") or f"{content['machine']['gpu']}, measured"
    return Rates(source, content["seconds"])


def _of_the_miniature(settings: Settings) -> Rates:
    measured = json.loads((MEASURED / "rates.json").read_text())
    machine = measured["machine"]
    batch = f"batch of {settings.sampling.batch_size}"
    latents = measured["U-Net training, latents per second"]
    backbone = measured["backbone at 96 px, images per second"]
    per_second = {
        "image by a prompt": _rate(measured["images per second"], batch),
        "image of a personalised model": _rate(measured["images per second"], batch),
        "image with a ControlNet": _rate(measured["images with a ControlNet per second"], batch),
        "latent, fine-tuning of the U-Net": latents["batch of 8"],
        "latent, textual inversion": latents["batch of 32"],  # all subjects share a batch
        "feature": backbone["evaluation"],
        "image, training of the whole network": backbone["training"],
        "image, training of a head": 16
        * measured["linear head, updates per second"]["batch of 16"],
        "image, training of a segmenter": measured["segmenter training, images per second"][
            "batch of 16"
        ],
    }
    source = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, measured"
    return Rates(source, {kind: 1 / rate for kind, rate in per_second.items()})


def _rate(measured: dict[str, float], batch: str) -> float:
    """The rate at a batch size, or at the largest one that was measured."""
    return measured.get(batch, max(measured.values()))


def is_at_scale(settings: Settings) -> bool:
    """Whether models are of Stable Diffusion's size, not the miniature's."""
    return settings.sampling.resolution >= 256


def planned(profile: str, domain: Domain = "main") -> tuple[Study, list[str]]:
    """A study to plan with, and what of it is not here yet.

    In the place of absent models stand others, whose images are not in the store either; in the
    place of an absent data set stands one of the published sizes.

    Raises:
        InputError: as :func:`open_study`; the data are not here and their sizes are not known.
    """
    settings, absent = params.load_settings(profile), []
    changes: dict[str, Any] = {}
    if is_at_scale(settings) and settings.device == settings.precision == "auto":
        changes["precision"] = "float16"  # the GPU host's, though the plan be made elsewhere
    try:
        foundation.revision(settings.foundation)
    except InputError:
        absent.append(settings.foundation)
        changes["foundation"] = "miniature"
    for name in ("canny", "segmentation"):
        model = getattr(settings.controlnet, name)
        try:
            foundation.controlnet_revision(model, f"controlnet-{name}")
        except InputError:
            absent.append(model)
            controlnet = changes.get("controlnet", settings.controlnet)
            changes["controlnet"] = controlnet.model_copy(update={name: "miniature"})
    chosen = settings.data[domain]
    try:
        study = open_study(profile, domain=domain, download=False)
    except InputError:
        if chosen.name not in photos.SIZES:
            raise
        absent.append(chosen.name)
        whole = photos.stand_in(chosen.name)
        data = restricted(whole, chosen.classes, chosen.max_images_per_class)
        study = Study(profile, settings, data, Store())
    return Study(profile, settings.model_copy(update=changes), study.data, study.store), absent


def needs(study: Study, p: params.Experiment) -> Needs:
    """All that a notebook asks for, given its parameters."""
    total = Needs()
    if isinstance(p, params.Subjects):
        is_known = training.have_features(study, study.data.splits["train"].images())
        everyone = (subjects.of_experiment if is_known else subjects.stand_ins)(study, p)
        for technique in p.techniques:
            for request in subjects.subject_requests(study, technique, everyone, p):
                total.request(request)
        total.unshared = total.num_images
        return total
    assert isinstance(p, params.Runs)
    every = experiments.cells(study, p)
    if isinstance(p, params.TrainingPercentage):
        for protocol in ("published", "controlled"):
            every += experiments.protocol_cells(p, protocol)
    asked, settings = set(), set()
    for cell in every:
        total.runs[digest(cells.spec(study, cell))] = cell
        if cell.technique:
            settings.add((cell.arm, cell.draw, cell.synthetic_per_class, cell.real_percent))
            percent = cells.pool_percent(study, cell)
            asked.add((cell.technique, cell.draw, cell.synthetic_per_class, percent))
    for arguments in asked:
        for request in technique_requests(study, *arguments):
            total.request(request)
    total.unshared = len(study.data.class_names) * sum(count for _, _, count, _ in settings)
    return total


def missing(study: Study, wanted: Needs, done: Needs) -> Needs:
    """What of ``wanted`` has to be made once ``done`` has been.

    A fine-tuned U-Net that is not kept has to be made again for every pool that grows.
    """
    rest = wanted.without(done).missing(study)
    if not study.settings.dreambooth.keep_models:
        rest.models = {key: kind for key, kind in rest.models.items() if kind != "dreambooth"}
        for key, indices in rest.images.items():
            model = wanted.model_of.get(key)
            if indices and model and wanted.models[model] == "dreambooth":
                rest.models[model] = "dreambooth"
    return rest


def hours(study: Study, wanted: Needs, rates: Rates) -> float:
    """How long it takes to make what is wanted, on the machine that the rates are of.

    Start of the notebooks and drawing of the figures are left out.
    """
    settings = study.settings
    seconds = 0.0
    for key, indices in wanted.images.items():
        kind = "image by a prompt"
        if key in wanted.model_of:
            kind = "image of a personalised model"
        elif key in wanted.controlled:
            kind = "image with a ControlNet"
        seconds += len(indices) * rates[kind]
    for technique in wanted.models.values():
        if technique == "textual-inversion":
            inversion = settings.textual_inversion
            size = inversion.train_batch_size * inversion.gradient_accumulation_steps
            seconds += inversion.max_train_steps * size * rates["latent, textual inversion"]
            continue
        dreambooth, steps = settings.dreambooth, settings.dreambooth.max_train_steps
        if technique == "dreambooth-lora":
            steps = settings.dreambooth_lora.max_train_steps
        size = dreambooth.train_batch_size * (1 + (dreambooth.prior_loss_weight > 0))
        seconds += steps * size * rates["latent, fine-tuning of the U-Net"]
    seconds += _views(study, wanted) * rates["feature"]
    seconds += sum(_run_seconds(study, cell, rates) for cell in wanted.runs.values())
    return seconds / 3600


def gibibytes(study: Study, wanted: Needs) -> float:
    """Disk that what is wanted takes: images, kept or passing models, features."""
    settings = study.settings
    size = wanted.num_images * PNG_BYTES * settings.sampling.resolution**2
    num_models = sum(technique == "dreambooth" for technique in wanted.models.values())
    if is_at_scale(settings):
        size += UNET_BYTES * (num_models if settings.dreambooth.keep_models else num_models > 0)
    size += _views(study, wanted) * 1280 * 4
    return size / GIB


def thesis_hours(experiment: str) -> float:
    """GPU hours in the thesis's run logs: training, and what they tell of generation."""
    runs = pd.read_csv(DATA_FOLDER / "published_results.csv")
    runs = runs[runs["experiment"] == experiment].drop_duplicates("run")
    per_class = runs[["generation_seconds_per_class_median", "finetune_seconds_per_class_mean"]]
    num_classes = runs["dataset"].map({name: count for name, (count, _) in photos.SIZES.items()})
    generation = per_class.fillna(0).sum(axis=1) * num_classes
    return float(runs["elapsed_train_seconds"].fillna(0).sum() + generation.sum()) / 3600


def _views(study: Study, wanted: Needs) -> int:
    """How many features: each image once, and each augmented view of it."""
    views = study.settings.classifier.controlled.num_views
    real = sum(len(split) for split in study.data.splits.values()) if wanted.runs else 0
    total = real + wanted.num_images
    train, classes = len(study.data.splits["train"]), len(study.data.class_names)
    largest: dict[tuple[Any, ...], int] = {}
    for cell in wanted.runs.values():
        if cell.augmentation != "none" and cell.protocol == "controlled":
            largest[cell.augmentation, None, 0] = train
            key = (cell.augmentation, cell.technique, cell.draw)
            count = classes * cell.synthetic_per_class
            largest[key] = max(largest.get(key, 0), count)
    return total + views * sum(largest.values())


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
    if cell.protocol == "controlled":
        controlled = settings.classifier.controlled
        seen = controlled.max_train_steps * controlled.batch_size
        return seen * rates["image, training of a head"]
    published = settings.classifier.published
    few = published.validation_images_per_class
    held_out = classes * few if few else len(study.data.splits["validation"])
    tested = published.max_epochs * held_out + len(study.data.splits["test"])
    trained = published.max_epochs * images * rates["image, training of the whole network"]
    return trained + tested * rates["feature"]
