"""Cells: one training run each, one row of results each, made once and kept in the store."""

import json
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from sdaug_utils import training
from sdaug_utils.datasets import digests, first_per_class, subset
from sdaug_utils.foundation import in_parallel
from sdaug_utils.params import Augmentation, Parameters, Percent, Protocol, Technique
from sdaug_utils.pools import Pool, technique_pools, technique_specs
from sdaug_utils.store import digest
from sdaug_utils.study import Study

CODE_VERSION = 1


class Cell(Parameters):
    """What one training run sees: real subset, synthetic images, augmentation, seed."""

    protocol: Protocol
    real_percent: Percent
    draw: int
    seed: int
    augmentation: Augmentation = "none"
    technique: Technique | None = None
    synthetic_per_class: int = 0

    @property
    def arm(self) -> str:
        """The name under which the thesis's figures show it."""
        if self.technique:
            return self.technique
        return "baseline" if self.augmentation == "none" else self.augmentation


def grid(
    protocol: Protocol,
    real_percents: Sequence[float],
    augmentations: Sequence[Augmentation],
    techniques: Sequence[Technique],
    synthetic_per_class: int,
    num_draws: int,
    num_seeds: int,
) -> list[Cell]:
    """Every real percentage with every augmentation, and with every technique unaugmented."""
    arms: list[dict[str, Any]] = [{"augmentation": name} for name in augmentations]
    arms += [{"technique": name, "synthetic_per_class": synthetic_per_class} for name in techniques]
    return [
        Cell(protocol=protocol, real_percent=percent, draw=draw, seed=seed, **arm)
        for draw in range(num_draws)
        for arm in arms
        for percent in real_percents
        for seed in range(num_seeds)
    ]


def plan(study: Study, cells: Iterable[Cell]) -> pd.DataFrame:
    """A table of the cells about to run, a row per arm: what each needs and what is there."""
    rows = [
        {
            "arm": cell.arm,
            "real %": cell.real_percent,
            "synthetic per class": cell.synthetic_per_class,
            "runs": 1,
            "already in the store": _folder(study, cell).exists(),
        }
        for cell in cells
    ]
    grouped = pd.DataFrame(rows).groupby("arm", sort=False)
    return grouped.agg(
        {
            "real %": _listed,
            "synthetic per class": "first",
            "runs": "sum",
            "already in the store": "sum",
        }
    )


def _listed(percents: pd.Series) -> str:
    return ", ".join(f"{percent:g}" for percent in dict.fromkeys(percents))


def run(study: Study, cells: Sequence[Cell], progress: bool = True) -> pd.DataFrame:
    """Train what is not in the store yet; one row per cell.

    Columns: the cell's fields, ``arm``, ``num_real`` and ``num_synthetic`` (training images),
    ``num_updates``, ``selected_step``, ``validation_accuracy``, ``test_accuracy``, and
    ``correct``: for each test image whether it was put in the right class, (n_test,) booleans.
    """
    loader = _Loader(study)
    missing = [cell for cell in cells if not _folder(study, cell).exists()]
    for cell in missing:
        loader.prepare(cell)
    with tqdm(total=len(missing), desc="training runs", disable=not (progress and missing)) as bar:

        def train(position: int) -> None:
            cell = missing[position]
            study.store.get("cells", _spec(study, cell), partial(loader.train, cell))
            bar.update()

        in_parallel(study.settings, train, range(len(missing)))
    rows = []
    for cell in cells:
        folder = _folder(study, cell)
        row = json.loads((folder / "result.json").read_text())
        predictions = np.load(folder / "predictions.npy")
        correct = predictions == study.data.splits["test"].labels
        rows.append({**cell.model_dump(), "arm": cell.arm, **row, "correct": correct})
    return pd.DataFrame(rows)


