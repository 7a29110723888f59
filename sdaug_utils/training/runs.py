"""Runs: what one training run sees and is tested on, what determines it, what came of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator, Field, field_validator

from sdaug_utils.data import augment, shifts
from sdaug_utils.data.datasets import subset
from sdaug_utils.data.images import Dataset, Images
from sdaug_utils.generation.technique import inputs_percent, technique_requests
from sdaug_utils.params import Augmentation, Parameters, Protocol, Rule, TechniqueName
from sdaug_utils.registry import techniques
from sdaug_utils.store import digest, keep_digests
from sdaug_utils.study import Study
from sdaug_utils.training import classifier, features, segmenter

CODE_VERSION = 4
RECIPE = "classifier.controlled"  # a section of the settings
LENGTH = (f"{RECIPE}.max_train_steps", f"{RECIPE}.validation_steps")
"""If both have the same value, the last weights are tested."""
Override = tuple[str, str | int | float]  # a path in the settings, and its value
Sorted = AfterValidator(lambda values: tuple(sorted(values)))
SETTING = ("task", "protocol", "arm", "real_percent", "synthetic_per_class")
"""Columns in which settings of an experiment differ; each has a run per draw and seed."""


class Run(Parameters):
    """What one training run sees: real subset, synthetic images, augmentation, seed."""

    task: Literal["classification", "segmentation"] = "classification"
    protocol: Protocol | Literal["pixels"]
    real_percent: float = Field(ge=0, le=100)
    draw: int
    seed: int
    augmentation: Augmentation = "none"
    technique: TechniqueName | None = None
    synthetic_per_class: int = 0
    controls_from_outside: bool = False  # control images of no run's subset: the thesis's leak
    rule: Rule | None = None  # by which the synthetic images are chosen ...
    chosen_from: int = 0  # ... from so many of each class
    overrides: Annotated[
        tuple[Override, ...], Sorted
    ] = ()  # settings that differ from the profile's, by path
    updates_as: Protocol | None = None  # as many updates as the same run of this protocol had
    test_sets: tuple[str, ...] = ()  # names of test sets; (): the images as they are, alone
    variant: str = ""  # what figures call its overrides

    @field_validator("test_sets")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - {"none", *shifts.SHIFTS}:
            raise ValueError(f"no test images are called {sorted(unknown)}")
        return value

    @property
    def arm(self) -> str:
        """The name under which figures and tables show it."""
        augmentation = self.augmentation if self.augmentation != "none" else ""
        outside = "outside" if self.controls_from_outside else ""
        named = list(filter(None, [self.technique, augmentation, outside, self.rule]))
        return "+".join(filter(None, [*(named or ["baseline"]), self.variant]))

    @property
    def num_made(self) -> int:
        """Synthetic images of each class that have to be made."""
        return self.chosen_from if self.rule else self.synthetic_per_class

    def changed(self, overrides: Mapping[str, Any]) -> Run:
        """The same run with further settings that differ from the profile's.

        Their keys are paths in its section ``common``, as in ``segmenter.max_train_steps``.
        """
        merged = {**dict(self.overrides), **overrides}
        return Run.model_validate({**dict(self), "overrides": tuple(merged.items())})

    @property
    def partner(self) -> Run | None:
        """The run on the same images whose number of updates this one takes, or None."""
        if self.updates_as is None:
            return None
        # It trains as the profile says: what the classifier overrides is dropped.
        kept = tuple(one for one in self.overrides if not one[0].startswith("classifier."))
        own = {"protocol": self.updates_as, "updates_as": None, "overrides": kept, "test_sets": ()}
        return self.model_copy(update={**own, "variant": self.variant if kept else ""})

    def fields(self) -> dict[str, Any]:
        """Its columns in a table of results; those of a rule or a variant only if it has one."""
        left_out = {"overrides", "updates_as", "test_sets"}
        left_out |= set() if self.rule else {"rule", "chosen_from"}
        left_out |= set() if self.variant else {"variant"}
        return self.model_dump(exclude=left_out)


def study_of(study: Study, run: Run) -> Study:
    """The study with the settings that a run overrides."""
    return study.changed(dict(run.overrides))


def features_by(study: Study) -> tuple[str, int]:
    """What an image's features depend on besides the image: the backbone and its input size."""
    return study.settings.classifier.backbone, study.settings.classifier.image_size


def pool_percent(study: Study, run: Run) -> float:
    """The real percentage that the images of a run's pools come from; 100 if any will do."""
    if not run.technique or run.controls_from_outside:
        return 100
    return inputs_percent(study, techniques()[run.technique], run.real_percent)


def label_weight(study: Study, run: Run) -> float:
    """How much of a synthetic image's label is its class; the rest is of what it follows."""
    return techniques()[run.technique].label_weight(study.settings) if run.technique else 1.0


def repeated(
    arms: Iterable[Mapping[str, Any]],
    protocol: Protocol | Literal["pixels"],
    num_draws: int,
    num_seeds: int,
) -> list[Run]:
    """A run per draw and seed of each arm; an arm that comes twice counts once."""
    grid = itertools.product(range(num_draws), list(arms), range(num_seeds))
    runs = [Run(protocol=protocol, draw=draw, seed=seed, **arm) for draw, arm, seed in grid]
    return list(dict.fromkeys(runs))


