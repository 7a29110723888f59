"""Subjects: a few real images each, models personalised on them, and how faithful the results are.

What the thesis judged by eye is measured here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sdaug_utils.data.images import Images, shuffled
from sdaug_utils.evidence.metrics import diversity, estimate, obeys, similarity, typical_attributes
from sdaug_utils.generation.pool_files import Pool
from sdaug_utils.generation.pools import fill
from sdaug_utils.generation.technique import Request, request
from sdaug_utils.lazy import torch
from sdaug_utils.params import Attribute
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training.classifier import TrainingSet, train_reference_head
from sdaug_utils.training.features import feature_arrays, image_features

HYPERNYM = "hypernym"  # the arm whose prompts say the bare name of all ("animal")
MEASURES = ["fidelity", "prompt_fidelity", "in_context", "diversity", "nearest_input"]
MEASURES += ["in_class", "in_kind", "among_inputs"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A few real images that a model is personalised on, and what they are images of."""

    name: str
    labels: tuple[int, ...]  # the classes among the inputs
    rows: tuple[int, ...]  # of the train split
    held_back: tuple[int, ...] = ()  # images of the subject that no model sees, to judge by

    @property
    def judged_by(self) -> list[int]:
        """The rows that fidelity is measured against: the inputs, if none are held back."""
        return list(self.held_back or self.rows)


def nearest_subjects(study: Study, num_subjects: int, num_images: int) -> list[Subject]:
    """Images that are near each other within a class, for each of the first classes.

    An image, the first of the thesis's shuffle, and its nearest neighbours by the cosine of centred
    features: twice as many as asked for, in random order. The first half are inputs, the second
    half are held back.
    """
    train = study.data.splits["train"]
    features = centred_features(study)
    subjects, orders = [], shuffled(train.labels)
    for label, name in enumerate(study.data.class_names[:num_subjects]):
        rows = orders[label]
        cosines = similarity(features[rows[:1]], features[rows])[0]
        nearest = rows[np.argsort(-cosines, kind="stable")[: 2 * num_images]]
        mixed = np.random.default_rng(label).permutation(nearest).tolist()
        inputs, held_back = mixed[:num_images], mixed[num_images:]
        subjects.append(Subject(name, (label,), tuple(inputs), tuple(held_back)))
    return subjects


