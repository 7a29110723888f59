"""Cells: one training run each, one row of results each, made once and kept in the store."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from sdaug_utils import segmentation, training
from sdaug_utils.datasets import digests, first_per_class, read_images, subset
from sdaug_utils.foundation import device_of, in_parallel
from sdaug_utils.params import Augmentation, Control, Parameters, Protocol, Technique
from sdaug_utils.pools import Pool, has_fewer_inputs, technique_pools, technique_requests
from sdaug_utils.store import digest
from sdaug_utils.study import Study

CODE_VERSION = 2
SETTING = ("task", "protocol", "arm", "real_percent", "synthetic_per_class")
"""What tells one setting of an experiment from another; each has a run per draw and seed."""


class Cell(Parameters):
    """What one training run sees: real subset, synthetic images, augmentation, seed."""

    task: Literal["classification", "segmentation"] = "classification"
    protocol: Protocol
    real_percent: float = Field(ge=0, le=100)
    draw: int
    seed: int
    augmentation: Augmentation = "none"
    technique: Technique | None = None
    synthetic_per_class: int = 0
    controls_from_outside: bool = False  # as in the thesis: a leak, shown as such in experiment 06

    @property
    def arm(self) -> str:
        """The name under which the thesis's figures and tables show it."""
        parts = [
            self.technique,
            self.augmentation if self.augmentation != "none" else None,
            "outside" if self.controls_from_outside else None,
        ]
        return "+".join(part for part in parts if part) or "baseline"


def pool_percent(study: Study, cell: Cell) -> float:
    """The real percentage that the images of a cell's pools come from; 100 if any will do."""
    if cell.technique in get_args(Control):
        return 100 if cell.controls_from_outside else cell.real_percent
    if cell.technique and cell.real_percent:
        few = has_fewer_inputs(study, cell.technique, cell.real_percent)
        return cell.real_percent if few else 100
    return 100


def repeated(
    arms: Iterable[Mapping[str, Any]], protocol: Protocol, num_draws: int, num_seeds: int
) -> list[Cell]:
    """A cell per draw and seed of each arm; an arm that comes twice counts once."""
    cells = [
        Cell(protocol=protocol, draw=draw, seed=seed, **arm)
        for draw in range(num_draws)
        for arm in arms
        for seed in range(num_seeds)
    ]
    return list(dict.fromkeys(cells))


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
    listed = ("real %", "synthetic per class")
    grouped = pd.DataFrame(rows).groupby("arm", sort=False)
    return grouped.agg(
        dict.fromkeys(listed, _listed) | dict.fromkeys(("runs", "already in the store"), "sum")
    )


def _listed(values: pd.Series) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def run(study: Study, cells: Sequence[Cell], progress: bool = True) -> pd.DataFrame:
    """Train what is not in the store yet; one row per cell.

    Columns: the cell's fields, ``arm``, ``num_real`` and ``num_synthetic`` (training images),
    ``num_updates``, ``selected_step``, ``validation_score``, ``test_score``, and ``scores``, the
    score of each test image: (n_test,) booleans, right or wrong, for a classifier, the weighted
    Jaccard index in 0 to 1 for a segmenter (then ``mean_iou`` holds that of each image, too).
    """
    loader = _Loader(study)
    missing = [cell for cell in cells if not _folder(study, cell).exists()]
    # The largest pools first: a model that is not kept makes all its images at once.
    for cell in sorted(missing, key=lambda cell: -cell.synthetic_per_class):
        loader.prepare(cell)
    with tqdm(total=len(missing), desc="training runs", disable=not (progress and missing)) as bar:

        def train(cell: Cell) -> None:
            study.store.get("cells", spec(study, cell), partial(loader.train, cell))
            bar.update()

        # Heads on kept features are too small to gain from threads; a segmenter's dropout draws
        # from the one global generator: no two at the same time.
        whole = [c for c in missing if c.task == "classification" and c.protocol == "published"]
        for cell in missing:
            if cell not in whole:
                train(cell)
        in_parallel(study.settings, lambda i: train(whole[i]), range(len(whole)))
    new = set(missing)
    rows = []
    for cell in cells:
        study.store.record("runs", spec(study, cell), [0], [0] if cell in new else [])
        folder = _folder(study, cell)
        result = json.loads((folder / "result.json").read_text())
        if cell.task == "classification":
            predictions = np.load(folder / "predictions.npy")
            scores = predictions == study.data.splits["test"].labels
        else:
            scores = np.load(folder / "scores.npy")
            result["mean_iou"] = np.load(folder / "mean_iou.npy")
        rows.append({**cell.model_dump(), "arm": cell.arm, **result, "scores": scores})
    return pd.DataFrame(rows)