def spec(study: Study, run: Run) -> dict[str, Any]:
    """Everything that determines a run's result."""
    own = study_of(study, run)
    settings = own.settings.classifier
    trained = settings.published if run.protocol == "published" else settings.controlled
    backbone, recipe = str(settings.backbone), trained.model_dump()
    versions = [CODE_VERSION, features.CODE_VERSION, augment.CODE_VERSION]
    if run.task == "classification":
        versions.append(classifier.CODE_VERSION)
        if run.protocol == "controlled":
            versions.append(settings.image_size)  # here so as to keep earlier keys
    else:
        backbone = own.settings.segmenter.backbone
        recipe = own.settings.segmenter.model_dump(exclude={"keep_features"})
        versions.append(segmenter.CODE_VERSION)
    more: dict[str, Any] = {}
    if (weight := label_weight(own, run)) < 1:
        more["share"] = weight
    if run.rule and run.protocol != "controlled":  # the classifier that chooses is trained by it
        more["chosen by"] = [settings.controlled.model_dump(), settings.image_size]
    if run.partner:
        del recipe["max_train_steps"], recipe["validation_steps"]
        more["updates of"] = digest(spec(study, run.partner))
    if run.test_sets:
        more["test sets"] = [shifts.CODE_VERSION, *run.test_sets]
    return {
        "version": versions,
        "run": {key: value for key, value in run.fields().items() if key != "variant"},
        "data": data_digest(study.data, run.task == "segmentation"),
        "rows": real_rows(study, run).tolist(),
        "backbone": features.BACKBONES[backbone],
        "settings": recipe,
        "pools": pool_keys(study, run),
        **more,
    }


def pool_keys(study: Study, run: Run) -> list[str]:
    """Keys of the pools that a run's synthetic images come from."""
    if not run.technique:
        return []
    own = study_of(study, run)
    return _pool_keys(own, run.technique, run.draw, pool_percent(own, run))


@lru_cache(maxsize=1024)
def _pool_keys(study: Study, technique: TechniqueName, draw: int, percent: float) -> list[str]:
    requests = technique_requests(study, technique, draw, 1, percent)
    return [digest(request.spec) for request in requests]


def real_rows(study: Study, run: Run) -> np.ndarray:
    """Rows of the train split that a run trains on."""
    return _subset(study.data, run.real_percent, run.draw)


@lru_cache(maxsize=256)
def _subset(data: Dataset, percent: float, draw: int) -> np.ndarray:
    return subset(data.splits["train"].labels, percent, draw) if percent else np.array([], int)


def training_seed(run: Run) -> int:
    """The seed of a run's training: equal for all arms of a draw and seed."""
    return 1000 * run.draw + run.seed


def folder_of(study: Study, run: Run) -> Path:
    """The run's folder in the store, made or not."""
    return study.store.folder("runs", spec(study, run))


def is_made(study: Study, run: Run) -> bool:
    """Whether the store has the run's result."""
    return study.store.is_whole(folder_of(study, run), to_read=True)


def read_result(study: Study, run: Run) -> dict[str, Any]:
    return json.loads((folder_of(study, run) / "result.json").read_text())


def examples(study: Study, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """What a trained segmenter predicts for one test image per class.

    (n,) rows of the test split and (n, height, width) predicted trimaps, labels 1 to 3.
    """
    kept = np.load(folder_of(study, run) / "examples.npz")
    return kept["rows"], kept["labels"]


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


def images_tested_on(study: Study, name: str) -> Images:
    """The test set of a name: the test images, shifted or, if ``none``, as they are."""
    test = study.data.splits["test"]
    return test.images() if name == "none" else shifts.shifted(test, name)


def chosen(results: pd.DataFrame, **setting: Any) -> pd.DataFrame:
    """The rows with given values: ``chosen(results, arm="baseline", real_percent=5)``."""
    for column, value in setting.items():
        results = results[results[column] == value]
    return results


def scores(results: pd.DataFrame, **setting: Any) -> np.ndarray:
    """The test images' scores in a setting, given as for :func:`chosen`: (draws, seeds, images).

    Raises KeyError if there is no such run, and ValueError if they are of more than one setting or
    not one per draw and seed.
    """
    rows = chosen(results, **setting)
    if rows.empty:
        raise KeyError(f"no run of {setting}")
    ordered = rows.sort_values(["draw", "seed"])
    keys = ordered[["draw", "seed"]]
    num_draws, num_seeds = keys.nunique()
    mixed = any(len(set(ordered[column])) > 1 for column in SETTING if column in ordered)
    if mixed or len(keys) != num_draws * num_seeds or keys.duplicated().any():
        raise ValueError(f"runs of {setting} are not of one setting, one per draw and seed")
    return np.stack(ordered["scores"].to_list()).reshape(num_draws, num_seeds, -1)
