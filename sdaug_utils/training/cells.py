"""Cells: one training run each, one row of results each, made once and kept in the store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from sdaug_utils.compute import device_of, one_thread
from sdaug_utils.data import augment, shifts
from sdaug_utils.data.datasets import first_per_class, subset
from sdaug_utils.data.images import Dataset, Images
from sdaug_utils.generation.pools import Pool, images_of, technique_pools
from sdaug_utils.generation.technique import inputs_percent, technique_requests
from sdaug_utils.lazy import torch
from sdaug_utils.params import Augmentation, Parameters, Protocol, Rule, Technique
from sdaug_utils.registry import techniques
from sdaug_utils.store import digest, keep_digests
from sdaug_utils.study import Study
from sdaug_utils.training import classifier, features, mixing, segmenter, selection

CODE_VERSION = 4
RECIPE = "classifier.controlled"  # a section of the settings
Overrides = tuple[tuple[str, str | int | float], ...]  # paths in the settings, and values
LENGTH = (f"{RECIPE}.max_train_steps", f"{RECIPE}.validation_steps")  # both: last weights count
STACK = 9  # heads that are trained side by side: more are not faster
SETTING = ("task", "protocol", "arm", "real_percent", "synthetic_per_class")
"""What tells one setting of an experiment from another; each has a run per draw and seed."""


class Cell(Parameters):
    """What one training run sees: real subset, synthetic images, augmentation, seed."""

    task: Literal["classification", "segmentation"] = "classification"
    protocol: Protocol | Literal["pixels"]
    real_percent: float = Field(ge=0, le=100)
    draw: int
    seed: int
    augmentation: Augmentation = "none"
    technique: Technique | None = None
    synthetic_per_class: int = 0
    controls_from_outside: bool = False  # as in the thesis: a leak, shown as such in experiment 06
    rule: Rule | None = None  # by which the synthetic images are chosen ...
    chosen_from: int = 0  # ... from so many of each class
    overrides: Overrides = ()  # settings that differ from the profile's, by path
    updates_as: Protocol | None = None  # as many updates as the same run of this protocol had
    test_sets: tuple[str, ...] = ()  # shifts of the test images; none: as they are, alone
    variant: str = ""  # what figures call its overrides

    @property
    def arm(self) -> str:
        """The name under which figures and tables show it."""
        parts = [
            self.technique,
            self.augmentation if self.augmentation != "none" else None,
            "outside" if self.controls_from_outside else None,
            self.rule,
            self.variant,
        ]
        return "+".join(part for part in parts if part) or "baseline"

    @property
    def num_made(self) -> int:
        """Synthetic images of each class that there have to be."""
        return self.chosen_from if self.rule else self.synthetic_per_class

    def changed(self, overrides: Mapping[str, Any]) -> Cell:
        """The same run with further settings that differ from the profile's.

        Their keys are paths in its section ``common``, as in ``segmenter.max_train_steps``.
        """
        merged = tuple(sorted({**dict(self.overrides), **overrides}.items()))
        return self.model_copy(update={"overrides": merged})

    @property
    def partner(self) -> Cell | None:
        """The run that decides its number of updates, if there is one."""
        if self.updates_as is None:
            return None
        own = {"protocol": self.updates_as, "updates_as": None, "overrides": (), "test_sets": ()}
        return self.model_copy(update=own)

    def fields(self) -> dict[str, Any]:
        """What a row of results says of it; of a rule or a variant only if there is one."""
        left_out = {"overrides", "updates_as", "test_sets"}
        left_out |= set() if self.rule else {"rule", "chosen_from"}
        return self.model_dump(exclude=left_out if self.variant else left_out | {"variant"})


def study_of(study: Study, cell: Cell) -> Study:
    """The study with the settings that a cell overrides."""
    return study.changed(dict(cell.overrides))


def pool_percent(study: Study, cell: Cell) -> float:
    """The real percentage that the images of a cell's pools come from; 100 if any will do."""
    if not cell.technique or cell.controls_from_outside:
        return 100
    return inputs_percent(study, techniques()[cell.technique], cell.real_percent)


def share(study: Study, cell: Cell) -> float:
    """How much of a synthetic image's label is its class; the rest is of what it follows."""
    return techniques()[cell.technique].share(study.settings) if cell.technique else 1.0