def examples(study: Study, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """What a trained segmenter makes of one test image per class.

    Returns:
        (n,) rows of the test split and (n, height, width) predicted trimaps, labels 1 to 3.
    """
    kept = np.load(_folder(study, cell) / "examples.npz")
    return kept["rows"], kept["labels"]


def scores(results: pd.DataFrame, **chosen: Any) -> np.ndarray:
    """The test images' scores in one setting: (draws, seeds, test images).

    ``chosen`` names the setting by columns of ``results``: ``arm="baseline", real_percent=5``.

    Raises:
        KeyError: there is no such run.
        ValueError: more than one setting, or not one run per draw and seed.
    """
    rows = results
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    if rows.empty:
        raise KeyError(f"no run of {chosen}")
    ordered = rows.sort_values(["draw", "seed"])
    num_draws, num_seeds = ordered["draw"].nunique(), ordered["seed"].nunique()
    runs = ordered[["draw", "seed"]].drop_duplicates()
    mixed = any(len(set(ordered[column])) > 1 for column in SETTING if column in ordered)
    if mixed or not len(ordered) == num_draws * num_seeds == len(runs):
        raise ValueError(f"runs of {chosen} are not of one setting, one per draw and seed")
    return np.stack(ordered["scores"].to_list()).reshape(num_draws, num_seeds, -1)


def spec(study: Study, cell: Cell) -> dict[str, Any]:
    """Everything that determines a cell's result."""
    classifier, backbone = study.settings.classifier, str(study.settings.classifier.backbone)
    if cell.task == "classification":
        settings = getattr(classifier, cell.protocol).model_dump()
        recipe = [training.CODE_VERSION, training.augment.CODE_VERSION, classifier.image_size]
    else:
        settings = study.settings.segmenter.model_dump(exclude={"keep_features"})
        backbone = study.settings.segmenter.backbone
        recipe = [segmentation.CODE_VERSION]
    return {
        "version": [CODE_VERSION, *recipe],
        "cell": cell.model_dump(),
        "data": data_digest(study, cell.task == "segmentation"),
        "rows": _real_rows(study, cell).tolist(),
        "backbone": training.BACKBONES[backbone],
        "settings": settings,
        "pools": _pool_digests(study, cell.technique, cell.draw, pool_percent(study, cell))
        if cell.technique
        else [],
    }


def _real_rows(study: Study, cell: Cell) -> np.ndarray:
    if cell.real_percent == 0:
        return np.array([], int)
    return subset(study.data.splits["train"].labels, cell.real_percent, cell.draw)


def _training_seed(cell: Cell) -> int:
    """The same for all arms of a draw and seed, and another for every draw."""
    return 1000 * cell.draw + cell.seed


def _folder(study: Study, cell: Cell) -> Path:
    return study.store.folder("cells", spec(study, cell))


@lru_cache(maxsize=256)
def _pool_digests(study: Study, technique: Technique, draw: int, percent: float) -> list[str]:
    requests = technique_requests(study, technique, draw, 1, percent)
    return [digest(request.spec) for request in requests]


@lru_cache(maxsize=8)
def data_digest(study: Study, with_trimaps: bool = False) -> str:
    """A hash of all images and labels of the three splits, and of the trimaps if need be."""
    content = {}
    for name, split in study.data.splits.items():
        content[name] = [digests(split.images()), split.labels.tolist()]
        if with_trimaps:
            content[name].append(digests([split.trimap(i) for i in range(len(split))]))
    return digest(content)


class _Loader:
    """Keeps the images and features of the pools at hand while cells are trained."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.splits = study.data.splits
        self.pools = cache(self._pools)
        self.pool_features = cache(self._pool_features)
        self.real_features = cache(self._real_features)
        self.maps = cache(lambda: segmentation.FeatureMaps(study))

    def _pools(self, technique: Technique, draw: int, count: int, percent: float) -> list[Pool]:
        return technique_pools(self.study, technique, draw, count, percent, progress=False)

    def cell_pools(self, cell: Cell) -> list[Pool]:
        if not cell.technique:
            return []
        percent = pool_percent(self.study, cell)
        return self.pools(cell.technique, cell.draw, cell.synthetic_per_class, percent)

    def _pool_features(self, files: tuple[Path, ...], augmentation: Augmentation) -> Tensor:
        images = read_images(files)
        return training.image_features(
            self.study, images, augmentation, self._num_views(augmentation)
        )

    def _real_features(self, split: str, augmentation: Augmentation = "none") -> Tensor:
        images = self.splits[split].images()
        return training.image_features(
            self.study, images, augmentation, self._num_views(augmentation)
        )

    def _num_views(self, augmentation: Augmentation) -> int:
        views = self.study.settings.classifier.controlled.num_views
        return 1 if augmentation == "none" else views

    def prepare(self, cell: Cell) -> None:
        """Load or make what a cell needs, so that cells can then be trained side by side."""
        self.cell_pools(cell)
        if cell.task == "classification" and cell.protocol == "controlled":
            for split in ("validation", "test"):
                self.real_features(split)
            self.features(cell, np.arange(1))

    def training_set(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """A cell's real images, as rows of the train split, and the labels of all its images."""
        rows = _real_rows(self.study, cell)
        classes = np.arange(len(self.study.data.class_names))
        synthetic = np.repeat(classes, cell.synthetic_per_class)
        return rows, np.concatenate([self.splits["train"].labels[rows], synthetic])

    def train(self, cell: Cell, folder: Path) -> None:
        rows, labels = self.training_set(cell)
        counts = {"num_real": len(rows), "num_synthetic": len(labels) - len(rows)}
        if cell.task == "segmentation":
            result = self._segmentation(cell, rows, folder)
        else:
            train = self._controlled if cell.protocol == "controlled" else self._published
            outcome = train(cell, rows, labels, len(self.study.data.class_names))
            np.save(folder / "predictions.npy", outcome.predictions.astype(np.uint8))
            right = outcome.predictions == self.splits["test"].labels
            result = {
                "num_updates": outcome.num_updates,
                "selected_step": outcome.selected_step,
                "validation_score": outcome.validation_accuracy,
                "test_score": float(right.mean()),
            }
        (folder / "result.json").write_text(json.dumps(counts | result, indent=2))

    def _segmentation(self, cell: Cell, rows: np.ndarray, folder: Path) -> dict[str, float]:
        """Train a segmenter; synthetic images share the trimap of the image they follow."""
        train, pools = self.splits["train"], self.cell_pools(cell)
        images = train.images(rows) + read_images([file for pool in pools for file in pool.files])
        followed = [row for pool in pools for row in pool.control_rows]
        trimaps = [train.trimap(int(row)) for row in (*rows, *followed)]
        outcome = segmentation.train(
            self.maps(), images, trimaps, self.splits, cell.protocol, _training_seed(cell)
        )
        np.save(folder / "scores.npy", outcome.weighted_jaccard.astype(np.float32))
        np.save(folder / "mean_iou.npy", outcome.mean_iou.astype(np.float32))
        shown = first_per_class(self.splits["test"].labels, 1)
        np.savez_compressed(folder / "examples.npz", rows=shown, labels=outcome.labels[shown])
        return {
            "num_updates": outcome.num_updates,
            "selected_step": outcome.selected_step,
            "validation_score": outcome.validation_jaccard,
            "test_score": float(outcome.weighted_jaccard.mean()),
        }

    def features(self, cell: Cell, rows: np.ndarray) -> Tensor:
        """Features of a cell's training images, real ones first: (n, views, features)."""
        features = self.real_features("train", cell.augmentation)[rows]
        if pools := self.cell_pools(cell):
            files = tuple(file for pool in pools for file in pool.files)
            features = torch.cat([features, self.pool_features(files, cell.augmentation)])
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
        images += read_images([file for pool in self.cell_pools(cell) for file in pool.files])
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
            device_of(self.study.settings),
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
    determined_by = spec(study, cell) | {"settings": settings.model_dump(), "steps": list(steps)}

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

    curve = pd.read_csv(study.store.get("curves", determined_by, make) / "curve.csv")
    return curve.assign(arm=cell.arm, draw=cell.draw, seed=cell.seed, learning_rate=learning_rate)
