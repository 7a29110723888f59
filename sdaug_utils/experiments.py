"""The experiments' grids: which cells a notebook trains.

Numbers of synthetic images are per class. Where the thesis gives them in per cent of the real
images, ``per_class`` converts.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from sdaug_utils import params
from sdaug_utils.data.datasets import subset, subset_size
from sdaug_utils.errors import InputError
from sdaug_utils.params import Augmentation, Protocol, Technique
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training.cells import Cell, repeated

FEWEST_INPUTS = 3
Arm = dict[str, Any]


def per_class(study: Study, real_percent: float, synthetic_percent: float) -> int:
    """Synthetic images per class that are ``synthetic_percent`` % of the real ones."""
    real_images = len(study.data.splits["train"]) / len(study.data.class_names)
    return max(1, round(real_images * real_percent / 100 * synthetic_percent / 100))


def baselines(
    real_percents: Iterable[float], names: Iterable[Augmentation] = ("none",)
) -> list[Arm]:
    """Real images only, with each of some augmentations."""
    return [
        {"augmentation": name, "real_percent": percent}
        for name in names
        for percent in real_percents
    ]


def synthetic(
    techniques: Iterable[Technique], counts: Iterable[tuple[float, Iterable[int]]]
) -> list[Arm]:
    """Each technique with each number of synthetic images, given as (real %, numbers)."""
    return [
        {"technique": technique, "real_percent": percent, "synthetic_per_class": count}
        for technique in techniques
        for percent, numbers in counts
        for count in numbers
    ]


def counts_of(
    study: Study, synthetic_percents: dict[float, list[int]]
) -> list[tuple[float, list[int]]]:
    """(Real %, numbers per class) from per cent of the real images."""
    return [
        (real, [per_class(study, real, percent) for percent in percents])
        for real, percents in synthetic_percents.items()
    ]


def cells(study: Study, p: params.Runs) -> list[Cell]:
    """All cells of an experiment's main table, given its parameters."""
    return repeated(arms(study, p), p.protocol, p.num_draws, p.num_seeds)


def arms(study: Study, p: params.Runs) -> list[Arm]:
    """The settings of an experiment: each is run for every draw and seed."""
    match p:
        case params.TrainingPercentage():
            counts = [(percent, [p.synthetic_per_class]) for percent in p.real_percents]
            real = baselines(p.real_percents, p.augmentations)
            return real + synthetic(p.techniques, counts)
        case params.GenerationPercentage():  # and experiment 09
            counts = list(p.synthetic_per_class.items())
            return baselines(p.synthetic_per_class) + synthetic(p.techniques, counts)
        case params.AllGenerated():
            counts = [(0.0, p.synthetic_per_class)]
            return baselines(p.reference_percents) + synthetic(p.techniques, counts)
        case params.WithControlNet():
            counts = counts_of(study, p.synthetic_percents)
            at_rivals = [pair for pair in counts if pair[0] == p.rivals_at_percent]
            outside = [pair for pair in counts if pair[0] == p.outside_at_percent]
            return [
                *baselines(p.synthetic_percents),
                *synthetic(["controlnet-canny", *p.beside], counts),
                *synthetic(p.rivals, at_rivals),
                *(
                    {**arm, "controls_from_outside": True}
                    for arm in synthetic(["controlnet-canny"], outside)
                ),
            ]
        case params.Combinations():
            rows = [
                {
                    "technique": technique,
                    "real_percent": real,
                    "synthetic_per_class": per_class(study, real, percent),
                }
                for technique, real, percent in p.rows
            ]
            return [
                {**row, "augmentation": name} for row in rows for name in ("none", p.augmentation)
            ]
        case params.Segmentation():
            counts = counts_of(study, p.synthetic_percents)
            rows = baselines(p.synthetic_percents) + synthetic(["controlnet-segmentation"], counts)
            return [{**row, "task": "segmentation"} for row in rows]
    raise TypeError(f"{type(p).__name__} trains nothing")


def protocol_cells(p: params.TrainingPercentage, protocol: Protocol) -> list[Cell]:
    """Experiment 03's comparison of protocols: baseline and plain prompts at one real %."""
    percent = p.protocols_at_percent
    both = baselines([percent]) + synthetic(
        ["stable-diffusion-prompt"], [(percent, [p.synthetic_per_class])]
    )
    return repeated(both, protocol, p.num_draws, p.protocols_num_seeds)


def check(study: Study, p: params.Experiment) -> None:
    """Check an experiment's parameters against the data; no work starts.

    Raises:
        InputError: a real subset would lack images, or of the wrong kind or number.
    """
    if isinstance(p, params.Subjects):
        if p.num_subjects > len(study.data.class_names):
            raise InputError(
                f"num_subjects: {p.num_subjects}, but there are {len(study.data.class_names)} "
                "classes, and each subject is of another: choose at most that many"
            )
        if isinstance(p, params.NumberOfImages):
            smallest = int(np.bincount(study.data.splits["train"].labels).min())
            if max(p.numbers_of_images) > smallest:
                raise InputError(
                    f"numbers_of_images: {max(p.numbers_of_images)}, but the smallest class has "
                    f"{smallest} training images: choose at most that many"
                )
        return
    assert isinstance(p, params.Runs)
    if isinstance(p, params.WithControlNet):
        for key in ("rivals_at_percent", "outside_at_percent"):
            if getattr(p, key) not in p.synthetic_percents:
                known = ", ".join(f"{percent:g}" for percent in p.synthetic_percents)
                raise InputError(f"{key}: {getattr(p, key):g} is not among {known}")
    every = arms(study, p)
    percents = {arm["real_percent"] for arm in every} - {0.0}
    if isinstance(p, params.TrainingPercentage):
        percents.add(p.protocols_at_percent)
    check_percents(study, sorted(percents), {arm.get("technique") for arm in every} - {None})


def check_percents(study: Study, percents: list[float], names: set[str | None]) -> None:
    """Check that every real subset has an image of each class and all that models learn from.

    A personalised model learns from fewer images of a class whose subset is smaller, but from three
    at least, if it is not asked to learn from fewer (thesis: three to five).

    Raises:
        InputError: a class would be empty, or a personalised model would learn from too few images.
    """
    labels = study.data.splits["train"].labels
    subset(labels, min(percents))  # refuses to leave a class empty
    smallest = subset_size(int(np.bincount(labels).min()), min(percents))
    for name in names:
        technique = techniques()[str(name)]
        if technique.inputs != "first":
            continue
        key, wanted = technique.num_inputs(study.settings)
        if smallest < min(wanted, FEWEST_INPUTS):
            raise InputError(
                f"{key}: {wanted}, but the smallest real subset ({min(percents):g} %) has "
                f"{smallest} of a class: choose at most that many"
            )
