"""Training: runs that the store lacks are trained, those that share features together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sdaug_utils.compute import device_of, one_thread
from sdaug_utils.data.datasets import first_per_class
from sdaug_utils.data.images import Images
from sdaug_utils.generation.pool_files import Pool, images_of
from sdaug_utils.generation.pools import technique_pools
from sdaug_utils.lazy import torch
from sdaug_utils.study import Study
from sdaug_utils.training import classifier, features, mixing, runs, segmenter, selection
from sdaug_utils.training.runs import Run, is_made, real_rows, study_of, training_seed

STACK = 9  # heads that are trained side by side: more are not faster


def results_of(study: Study, wanted: Sequence[Run]) -> pd.DataFrame:
    """Train the runs that are not in the store yet; one row per run.

    Columns: the run's fields, ``arm``, ``num_real`` and ``num_synthetic`` (training images),
    ``num_updates``, ``selected_step``, ``validation_score``, ``test_score``, and ``scores``, the
    score of each test image: (n_test,) booleans, right or wrong, for a classifier (``predictions``
    are the classes), the weighted Jaccard index in 0 to 1 for a segmenter (then ``mean_iou`` holds
    that of each image, too).

    A run with ``test_sets`` has a row for each of them, named in the column ``shift``, with
    ``predictions``, ``scores`` and ``confidences``, the probabilities of the classes predicted, in
    place of the columns from ``num_real`` to ``test_score``.
    """
    make(study, wanted)
    return pd.DataFrame([row for run in wanted for row in _rows(study, run)])


def accuracies(study: Study, wanted: Sequence[Run]) -> pd.DataFrame:
    """Test accuracy by number of updates: one row per run, which is trained if need be.

    Columns: ``step``, ``test_accuracy``, ``arm``, ``real_percent``, ``draw``, ``seed``,
    ``learning_rate``.
    """
    rates = [study_of(study, run).settings.classifier.controlled.learning_rate for run in wanted]
    names = {"num_updates": "step", "test_score": "test_accuracy"}
    table = results_of(study, wanted).rename(columns=names).assign(learning_rate=rates)
    return table[[*names.values(), "arm", "real_percent", "draw", "seed", "learning_rate"]]


def _rows(study: Study, run: Run) -> list[dict[str, Any]]:
    folder, result = runs.folder_of(study, run), runs.read_result(study, run)
    del result["validation_curve"]
    row, labels = {**run.fields(), "arm": run.arm}, study.data.splits["test"].labels
    if run.task == "segmentation":
        arrays = {name: np.load(folder / f"{name}.npy") for name in ("scores", "mean_iou")}
        return [{**row, **result, **arrays}]
    predictions = np.load(folder / "predictions.npy")
    if not run.test_sets:
        return [{**row, **result, "predictions": predictions, "scores": predictions == labels}]
    named = zip(run.test_sets, np.load(folder / "confidences.npy"), predictions, strict=True)
    return [
        {**row, "shift": name, "confidences": sure, "predictions": found, "scores": found == labels}
        for name, sure, found in named
    ]


def overview(study: Study, wanted: Iterable[Run]) -> pd.DataFrame:
    """A table of runs before they are trained, a row per arm: what each needs, what is there."""

    def listed(values: pd.Series) -> str:
        return ", ".join(f"{value:g}" for value in values.unique())

    rows = [
        (run.arm, run.real_percent, run.synthetic_per_class, 1, is_made(study, run))
        for run in wanted
    ]
    how: dict[str, Any] = {"real %": listed, "synthetic per class": listed}
    how |= {"runs": "sum", "already in the store": "sum"}
    return pd.DataFrame(rows, columns=["arm", *how]).groupby("arm", sort=False).agg(how)


def stacks(wanted: Sequence[Run]) -> list[list[Run]]:
    """Runs in groups that are trained together, heads of one recipe; partners come first."""
    heads: dict[Any, list[Run]] = {}
    alone: list[list[Run]] = []
    for run in sorted(wanted, key=lambda run: run.updates_as is not None):
        if run.task == "classification" and run.protocol != "published" and not run.updates_as:
            recipe = (run.protocol, run.overrides, run.test_sets)
            heads.setdefault(recipe, []).append(run)
        else:
            alone.append([run])
    stacked = [same[i : i + STACK] for same in heads.values() for i in range(0, len(same), STACK)]
    return stacked + alone


def make(study: Study, wanted: Sequence[Run]) -> None:
    """Train the runs that the store lacks, after the partners that decide how many updates."""
    missing = [run for run in dict.fromkeys(wanted) if not is_made(study, run)]
    if partners := [run.partner for run in missing if run.partner]:
        make(study, partners)
    prepare(study, missing)
    for stack in stacks(missing):
        _train_stack(study, stack)


def _train_stack(study: Study, stack: Sequence[Run]) -> None:
    own = study_of(study, stack[0])
    if partner := stack[0].partner:
        updates = runs.read_result(study, partner)["num_updates"]
        own = own.changed(dict.fromkeys(runs.LENGTH, updates))  # its last weights are tested

    def train(positions: list[int], folders: list[Path]) -> None:
        trainer_of(own).train([stack[position] for position in positions], folders)

    with one_thread(study.settings):
        study.store.get_all("runs", [runs.spec(study, run) for run in stack], train)


def prepare(study: Study, wanted: Sequence[Run]) -> None:
    """Make the images and features that runs need, if the store lacks them."""
    # The largest pools first: a model that is not kept makes all its images at once.
    for run in sorted(wanted, key=lambda run: -run.num_made):
        trainer_of(study_of(study, run)).prepare(run)


@lru_cache(maxsize=4)
def trainer_of(study: Study) -> Trainer:
    """This process's trainer for a study's settings."""
    return Trainer(study)


class Trainer:
    """Trains runs; the pools and features that they share are read once."""

    def __init__(self, study: Study) -> None:
        self.study, self.splits = study, study.data.splits
        self.settings, self.num_classes = study.settings.classifier, len(study.data.class_names)
        self.pools = cache(partial(technique_pools, study))
        self.features_of = cache(self._features_of)  # of images that are not augmented
        self.kept_of = cache(self._kept)  # rows of pools' images
        self.pixels_of = cache(lambda name: features.pixel_vectors(self.splits[name].images()))
        self.maps = cache(lambda: segmenter.FeatureMaps(study))

    def pools_of(self, run: Run) -> list[Pool]:
        """The synthetic images of a run, a pool per class."""
        if not run.technique:
            return []
        percent = runs.pool_percent(self.study, run)
        return self.pools(run.technique, run.draw, run.num_made, percent)

    def kept(self, run: Run) -> np.ndarray:
        """Rows of the pools' images, one pool after the other, that a run's rule keeps."""
        return self.kept_of(run.model_copy(update={"seed": 0}))

    def _kept(self, run: Run) -> np.ndarray:
        assert run.rule
        rows = real_rows(self.study, run)
        real, labels = self.features_of("train")[rows], self.splits["train"].labels[rows]
        data = classifier.TrainingSet(real, torch.from_numpy(labels), training_seed(run))
        with one_thread(self.study.settings):
            head = classifier.train_reference_head(data, self.settings.controlled, self.num_classes)
        made = self.features_of(tuple(self.pools_of(run)))[:, 0]
        with torch.no_grad():
            probabilities = head(made).softmax(dim=1)
        kept = []
        pools = zip(made.split(run.chosen_from), probabilities.split(run.chosen_from), strict=True)
        for label, (vectors, probable) in enumerate(pools):
            of_class = real[labels == label, 0].numpy()
            rng = np.random.default_rng((run.draw, label))
            judged = selection.Candidates(vectors.numpy(), probable.numpy(), label, of_class, rng)
            chosen = selection.RULES[run.rule](judged, run.synthetic_per_class)
            kept.append(label * run.chosen_from + chosen)
        return np.concatenate(kept)

    def _features_of(self, part: str | tuple[Pool, ...]) -> torch.Tensor:
        """Features of a split or shifted test images, by name, or of pools: (n, 1, features)."""
        if not isinstance(part, str):
            images = images_of(part)
        elif part in self.splits:
            images = self.splits[part].images()
        else:
            images = runs.images_tested_on(self.study, part)
        return features.image_features(self.study, images)

    def test_features(self, run: Run) -> torch.Tensor:
        """Features of a run's test sets, one after the other: (n, features)."""
        if run.protocol == "pixels":
            return self.pixels_of("test")[:, 0]
        return torch.cat([self.features_of(name)[:, 0] for name in run.test_sets or ("test",)])

    def prepare(self, run: Run) -> None:
        """Load or make what a run needs, so that runs can then be trained."""
        self.pools_of(run)
        if run.task == "segmentation":
            self.maps().of(self.training_set(run)[0])
        elif run.protocol == "published":
            features.load_backbone(self.settings.backbone)
        elif run.protocol == "controlled":
            self.features_of("validation")
            self.test_features(run)
            if run.augmentation in ("none", *mixing.ALPHAS):
                self.features(run)
            else:
                for images, number in self._augmented(run):
                    features.fill(self.study, images, run.augmentation, number)

    def training_set(self, run: Run) -> tuple[Images, np.ndarray]:
        """The images that a run trains on, real ones first, and their labels."""
        rows = real_rows(self.study, run)
        labels = np.repeat(np.arange(self.num_classes), run.synthetic_per_class)
        images = self.splits["train"].images(rows) + self._synthetic(run)
        return images, np.concatenate([self.splits["train"].labels[rows], labels])

    def _synthetic(self, run: Run) -> Images:
        """The images of a run's pools, or those of them that its rule keeps."""
        every = images_of(self.pools_of(run))
        return every.taken(self.kept(run).tolist()) if run.rule else every

    def _source_rows(self, run: Run) -> np.ndarray:
        """Rows of the real images that a run's synthetic images follow."""
        rows = np.array([row for pool in self.pools_of(run) for row in pool.source_rows], int)
        return rows[self.kept(run)] if run.rule else rows

    def targets(self, run: Run) -> torch.Tensor:
        """Labels of a run's training images, or, if some are mixed, the shares of each class.

        (n,), (n, classes) or, if each view has its own, (n, views, classes).
        """
        labels = torch.from_numpy(self.training_set(run)[1])
        weight, is_mixed = runs.label_weight(self.study, run), run.augmentation in mixing.ALPHAS
        if weight == 1.0 and not is_mixed:
            return labels
        shares = torch.nn.functional.one_hot(labels, self.num_classes).float()
        if weight < 1.0:
            followed = torch.from_numpy(self.splits["train"].labels[self._source_rows(run)])
            synthetic = shares[-len(followed) :]
            synthetic *= weight
            synthetic += (1 - weight) * torch.nn.functional.one_hot(followed, self.num_classes)
        return self._mixture(run).mixed(shares) if is_mixed else shares

    def _mixture(self, run: Run) -> mixing.Mixture:
        """What each view of a run's training images is mixed with: the same for all its seeds."""
        number, side = len(self.training_set(run)[0]), self.settings.image_size
        views = self.settings.controlled.num_views(number)
        return mixing.draw_mixture(run.augmentation, number, views, run.draw, side)

    def features(self, run: Run) -> list[torch.Tensor]:
        """Features of a run's real training images and of its synthetic ones, if it has any.

        Each (n, views, features). Where images are mixed, one tensor has them all.
        """
        if run.protocol == "pixels":
            return [features.pixel_vectors(self.training_set(run)[0])]
        if run.augmentation == "cutmix":
            mixture, side = self._mixture(run), self.settings.image_size
            images = mixing.cut_and_pasted(self.training_set(run)[0], mixture, side)
            return [features.image_features(self.study, images).view(*mixture.rows.shape, -1)]
        if run.augmentation == "mixup":
            plain = self.features(run.model_copy(update={"augmentation": "none"}))
            return [self._mixture(run).mixed(torch.cat(plain)[:, 0])]
        if run.augmentation != "none":
            return [
                features.image_features(self.study, images, run.augmentation, number)
                for images, number in self._augmented(run)
            ]
        real = self.features_of("train")[real_rows(self.study, run)]
        if not (pools := self.pools_of(run)):
            return [real]
        made = self.features_of(tuple(pools))
        return [real, made[self.kept(run)] if run.rule else made]

    def _augmented(self, run: Run) -> list[tuple[Images, int]]:
        """Real and synthetic images that are augmented, and how many views each of them has."""
        real = self.splits["train"].images(real_rows(self.study, run))
        synthetic = self._synthetic(run)
        num_views = partial(self.settings.controlled.num_views, len(real) + len(synthetic))
        both = [(real, num_views()), (synthetic, num_views(synthetic=True))]
        return [(images, number) for images, number in both if len(images)]

    def train(self, some: Sequence[Run], folders: Sequence[Path]) -> None:
        """Train one run, or several heads side by side, and write the results into folders."""
        if some[0].task == "segmentation":
            outcomes: list[Any] = [self._segmentation(some[0])]
        elif some[0].protocol == "published":
            outcomes = [self.published(some[0])]
        else:
            outcomes = self.controlled(some)
        for run, folder, outcome in zip(some, folders, outcomes, strict=True):
            self._save(run, folder, outcome)

    def _save(self, run: Run, folder: Path, outcome: Any) -> None:
        labels = self.splits["test"].labels
        if run.task == "segmentation":
            scores = outcome.weighted_jaccard
            np.save(folder / "scores.npy", scores.astype(np.float32))
            np.save(folder / "mean_iou.npy", outcome.mean_iou.astype(np.float32))
            shown = first_per_class(labels, 1)
            np.savez_compressed(folder / "examples.npz", rows=shown, labels=outcome.labels[shown])
        else:
            shape = (len(run.test_sets), len(labels)) if run.test_sets else (len(labels),)
            predictions = outcome.predictions.astype(np.int32).reshape(shape)
            np.save(folder / "predictions.npy", predictions)
            if run.test_sets:
                np.save(folder / "confidences.npy", outcome.confidences.reshape(shape))
            scores = predictions == labels
        result = {
            "num_real": len(real_rows(self.study, run)),
            "num_synthetic": self.num_classes * run.synthetic_per_class,
            "num_updates": outcome.num_updates,
            "selected_step": outcome.selected_step,
            "validation_score": outcome.validation_score,
            "test_score": float(scores.mean()),
            "validation_curve": outcome.curve,
        }
        (folder / "result.json").write_text(json.dumps(result, indent=2))

    def head_sets(self, some: Sequence[Run]) -> list[classifier.TrainingSet]:
        """What the heads of runs learn from; those that differ in their seed alone share it."""

        @cache
        def shared(run: Run) -> classifier.TrainingSet:
            parts = self.features(run)
            counts = torch.cat([torch.full((len(part),), part.shape[1]) for part in parts])
            vectors = torch.cat([part.flatten(0, 1) for part in parts])
            return classifier.TrainingSet(vectors, self.targets(run), run.seed, counts)

        sets = [(run, shared(run.model_copy(update={"seed": 0}))) for run in some]
        return [replace(data, seed=training_seed(run)) for run, data in sets]

    def controlled(self, some: Sequence[Run]) -> list[classifier.Outcome]:
        """Classifiers under the controlled protocol, on kept features or all of them on pixels."""
        held_out = self.pixels_of if some[0].protocol == "pixels" else self.features_of
        return classifier.train_controlled(
            self.head_sets(some),
            (held_out("validation")[:, 0], self.splits["validation"].labels),
            self.test_features(some[0]),
            self.settings.controlled,
            self.num_classes,
        )

    def published(self, run: Run) -> classifier.Outcome:
        """A classifier under the thesis's protocol, on images."""
        validation = self.splits["validation"]
        return classifier.train_published(
            *self.training_set(run),
            (validation.images(), validation.labels),
            self.splits["test"].images(),
            self.settings.backbone,
            run.augmentation,
            self.settings.published,
            training_seed(run),
            self.num_classes,
            device_of(self.study.settings),
        )

    def _segmentation(self, run: Run) -> segmenter.Segmented:
        """Synthetic images share the trimap of the image that they follow: it is kept once."""
        every = [*real_rows(self.study, run), *self._source_rows(run)]
        rows, which = np.unique(every, return_inverse=True)
        trimaps = [self.splits["train"].trimap(int(row)) for row in rows]
        images, protocol = self.training_set(run)[0], run.protocol
        assert protocol != "pixels"
        return segmenter.train(
            self.maps(), images, trimaps, self.splits, protocol, training_seed(run), which.tolist()
        )