def input_sets(study: Study, num_subjects: int) -> list[list[Subject]]:
    """For each of the first classes four sets of inputs that grow less alike (thesis, 4.3.2).

    Three images of the class; with two of the class nearest to it; with two of a farther class (the
    one in the middle of the order); one image each of the class, the two others, and the two
    farthest. Nearness is that of the classes' mean features.
    """
    features = centred_features(study)
    of_class = shuffled(study.data.splits["train"].labels)
    means = np.stack([features[rows].mean(axis=0) for rows in of_class])
    cosines = similarity(means, means)
    subjects = []
    for label, name in enumerate(study.data.class_names[:num_subjects]):
        others = [k for k in np.argsort(-cosines[label], kind="stable").tolist() if k != label]
        near, middle = others[0], others[len(others) // 2]
        far = [k for k in reversed(others) if k not in (near, middle)][:2]
        one, two = [(label, 3)], [(near, 2)]
        three = [(middle, 2)] if middle != near else []  # there are only two classes
        mixed = [(k, 1) for k in dict.fromkeys((label, near, middle, *far))]
        sets = [one, one + two, one + two + three, mixed]
        subjects.append([_subject(f"{name}, set {i}", s, of_class) for i, s in enumerate(sets, 1)])
    return subjects


def _subject(name: str, parts: Sequence[tuple[int, int]], of_class: list[np.ndarray]) -> Subject:
    """A subject of the first images of some classes: ``parts`` are labels and numbers of images."""
    rows = [int(row) for label, count in parts for row in of_class[label][:count]]
    return Subject(name, tuple(label for label, _ in parts), tuple(rows))


def with_first(subjects: Sequence[Subject], number: int) -> list[Subject]:
    """The same subjects with their first images only: nested sets of inputs."""
    return [replace(subject, rows=subject.rows[:number]) for subject in subjects]


def stand_ins(study: Study, num_subjects: int, sizes: Sequence[int]) -> list[Subject]:
    """Enough to plan with: for each of the first classes a subject of each size, of any images."""
    rows = np.flatnonzero(study.data.splits["train"].labels < num_subjects).tolist()
    return [
        Subject(f"subject {i}", (label,), tuple(rows[i : i + size]))
        for i, (label, size) in enumerate(itertools.product(range(num_subjects), sizes))
    ]


def pools_of(study: Study, requests: Sequence[Request], num_prompts: int) -> list[list[Pool]]:
    """The images asked for: a list of pools for each subject, one for each prompt."""
    pools = fill(study, requests)
    return [pools[i : i + num_prompts] for i in range(0, len(pools), num_prompts)]


def subject_requests(
    study: Study,
    technique: str,
    subjects: Sequence[Subject],
    prompts: Iterable[str],
    images_per_prompt: int,
) -> list[Request]:
    """A pool for each subject and prompt, subject by subject."""
    train, indices = study.data.splits["train"], range(images_per_prompt)
    known = techniques()[technique]
    return [
        request(study, known, subject.name, prompt, indices, inputs=train.images(subject.rows))
        for subject, prompt in itertools.product(subjects, prompts)
    ]


class Judge:
    """Measures images against the real ones of their subject, by features and by a classifier."""

    def __init__(self, study: Study, kinds: Sequence[Sequence[str]] = ()) -> None:
        """``kinds`` are classes of one kind each; a class of none is a kind of its own."""
        self.study, self.train = study, study.data.splits["train"]
        of_kind = {name: number for number, names in enumerate(kinds) for name in names}
        names = study.data.class_names
        self.kind_of_class = np.array([of_kind.get(name, name) for name in names], object)
        features = image_features(study, self.train.images())
        self.mean = features[:, 0].mean(dim=0).numpy()
        self.real = features[:, 0].numpy() - self.mean  # (n, d), of the training images
        data = TrainingSet(features, torch.from_numpy(self.train.labels), seed=0)
        settings = study.settings.classifier.controlled
        self.head = train_reference_head(data, settings, len(names))

    def __call__(
        self, pools: Sequence[Pool], prompts: Mapping[str, Attribute | None], subject: Subject
    ) -> dict[str, float]:
        """What the images of one subject score, averaged over prompts, each with what it asks for.

        ``fidelity``: mean cosine between features of images and of the subject's held-back images
        (of its inputs, if none are held back). ``prompt_fidelity``: the share that obeys the
        prompt's attribute, chance 0.5. ``in_context``: both at once, fidelity where the attribute
        is obeyed and 0 where it is not, over the prompts that ask for one. ``nearest_input``:
        the cosine to the nearest input, high for copies. ``diversity``: one minus the mean cosine
        among images of one prompt. ``in_class``: the share that a classifier of real images puts in
        a class of the inputs, minus chance; ``in_kind``: the share in a class of their kinds.
        ``among_inputs``: the mean cosine among the real images that fidelity is measured against.
        """
        inputs, real = self.real[list(subject.rows)], self.real[subject.judged_by]
        of_classes = np.flatnonzero(np.isin(self.train.labels, subject.labels))
        typical = typical_attributes(self.train.images(of_classes))
        fidelity, nearest, diverse = [], [], []
        obeyed: list[bool] = []
        in_context: list[float] = []
        images = [image for pool in pools for image in pool.images().items]
        every = image_features(self.study, Images(tuple(images)))[:, 0]
        of_pools = every.split([len(pool.files) for pool in pools])
        for pool, made, attribute in zip(pools, of_pools, prompts.values(), strict=True):
            centred = made.numpy() - self.mean
            faithful = similarity(centred, real).mean(axis=1)
            fidelity.append(faithful.mean())
            nearest.append(similarity(centred, inputs).max(axis=1).mean())
            diverse.append(diversity(centred))
            if attribute:
                does = [obeys(image, attribute, typical) for image in pool.images()]
                obeyed += does
                in_context += (faithful * does).tolist()
        found = self.head(every).argmax(dim=1).numpy()
        wanted = self.kind_of_class[list(subject.labels)]
        return {
            "fidelity": float(np.mean(fidelity)),
            "prompt_fidelity": float(np.mean(obeyed)) if obeyed else np.nan,
            "in_context": float(np.mean(in_context)) if obeyed else np.nan,
            "diversity": float(np.mean(diverse)),
            "nearest_input": float(np.mean(nearest)),
            "in_class": float(np.isin(found, subject.labels).mean())
            - len(subject.labels) / len(self.kind_of_class),
            "in_kind": float(np.mean([kind in wanted for kind in self.kind_of_class[found]])),
            "among_inputs": self.among(subject),
        }

    def among(self, subject: Subject) -> float:
        """The mean cosine among the real images that fidelity to a subject is measured against.

        Not a number if there is but one.
        """
        real = self.real[subject.judged_by]
        return 1 - diversity(real) if len(real) > 1 else np.nan


def as_results(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows with a column per measure to results with one ``score`` each, as claims read them.

    Each row needs ``arm`` and ``draw``, the number of its subject: pairs are of one subject.
    """
    table = pd.DataFrame(rows)
    others = [column for column in table if column not in MEASURES]
    long = table.melt(others, MEASURES, "measure", "score").dropna(subset="score")
    arrays = pd.Series([np.array([value]) for value in long["score"]], index=long.index)
    return long.assign(seed=0, scores=arrays)


def summary(results: pd.DataFrame, over: str) -> pd.DataFrame:
    """Mean and 95 % interval over subjects of each measure, by arm and the column ``over``."""
    rows, keys = [], ["arm", over, "measure"]
    for names, group in results.groupby(keys, sort=False):
        mean = estimate(np.stack(group.sort_values("draw")["scores"].to_list())[:, None])
        ends = {"low": mean.low, "high": mean.high, "num_subjects": mean.num_draws}
        rows.append({**dict(zip(keys, names, strict=True)), "mean": mean.mean, **ends})
    return pd.DataFrame(rows)


def centred_features(study: Study) -> np.ndarray:
    """Features of the training images minus their mean, (n, d).

    Without the mean every cosine would be near 1: all images share most of their features.
    """
    features = feature_arrays(study, study.data.splits["train"].images())[:, 0]
    return features - features.mean(axis=0)