def correct(results: pd.DataFrame, arm: str, real_percent: float) -> np.ndarray:
    """The test images that an arm's runs got right: (draws, seeds, test images) booleans."""
    chosen = results[(results["arm"] == arm) & (results["real_percent"] == real_percent)]
    if chosen.empty:
        raise KeyError(f"no run of {arm} at {real_percent:g} % real")
    ordered = chosen.sort_values(["draw", "seed"])
    num_draws, num_seeds = ordered["draw"].nunique(), ordered["seed"].nunique()
    complete = (
        len(ordered) == num_draws * num_seeds == len(ordered[["draw", "seed"]].drop_duplicates())
    )
    if not complete or len(set(ordered["protocol"])) > 1:
        raise ValueError(f"runs of {arm} at {real_percent:g} % are not one per draw and seed")
    return np.stack(ordered["correct"].to_list()).reshape(num_draws, num_seeds, -1)


def _spec(study: Study, cell: Cell) -> dict[str, Any]:
    """Everything that determines a cell's result."""
    classifier = study.settings.classifier
    pools = _pool_digests(study, cell.technique, cell.draw) if cell.technique else []
    return {
        "version": [CODE_VERSION, training.CODE_VERSION, training.augment.CODE_VERSION],
        "cell": cell.model_dump(),
        "data": data_digest(study),
        "rows": subset(study.data.splits["train"].labels, cell.real_percent, cell.draw).tolist(),
        "backbone": [training.BACKBONE_SHA256[classifier.backbone], classifier.image_size],
        "settings": getattr(classifier, cell.protocol).model_dump(),
        "pools": pools,
    }


def _training_seed(cell: Cell) -> int:
    """The same for all arms of a draw and seed, and another for every draw."""
    return 1000 * cell.draw + cell.seed


def _folder(study: Study, cell: Cell) -> Path:
    return study.store.folder("cells", _spec(study, cell))


@lru_cache(maxsize=256)
def _pool_digests(study: Study, technique: Technique, draw: int) -> list[str]:
    return [digest(spec) for spec in technique_specs(study, technique, draw)]


@lru_cache(maxsize=4)
def data_digest(study: Study) -> str:
    """A hash of all images and labels of the three splits."""
    content = {
        name: [digests(split.images()), split.labels.tolist()]
        for name, split in study.data.splits.items()
    }
    return digest(content)