def repeated(
    arms: Iterable[Mapping[str, Any]],
    protocol: Protocol | Literal["pixels"],
    num_draws: int,
    num_seeds: int,
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
            "already in the store": is_made(study, cell),
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


def run(study: Study, cells: Sequence[Cell]) -> pd.DataFrame:
    """Train what is not in the store yet; one row per cell.

    Columns: the cell's fields, ``arm``, ``num_real`` and ``num_synthetic`` (training images),
    ``num_updates``, ``selected_step``, ``validation_score``, ``test_score``, and ``scores``, the
    score of each test image: (n_test,) booleans, right or wrong, for a classifier (``predictions``
    are the classes), the weighted Jaccard index in 0 to 1 for a segmenter (then ``mean_iou`` holds
    that of each image, too).

    A cell with ``test_sets`` has a row for each of them, named in the column ``shift``, with
    ``predictions``, ``scores`` and ``confidences``, the probabilities of the classes predicted.
    """
    make(study, cells)
    return pd.DataFrame([row for cell in cells for row in _rows(study, cell)])


def accuracies(study: Study, cells: Sequence[Cell]) -> pd.DataFrame:
    """Test accuracy by number of updates: one row per cell, which is trained if need be.

    Columns: ``step``, ``test_accuracy``, ``arm``, ``real_percent``, ``draw``, ``seed``,
    ``learning_rate``.
    """
    rates = [study_of(study, cell).settings.classifier.controlled.learning_rate for cell in cells]
    names = {"num_updates": "step", "test_score": "test_accuracy"}
    table = run(study, cells).rename(columns=names).assign(learning_rate=rates)
    return table[[*names.values(), "arm", "real_percent", "draw", "seed", "learning_rate"]]


def stacks(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells in parts that are trained in one go: heads of one recipe, everything else alone.

    A cell comes after its partner.
    """
    heads: dict[Any, list[Cell]] = {}
    parts: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: cell.updates_as is not None):
        if cell.task == "classification" and cell.protocol != "published" and not cell.updates_as:
            recipe = (cell.protocol, cell.overrides, cell.test_sets)
            heads.setdefault(recipe, []).append(cell)
        else:
            parts.append([cell])
    for same in heads.values():
        parts += [same[i : i + STACK] for i in range(0, len(same), STACK)]
    return parts


def is_made(study: Study, cell: Cell) -> bool:
    """Whether the store has a cell's run."""
    return study.store.is_whole(folder(study, cell), to_read=True)


def make(study: Study, cells: Sequence[Cell]) -> None:
    """Train what is not in the store yet, and the partners that decide numbers of updates."""
    missing = [cell for cell in cells if not is_made(study, cell)]
    if partners := [cell.partner for cell in missing if cell.partner]:
        make(study, partners)
    # The largest pools first: a model that is not kept makes all its images at once.
    for cell in sorted(missing, key=lambda cell: -cell.num_made):
        trainer_of(study_of(study, cell)).prepare(cell)
    for some in stacks(missing):
        own = study_of(study, some[0])
        if partner := some[0].partner:
            updates = _result(study, partner)["num_updates"]
            own = own.changed(dict.fromkeys(LENGTH, updates))  # its last weights are tested

        def write(
            positions: list[int], folders: list[Path], some: list[Cell] = some, own: Study = own
        ) -> None:
            trainer_of(own).train([some[position] for position in positions], folders)

        with one_thread(study.settings):
            study.store.get_all("cells", [spec(study, cell) for cell in some], write)


def _result(study: Study, cell: Cell) -> dict[str, Any]:
    return json.loads((folder(study, cell) / "result.json").read_text())


def validation_curve(study: Study, cell: Cell) -> pd.DataFrame:
    """What a trained cell's weights scored on validation images, by ``step``.

    ``score`` is the accuracy of a classifier, the loss of a segmenter.
    """
    return pd.DataFrame(_result(study, cell)["validation_curve"], columns=["step", "score"])


def _rows(study: Study, cell: Cell) -> list[dict[str, Any]]:
    own, result = folder(study, cell), _result(study, cell)
    fields, labels = {**cell.fields(), "arm": cell.arm}, study.data.splits["test"].labels
    del result["validation_curve"]
    if cell.task == "segmentation":
        arrays = {name: np.load(own / f"{name}.npy") for name in ("scores", "mean_iou")}
        return [{**fields, **result, **arrays}]
    predictions = np.load(own / "predictions.npy")
    if not cell.test_sets:
        return [{**fields, **result, "predictions": predictions, "scores": predictions == labels}]
    confidences = np.load(own / "confidences.npy")
    return [
        {**fields, "shift": name, "confidences": sure, "predictions": found}
        | {"scores": found == labels}
        for name, sure, found in zip(cell.test_sets, confidences, predictions, strict=True)
    ]


def examples(study: Study, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """What a trained segmenter makes of one test image per class.

    Returns:
        (n,) rows of the test split and (n, height, width) predicted trimaps, labels 1 to 3.
    """
    kept = np.load(folder(study, cell) / "examples.npz")
    return kept["rows"], kept["labels"]


def chosen(results: pd.DataFrame, **setting: Any) -> pd.DataFrame:
    """The runs of a setting, named by columns: ``arm="baseline", real_percent=5``."""
    for column, value in setting.items():
        results = results[results[column] == value]
    return results


def scores(results: pd.DataFrame, **setting: Any) -> np.ndarray:
    """The test images' scores in one setting, named as in :func:`chosen`: (draws, seeds, images).

    Raises:
        KeyError: there is no such run.
        ValueError: more than one setting, or not one run per draw and seed.
    """
    rows = chosen(results, **setting)
    if rows.empty:
        raise KeyError(f"no run of {setting}")
    ordered = rows.sort_values(["draw", "seed"])
    num_draws, num_seeds = ordered["draw"].nunique(), ordered["seed"].nunique()
    runs = ordered[["draw", "seed"]].drop_duplicates()
    mixed = any(len(set(ordered[column])) > 1 for column in SETTING if column in ordered)
    if mixed or not len(ordered) == num_draws * num_seeds == len(runs):
        raise ValueError(f"runs of {setting} are not of one setting, one per draw and seed")
    return np.stack(ordered["scores"].to_list()).reshape(num_draws, num_seeds, -1)


def spec(study: Study, cell: Cell) -> dict[str, Any]:
    """Everything that determines a cell's result."""
    own = study_of(study, cell)
    settings = own.settings.classifier
    trained = settings.published if cell.protocol == "published" else settings.controlled
    backbone, recipe = str(settings.backbone), trained.model_dump()
    versions = [CODE_VERSION, features.CODE_VERSION, augment.CODE_VERSION]
    if cell.task == "classification":
        versions.append(classifier.CODE_VERSION)
        if cell.protocol == "controlled":
            versions.append(settings.image_size)
    else:
        backbone = own.settings.segmenter.backbone
        recipe = own.settings.segmenter.model_dump(exclude={"keep_features"})
        versions.append(segmenter.CODE_VERSION)
    more: dict[str, Any] = {}
    if share(own, cell) < 1:
        more["share"] = share(own, cell)
    if cell.partner:
        more["updates of"] = digest(spec(study, cell.partner))
    if cell.test_sets:
        more["test sets"] = [shifts.CODE_VERSION, *cell.test_sets]
    return {
        "version": versions,
        "cell": cell.fields(),
        "data": data_digest(study.data, cell.task == "segmentation"),
        "rows": real_rows(study, cell).tolist(),
        "backbone": features.BACKBONES[backbone],
        "settings": recipe,
        "pools": pool_keys(study, cell),
        **more,
    }


def pool_keys(study: Study, cell: Cell) -> list[str]:
    """Keys of the pools that a cell's synthetic images are of."""
    if not cell.technique:
        return []
    own = study_of(study, cell)
    return pool_digests(own, cell.technique, cell.draw, pool_percent(own, cell))


def real_rows(study: Study, cell: Cell) -> np.ndarray:
    """Rows of the train split that a cell trains on."""
    return _subset(study.data, cell.real_percent, cell.draw)


@lru_cache(maxsize=256)
def _subset(data: Dataset, percent: float, draw: int) -> np.ndarray:
    return subset(data.splits["train"].labels, percent, draw) if percent else np.array([], int)


def training_seed(cell: Cell) -> int:
    """The same for all arms of a draw and seed, and another for every draw."""
    return 1000 * cell.draw + cell.seed


def folder(study: Study, cell: Cell) -> Path:
    """Where the store has a cell's run, or will have it."""
    return study.store.folder("cells", spec(study, cell))


@lru_cache(maxsize=1024)
def pool_digests(study: Study, technique: Technique, draw: int, percent: float) -> list[str]:
    requests = technique_requests(study, technique, draw, 1, percent)
    return [digest(request.spec) for request in requests]


@lru_cache(maxsize=8)
def data_digest(data: Dataset, with_trimaps: bool = False) -> str:
    """A hash of all images and labels of the three splits, and of the trimaps if need be."""
    content = {}
    for name, split in data.splits.items():
        content[name] = [split.images().digests(), split.labels.tolist()]
        if with_trimaps:
            content[name].append([split.trimap_digest(i) for i in range(len(split))])
    keep_digests()
    return digest(content)


def test_images(study: Study, name: str) -> Images:
    """The test images, shifted in the way that has this name; ``none`` is as they are."""
    test = study.data.splits["test"]
    return test.images() if name == "none" else shifts.shifted(test, name)


@lru_cache(maxsize=4)
def trainer_of(study: Study) -> Trainer:
    """What trains cells in this process: the same object for the same settings."""
    return Trainer(study)


class Trainer:
    """Trains cells; the pools and features that they share are read once."""

    def __init__(self, study: Study) -> None:
        self.study, self.splits = study, study.data.splits
        self.num_classes = len(study.data.class_names)
        self.pools = cache(partial(technique_pools, study))
        self.features_of = cache(self._features_of)  # of images as they are
        self.kept_of = cache(self._kept)  # rows of pools' images
        self.pixels_of = cache(lambda name: features.pixel_vectors(self.splits[name].images()))
        self.shifted = cache(self._shifted)  # features of test images
        self.maps = cache(lambda: segmenter.FeatureMaps(study))

    def cell_pools(self, cell: Cell) -> list[Pool]:
        """The synthetic images of a cell, a pool per class."""
        if not cell.technique:
            return []
        percent = pool_percent(self.study, cell)
        return self.pools(cell.technique, cell.draw, cell.num_made, percent)

    def kept(self, cell: Cell) -> np.ndarray:
        """Which of the pools' images, one pool after the other, a cell's rule keeps."""
        return self.kept_of(cell.model_copy(update={"seed": 0}))

    def _kept(self, cell: Cell) -> np.ndarray:
        assert cell.rule
        rows, pools = real_rows(self.study, cell), self.cell_pools(cell)
        labels = self.splits["train"].labels[rows]
        real = self.features_of("train")[rows]
        made = self.features_of(tuple(pools))[:, 0]
        data = classifier.TrainingSet(real, torch.from_numpy(labels), training_seed(cell))
        recipe = self.study.settings.classifier.controlled
        with one_thread(self.study.settings):
            judge = classifier.judge(data, recipe, self.num_classes)
        with torch.no_grad():
            probabilities = judge(made).softmax(dim=1).numpy()
        kept = []
        for label in range(self.num_classes):
            first = label * cell.chosen_from
            own = slice(first, first + cell.chosen_from)
            candidates = selection.Candidates(
                made[own].numpy(),
                probabilities[own],
                label,
                real[labels == label, 0].numpy(),
                np.random.default_rng((cell.draw, label)),
            )
            kept.append(first + selection.RULES[cell.rule](candidates, cell.synthetic_per_class))
        return np.concatenate(kept)

    def _features_of(self, part: str | tuple[Pool, ...]) -> torch.Tensor:
        """Features of a split, by its name, or of pools: (n, 1, features)."""
        images = self.splits[part].images() if isinstance(part, str) else images_of(part)
        return features.image_features(self.study, images)

    def _shifted(self, name: str) -> torch.Tensor:
        images = test_images(self.study, name)
        return features.image_features(self.study, images)[:, 0]

    def tested(self, cell: Cell) -> torch.Tensor:
        """What a cell's head is tested on, one test set after the other: (n, features)."""
        if cell.protocol == "pixels":
            return self.pixels_of("test")[:, 0]
        return torch.cat([self.shifted(name) for name in cell.test_sets or ("none",)])

    def prepare(self, cell: Cell) -> None:
        """Load or make what a cell needs, so that cells can then be trained."""
        self.cell_pools(cell)
        if cell.task == "segmentation":
            self.maps().of(self.training_set(cell)[0])
        elif cell.protocol == "published":
            features.load_backbone(self.study.settings.classifier.backbone)
        elif cell.protocol == "controlled":
            self.features_of("validation")
            self.tested(cell)
            if cell.augmentation == "none" or cell.augmentation in mixing.ALPHAS:
                self.features(cell)
            else:
                for images, number in self._to_view(cell):
                    features.fill(self.study, images, cell.augmentation, number)

    def training_set(self, cell: Cell) -> tuple[Images, np.ndarray]:
        """The images that a cell trains on, real ones first, and their labels."""
        rows, synthetic = real_rows(self.study, cell), self._synthetic(cell)
        labels = np.repeat(np.arange(self.num_classes), cell.synthetic_per_class)
        images = self.splits["train"].images(rows) + synthetic
        return images, np.concatenate([self.splits["train"].labels[rows], labels])

    def _synthetic(self, cell: Cell) -> Images:
        """The images of a cell's pools, or those of them that its rule keeps."""
        every = images_of(self.cell_pools(cell))
        return every.taken(self.kept(cell).tolist()) if cell.rule else every

    def targets(self, cell: Cell) -> torch.Tensor:
        """Labels of a cell's training images, or, if some are mixed, the shares of each class.

        (n,), (n, classes) or, if each view has its own, (n, views, classes).
        """
        labels = torch.from_numpy(self.training_set(cell)[1])
        own = share(self.study, cell)
        if own == 1.0 and cell.augmentation not in mixing.ALPHAS:
            return labels
        whole = torch.nn.functional.one_hot(labels, self.num_classes).float()
        if own < 1.0:
            self._share(cell, whole, own)
        return self._partners(cell).mixed(whole) if cell.augmentation in mixing.ALPHAS else whole

    def _share(self, cell: Cell, whole: torch.Tensor, own: float) -> None:
        """Give a part of synthetic images' labels to the class of the image that they follow."""
        rows = np.array([row for pool in self.cell_pools(cell) for row in pool.followed])
        rows = rows[self.kept(cell)] if cell.rule else rows
        other = torch.from_numpy(self.splits["train"].labels[rows])
        first = len(whole) - len(rows)  # of the synthetic images
        whole[first:] *= own
        whole[first:] += (1 - own) * torch.nn.functional.one_hot(other, self.num_classes)

    def _partners(self, cell: Cell) -> mixing.Partners:
        """What each view of a cell's training images is mixed with: the same for all its seeds."""
        settings, number = self.study.settings.classifier, len(self.training_set(cell)[0])
        views, side = settings.controlled.num_views(number), settings.image_size
        return mixing.partners(cell.augmentation, number, views, cell.draw, side)

    def features(self, cell: Cell) -> list[torch.Tensor]:
        """Features of a cell's real training images, then of its synthetic ones, if it has any.

        Each (n, views, features). Where images are mixed, they are all in one.
        """
        if cell.protocol == "pixels":
            return [features.pixel_vectors(self.training_set(cell)[0])]
        if cell.augmentation == "cutmix":
            chosen, side = self._partners(cell), self.study.settings.classifier.image_size
            images = mixing.cut_and_pasted(self.training_set(cell)[0], chosen, side)
            return [features.image_features(self.study, images).view(*chosen.rows.shape, -1)]
        if cell.augmentation == "mixup":
            plain = self.features(cell.model_copy(update={"augmentation": "none"}))
            return [self._partners(cell).mixed(torch.cat(plain)[:, 0])]
        if cell.augmentation != "none":
            return [
                features.image_features(self.study, images, cell.augmentation, number)
                for images, number in self._to_view(cell)
            ]
        real = self.features_of("train")[real_rows(self.study, cell)]
        if not (pools := self.cell_pools(cell)):
            return [real]
        made = self.features_of(tuple(pools))
        return [real, made[self.kept(cell)] if cell.rule else made]

    def _to_view(self, cell: Cell) -> list[tuple[Images, int]]:
        """Real and synthetic images that are augmented, and how many views each of them has."""
        real = self.splits["train"].images(real_rows(self.study, cell))
        synthetic = self._synthetic(cell)
        settings, total = self.study.settings.classifier.controlled, len(real) + len(synthetic)
        both = [
            (real, settings.num_views(total)),
            (synthetic, settings.num_views(total, synthetic=True)),
        ]
        return [(images, number) for images, number in both if len(images)]

    def train(self, some: Sequence[Cell], folders: Sequence[Path]) -> None:
        """Train cells: one, or several of the controlled protocol.

        A folder gets ``result.json`` and what there is per test image.
        """
        if some[0].task == "segmentation":
            outcomes: list[Any] = [self._segmentation(some[0])]
        elif some[0].protocol == "published":
            outcomes = [self.published(some[0])]
        else:
            outcomes = self.controlled(some)
        for cell, folder, outcome in zip(some, folders, outcomes, strict=True):
            self._save(cell, folder, outcome)

    def _save(self, cell: Cell, folder: Path, outcome: Any) -> None:
        labels = self.splits["test"].labels
        if cell.task == "segmentation":
            scores = outcome.weighted_jaccard
            np.save(folder / "scores.npy", scores.astype(np.float32))
            np.save(folder / "mean_iou.npy", outcome.mean_iou.astype(np.float32))
            shown = first_per_class(labels, 1)
            np.savez_compressed(folder / "examples.npz", rows=shown, labels=outcome.labels[shown])
        else:
            shape = (len(cell.test_sets), len(labels)) if cell.test_sets else (len(labels),)
            predictions = outcome.predictions.astype(np.int32).reshape(shape)
            np.save(folder / "predictions.npy", predictions)
            if cell.test_sets:
                np.save(folder / "confidences.npy", outcome.confidences.reshape(shape))
            scores = predictions == labels
        result = {
            "num_real": len(real_rows(self.study, cell)),
            "num_synthetic": self.num_classes * cell.synthetic_per_class,
            "num_updates": outcome.num_updates,
            "selected_step": outcome.selected_step,
            "validation_score": outcome.validation_score,
            "test_score": float(scores.mean()),
            "validation_curve": outcome.curve,
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2))

    def head_sets(self, some: Sequence[Cell]) -> list[classifier.TrainingSet]:
        """What the heads of cells learn from; those that differ in their seed alone share it."""

        @cache
        def seen(cell: Cell) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            parts = self.features(cell)
            counts = [torch.full((len(part),), part.shape[1]) for part in parts]
            vectors = torch.cat([part.flatten(0, 1) for part in parts])
            return vectors, self.targets(cell), torch.cat(counts)

        sets = []
        for cell in some:
            vectors, targets, counts = seen(cell.model_copy(update={"seed": 0}))
            sets.append(classifier.TrainingSet(vectors, targets, training_seed(cell), counts))
        return sets

    def controlled(self, some: Sequence[Cell]) -> list[classifier.Outcome]:
        """Classifiers under the controlled protocol, on kept features or all of them on pixels."""
        held_out = self.pixels_of if some[0].protocol == "pixels" else self.features_of
        return classifier.train_controlled(
            self.head_sets(some),
            (held_out("validation")[:, 0], self.splits["validation"].labels),
            self.tested(some[0]),
            self.study.settings.classifier.controlled,
            self.num_classes,
        )

    def published(self, cell: Cell) -> classifier.Outcome:
        """A classifier under the thesis's protocol, on images."""
        settings, validation = self.study.settings.classifier, self.splits["validation"]
        return classifier.train_published(
            *self.training_set(cell),
            (validation.images(), validation.labels),
            self.splits["test"].images(),
            settings.backbone,
            cell.augmentation,
            settings.published,
            training_seed(cell),
            self.num_classes,
            device_of(self.study.settings),
        )

    def _segmentation(self, cell: Cell) -> segmenter.Segmented:
        """Synthetic images share the trimap of the image that they follow: it is kept once."""
        followed = [row for pool in self.cell_pools(cell) for row in pool.followed]
        rows, which = np.unique([*real_rows(self.study, cell), *followed], return_inverse=True)
        trimaps = [self.splits["train"].trimap(int(row)) for row in rows]
        images, protocol = self.training_set(cell)[0], cell.protocol
        assert protocol != "pixels"
        return segmenter.train(
            self.maps(), images, trimaps, self.splits, protocol, training_seed(cell), which.tolist()
        )
