"""What a notebook needs, what of it the store has, and how long the rest takes. Nothing starts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdaug_utils import cells, experiments, params, subjects
from sdaug_utils.cells import Cell
from sdaug_utils.pools import Request, read_pool, technique_requests
from sdaug_utils.store import digest
from sdaug_utils.study import Study

RATES = Path(__file__).parents[1] / "benchmarks" / "results" / "rates.json"


@dataclass
class Needs:
    """Images by pool, personalised models and training runs, each by its key in the store.

    Adding up the needs of several notebooks counts what they share once.
    """

    images: dict[str, set[int]] = field(default_factory=dict)
    controlled: set[str] = field(default_factory=set)  # the pools that follow control images
    models: dict[str, str] = field(default_factory=dict)  # key to technique
    runs: dict[str, Cell] = field(default_factory=dict)

    def add(self, other: "Needs") -> None:
        for key, indices in other.images.items():
            self.images.setdefault(key, set()).update(indices)
        self.controlled |= other.controlled
        self.models |= other.models
        self.runs |= other.runs

    def request(self, request: Request) -> None:
        self.images.setdefault(digest(request.spec), set()).update(request.indices)
        if request.control_rows is not None:
            self.controlled.add(digest(request.spec))
        if request.personalisation:
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
            {key: kind for key, kind in self.models.items() if key not in other.models},
            {key: cell for key, cell in self.runs.items() if key not in other.runs},
        )

    def missing(self, study: Study) -> "Needs":
        """What the store has not got yet."""
        root = study.store.root
        there = {
            key: set(read_pool(root / "pools" / key, sorted(self.images[key])))
            for key in self.images
        }
        return Needs(
            {key: indices - there[key] for key, indices in self.images.items()},
            self.controlled,
            {key: kind for key, kind in self.models.items() if not (root / kind / key).exists()},
            {key: cell for key, cell in self.runs.items() if not (root / "cells" / key).exists()},
        )


def machine() -> str:
    """Where the rates were measured, in a few words."""
    where = json.loads(RATES.read_text())["machine"]
    return f"{where['gpu'] or where['processor']}, {where['cores']} cores"


def needs(study: Study, p: params.Experiment) -> Needs:
    """All that a notebook asks for, given its parameters."""
    total = Needs()
    if isinstance(p, params.Subjects):
        everyone = subjects.of_experiment(study, p)
        for technique in p.techniques:
            for request in subjects.subject_requests(study, technique, everyone, p):
                total.request(request)
        return total
    assert isinstance(p, params.Runs)
    every = experiments.cells(study, p)
    if isinstance(p, params.TrainingPercentage):
        for protocol in ("published", "controlled"):
            every += experiments.protocol_cells(p, protocol)
    asked = set()
    for cell in every:
        total.runs[digest(cells.spec(study, cell))] = cell
        if cell.technique:
            asked.add((cell.technique, cell.draw, cell.synthetic_per_class, cell.control_percent))
    for arguments in asked:
        for request in technique_requests(study, *arguments):
            total.request(request)
    return total


def minutes(study: Study, wanted: Needs, rates: Mapping[str, Any] | None = None) -> float:
    """How long it takes to make what is wanted, by rates measured with ``benchmarks/rates.py``.

    The rates are of one machine; where ``rates.json`` was made on another, so is the estimate.
    Start of the notebooks and drawing of the figures are left out.
    """
    settings = study.settings
    rates = rates or json.loads(RATES.read_text())
    with_control = sum(len(wanted.images[key]) for key in wanted.controlled)
    plain, batch = wanted.num_images - with_control, f"batch of {settings.sampling.batch_size}"
    seconds = plain / _rate(rates["images per second"], batch)
    seconds += with_control / _rate(rates["images with a ControlNet per second"], batch)
    seconds += _views(study, wanted) / rates["backbone at 96 px, images per second"]["evaluation"]
    latents = rates["U-Net training, latents per second"]
    dreambooth, inversion = settings.dreambooth, settings.textual_inversion
    for technique in wanted.models.values():
        if technique == "dreambooth":
            size = dreambooth.train_batch_size * (1 + (dreambooth.prior_loss_weight > 0))
            seconds += dreambooth.max_train_steps * size / _rate(latents, f"batch of {size}")
        else:  # all subjects share a batch
            size = inversion.train_batch_size * inversion.gradient_accumulation_steps
            seconds += inversion.max_train_steps * size / latents["batch of 32"]
    return (seconds + sum(_run_seconds(study, cell, rates) for cell in wanted.runs.values())) / 60


def _rate(rates: Mapping[str, float], batch: str) -> float:
    """The rate at a batch size, or at the largest one that was measured."""
    return rates.get(batch, max(rates.values()))


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


def _run_seconds(study: Study, cell: Cell, rates: Mapping[str, Any]) -> float:
    settings, classes = study.settings, len(study.data.class_names)
    real = len(study.data.splits["train"]) * cell.real_percent / 100
    images = real + classes * cell.synthetic_per_class
    if cell.task == "segmentation":
        segmenter, rate = settings.segmenter, rates["segmenter training, images per second"]
        updates = segmenter.max_train_steps
        if cell.protocol == "published":
            updates = int(segmenter.max_epochs * images / segmenter.batch_size)
        return updates * segmenter.batch_size / rate["batch of 16"]
    if cell.protocol == "controlled":
        rate = rates["linear head, updates per second"]["batch of 16"]
        return settings.classifier.controlled.max_train_steps / rate
    published, rate = settings.classifier.published, rates["backbone at 96 px, images per second"]
    held_out = classes * (published.validation_images_per_class or 50)
    seen = published.max_epochs * held_out + len(study.data.splits["test"])
    return published.max_epochs * images / rate["training"] + seen / rate["evaluation"]