class _Loader:
    """Keeps the images and features of the pools at hand while cells are trained."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.splits = study.data.splits
        self.pools = cache(self._pools)
        self.pool_features = cache(self._pool_features)
        self.real_features = cache(self._real_features)

    def _pools(self, technique: Technique, draw: int, count: int) -> list[Pool]:
        return technique_pools(self.study, technique, draw, count, progress=False)

    def _pool_features(self, technique: Technique, draw: int, count: int) -> Tensor:
        images = [image for pool in self.pools(technique, draw, count) for image in pool.images()]
        return training.image_features(self.study, images)

    def _real_features(self, split: str, augmentation: Augmentation = "none") -> Tensor:
        views = self.study.settings.classifier.controlled.num_views
        num_views = 1 if augmentation == "none" else views
        images = self.splits[split].images()
        return training.image_features(self.study, images, augmentation, num_views)

    def prepare(self, cell: Cell) -> None:
        """Load or make what a cell needs, so that cells can then be trained side by side."""
        if cell.technique:
            self.pools(cell.technique, cell.draw, cell.synthetic_per_class)
        if cell.protocol == "controlled":
            for split in ("validation", "test"):
                self.real_features(split)
            self.features(cell, np.arange(1))

    def training_set(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """A cell's real images, as rows of the train split, and the labels of all its images."""
        labels = self.splits["train"].labels
        rows = subset(labels, cell.real_percent, cell.draw)
        classes = np.arange(len(self.study.data.class_names))
        synthetic = np.repeat(classes, cell.synthetic_per_class)
        return rows, np.concatenate([labels[rows], synthetic])

    def train(self, cell: Cell, folder: Path) -> None:
        rows, labels = self.training_set(cell)
        train = self._controlled if cell.protocol == "controlled" else self._published
        outcome = train(cell, rows, labels, len(self.study.data.class_names))
        np.save(folder / "predictions.npy", outcome.predictions.astype(np.uint8))
        test_labels = self.splits["test"].labels
        result = {
            "num_real": len(rows),
            "num_synthetic": len(labels) - len(rows),
            "num_updates": outcome.num_updates,
            "selected_step": outcome.selected_step,
            "validation_accuracy": outcome.validation_accuracy,
            "test_accuracy": float((outcome.predictions == test_labels).mean()),
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2))

    def features(self, cell: Cell, rows: np.ndarray) -> Tensor:
        """Features of a cell's training images, real ones first: (n, views, features)."""
        features = self.real_features("train", cell.augmentation)[rows]
        if cell.technique:
            pool = self.pool_features(cell.technique, cell.draw, cell.synthetic_per_class)
            features = torch.cat([features, pool])
        return features

    def _controlled(
        self, cell: Cell, rows: np.ndarray, labels: np.ndarray, num_classes: int
    ) -> training.Outcome:
        validation = self.real_features("validation")[:, 0], self.splits["validation"].labels
        return training.train_controlled(
            self.features(cell, rows),
            labels,
            validation,
            self.real_features("test")[:, 0],
            self.study.settings.classifier.controlled,
            _training_seed(cell),
            num_classes,
        )

    def _published(
        self, cell: Cell, rows: np.ndarray, labels: np.ndarray, num_classes: int
    ) -> training.Outcome:
        classifier = self.study.settings.classifier
        images = self.splits["train"].images(rows)
        if cell.technique:
            pools = self.pools(cell.technique, cell.draw, cell.synthetic_per_class)
            images += [image for pool in pools for image in pool.images()]
        validation = self.splits["validation"]
        few = first_per_class(validation.labels, classifier.published.validation_images_per_class)
        return training.train_published(
            images,
            labels,
            (validation.images(few), validation.labels[few]),
            self.splits["test"].images(),
            classifier.backbone,
            classifier.image_size,
            cell.augmentation,
            classifier.published,
            _training_seed(cell),
            num_classes,
        )


def accuracy_curve(
    study: Study, cell: Cell, learning_rate: float, steps: Sequence[int]
) -> pd.DataFrame:
    """Test accuracy of a cell's arm after given numbers of updates, at one learning rate.

    The network is the controlled one; nothing is selected. Columns: ``arm``, ``draw``, ``seed``,
    ``learning_rate``, ``step``, ``test_accuracy``.
    """
    loader = _Loader(study)
    base = study.settings.classifier.controlled
    settings = base.model_copy(
        update={"learning_rate": learning_rate, "max_train_steps": max(steps)}
    )
    every = int(np.gcd.reduce(steps))
    spec = _spec(study, cell) | {"settings": settings.model_dump(), "steps": list(steps)}

    def make(folder: Path) -> None:
        rows = []
        real, labels = loader.training_set(cell)
        test = loader.real_features("test")[:, 0]
        test_labels = torch.from_numpy(study.data.splits["test"].labels)

        def evaluate(step: int, head: torch.nn.Linear) -> None:
            if step in steps:
                rows.append((step, training.accuracy(head, test, test_labels)))

        training.train_head(
            loader.features(cell, real),
            torch.from_numpy(labels),
            settings,
            _training_seed(cell),
            len(study.data.class_names),
            every,
            evaluate,
        )
        pd.DataFrame(rows, columns=["step", "test_accuracy"]).to_csv(
            folder / "curve.csv", index=False
        )

    curve = pd.read_csv(study.store.get("curves", spec, make) / "curve.csv")
    return curve.assign(arm=cell.arm, draw=cell.draw, seed=cell.seed, learning_rate=learning_rate)
