"""The experiments' grids: which cells a notebook trains.

Numbers of synthetic images are per class. Where the thesis gives them in per cent of the real
images, ``counts_of`` converts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from sdaug_utils import params
from sdaug_utils.data.datasets import subset, subset_size
from sdaug_utils.errors import InputError
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training import cells as training
from sdaug_utils.training.cells import Cell, repeated
from sdaug_utils.training.mixing import ALPHAS

FEWEST_INPUTS = 3
Arm = dict[str, Any]
Counts = list[tuple[float, list[int]]]  # (real %, numbers of synthetic images per class)


def baselines(real_percents: Iterable[float], names: Iterable[str] = ("none",)) -> list[Arm]:
    """Real images only, with each of some augmentations."""
    return [
        {"augmentation": name, "real_percent": percent}
        for name in names
        for percent in real_percents
    ]


def synthetic(techniques: Iterable[str], counts: Counts) -> list[Arm]:
    """Each technique with each number of synthetic images."""
    return [
        {"technique": technique, "real_percent": percent, "synthetic_per_class": count}
        for technique in techniques
        for percent, numbers in counts
        for count in numbers
    ]


def counts_of(study: Study, synthetic_percents: dict[float, list[int]]) -> Counts:
    """(Real %, numbers per class) from per cent of the real images; at least one image."""
    real_images = len(study.data.splits["train"]) / len(study.data.class_names)
    return [
        (real, [max(1, round(real_images * real / 100 * percent / 100)) for percent in percents])
        for real, percents in synthetic_percents.items()
    ]


def cells(study: Study, p: params.Runs) -> list[Cell]:
    """All cells of an experiment's main table: its settings, each for every draw and seed."""
    match p:
        case params.AtPercentages():  # experiments 03 and 11
            counts = [(percent, [p.synthetic_per_class]) for percent in p.real_percents]
            arms = baselines(p.real_percents, p.augmentations) + synthetic(p.techniques, counts)
        case params.GenerationPercentage():  # and experiment 09
            counts = list(p.synthetic_per_class.items())
            arms = baselines(p.synthetic_per_class) + synthetic(p.techniques, counts)
            for technique, numbers in p.further_numbers.items():
                arms += synthetic([technique], [(real, numbers) for real, _ in counts])
        case params.AllGenerated():
            counts = [(0.0, p.synthetic_per_class)]
            arms = baselines(p.reference_percents) + synthetic(p.techniques, counts)
            for technique, numbers in p.further_numbers.items():
                arms += synthetic([technique], [(0.0, numbers)])
        case params.WithControlNet():
            counts = counts_of(study, p.synthetic_percents)
            at_rivals = [pair for pair in counts if pair[0] == p.rivals_at_percent]
            subset_images = len(study.data.splits["train"]) / len(study.data.class_names)
            subset_images *= p.outside_at_percent / 100  # with no more, all controls are inside
            outside = [
                (percent, [count for count in numbers if count > subset_images])
                for percent, numbers in counts
                if percent == p.outside_at_percent
            ]
            arms = baselines(p.synthetic_percents)
            arms += synthetic(["controlnet-canny", *p.beside], counts)
            arms += synthetic(p.rivals, at_rivals)
            for arm in synthetic(["controlnet-canny"], outside):
                arms.append({**arm, "controls_from_outside": True})
        case params.Combinations():
            arms = []
            for technique, real, percent in p.rows:
                [row] = synthetic([technique], counts_of(study, {real: [percent]}))
                arms += [{**row, "augmentation": name} for name in ("none", p.augmentation)]
        case params.Segmentation():
            counts = counts_of(study, p.synthetic_percents)
            rows = baselines(p.synthetic_percents) + synthetic(["controlnet-segmentation"], counts)
            arms = [{**row, "task": "segmentation"} for row in rows]
        case params.Selection():
            arms = baselines(p.real_percents)
            chosen = {"chosen_from": p.chosen_from}
            counts = [(percent, [p.kept_per_class]) for percent in p.real_percents]
            rows = synthetic(p.techniques, counts)
            rows += synthetic(p.techniques[:1], [(min(p.real_percents), p.further_kept)])
            arms += [{**row, **chosen, "rule": rule} for row in rows for rule in p.rules]
        case _:
            raise TypeError(f"{type(p).__name__} trains nothing")
    return repeated(arms, p.protocol, p.num_draws, p.num_seeds)


def protocol_cells(p: params.TrainingPercentage, protocol: params.Protocol) -> list[Cell]:
    """Experiment 03's runs on ways of training: baseline and plain prompts at one real %."""
    counts = [(p.protocols_at_percent, [p.synthetic_per_class])]
    both = baselines([p.protocols_at_percent]) + synthetic(["stable-diffusion-prompt"], counts)
    draws = p.protocols_num_draws if protocol == "published" else p.num_draws
    return repeated(both, protocol, draws, 1)


def pixel_cells(p: params.TrainingPercentage) -> list[Cell]:
    """Experiment 03's baseline and techniques again, for a classifier on pixels."""
    counts = [(percent, [p.synthetic_per_class]) for percent in p.pixels_at_percents]
    arms = baselines(p.pixels_at_percents) + synthetic(p.techniques, counts)
    return repeated(arms, "pixels", p.num_draws, 1)


@dataclass(frozen=True)
class Beside:
    """Runs beside an experiment's main table."""

    cells: list[Cell]
    numbers: list[int]  # of views or updates, to each of which these runs come
    times: float  # what they cost, in runs of the main table
    run: Callable[[], pd.DataFrame]  # makes what the store has not got


def beside(study: Study, p: params.Experiment) -> dict[str, Beside]:
    """What an experiment measures beside its main table, by the name that its runs are kept under.

    ``03-convergence``: accuracy after some updates of a run of each arm, with the most and with the
    least real images. ``03-views``: other numbers of views, there. ``03-protocols``: the published
    protocol, and of each run a frozen twin. ``03-updates``: accuracy after some updates at both
    protocols' rates. ``08-updates``: other numbers of updates, for the setting with most images and
    its baseline. ``11-shifts``: test images that differ from those trained on.
    """
    if isinstance(p, params.TrainingPercentage):
        ends, main = (max(p.real_percents), min(p.real_percents)), cells(study, p)
        at_ends = [cell for cell in main if cell.real_percent in ends]
        first = [cell for cell in at_ends if cell.draw == cell.seed == 0]
        augmented = [cell for cell in at_ends if cell.augmentation != "none"]
        published, frozen = (protocol_cells(p, name) for name in ("published", "controlled"))
        settings = study.settings.classifier
        last, steps = settings.controlled.max_train_steps, p.curve_steps
        to_last = [step for step in steps if step < last] + [last]
        own, theirs = settings.controlled.learning_rate, settings.published.learning_rate
        curves = partial(training.accuracy_curves, study)
        most = sorted({*steps, *budgets(study, p)})

        def at_both_rates() -> pd.DataFrame:
            return pd.concat(curves(frozen, rate, most) for rate in (theirs, own))

        views = partial(training.with_views, study, augmented, p.view_numbers)
        twins, few = partial(training.with_twins, study, published), len(p.view_numbers)
        return {
            "03-convergence": Beside(first, to_last, 1, partial(curves, first, own, to_last)),
            "03-views": Beside(augmented, p.view_numbers, few, views),
            "03-protocols": Beside(published, [], 0.1, twins),  # the frozen ones alone
            "03-updates": Beside(frozen, most, 2, at_both_rates),
        }
    if isinstance(p, params.Segmentation):
        grid = cells(study, p)
        largest = max(grid, key=lambda cell: cell.real_percent + cell.synthetic_per_class)
        pair = [
            cell
            for cell in grid
            if cell.draw == 0
            and cell.real_percent == largest.real_percent
            and cell.synthetic_per_class in (0, largest.synthetic_per_class)
        ]
        times = sum(p.update_numbers) / study.settings.segmenter.max_train_steps
        run = partial(training.with_updates, study, pair, p.update_numbers)
        return {"08-updates": Beside(pair, p.update_numbers, times, run)}
    if isinstance(p, params.Rivals):
        arms = baselines(p.shifted_percents, p.shifted_augmentations)
        at_shifts = [
            cell
            for cell in cells(study, p) + repeated(arms, p.protocol, p.num_draws, 1)
            if cell.real_percent in p.shifted_percents and cell.seed == 0
        ]
        run = partial(training.with_shifts, study, at_shifts)
        return {"11-shifts": Beside(at_shifts, [], 1, run)}
    return {}


def budgets(study: Study, p: params.TrainingPercentage) -> tuple[int, int]:
    """Updates in all the epochs of the published protocol, for the baseline and plain prompts."""
    num_real = len(subset(study.data.splits["train"].labels, p.protocols_at_percent))
    num_synthetic = p.synthetic_per_class * len(study.data.class_names)
    published = study.settings.classifier.published
    return published.max_updates(num_real), published.max_updates(num_real + num_synthetic)


def every_cell(study: Study, p: params.Runs) -> list[Cell]:
    """All cells of an experiment, experiment 03's other ways of training included."""
    every = cells(study, p)
    if isinstance(p, params.TrainingPercentage):
        every += protocol_cells(p, "published") + pixel_cells(p)
    return every


def fitted(study: Study, p: params.Experiment) -> dict[str, Any]:
    """What of an experiment's parameters must change for the data to allow it, and to what.

    Real percentages that leave too few images of a class are left out, and techniques that have
    none of it; there are no more subjects than classes, and no more images of a subject than half
    the smallest class.
    """
    labels = study.data.splits["train"].labels
    smallest, values = int(np.bincount(labels).min()), dict(p)
    names = set()
    if isinstance(p, params.Runs):
        names = {cell.technique for cell in every_cell(study, p) if cell.technique}

    def fits(percent: float) -> bool:
        try:
            check_percents(study, [percent], names)
        except InputError:
            return False
        return True

    def fitting(value: Any) -> Any:
        if isinstance(value, dict):
            return {percent: rest for percent, rest in value.items() if fits(percent)} or {
                100.0: next(iter(value.values()))
            }
        return [percent for percent in value if fits(percent)] or [100.0]

    new: dict[str, Any] = {}
    if isinstance(p, params.Rivals):
        numbers = numbers_made(every_cell(study, p))
        new["techniques"] = [name for name in p.techniques if can_have(study, name, numbers[name])]
        among = fitting(p.real_percents)
        new["shifted_percents"] = [q for q in p.shifted_percents if q in among] or among[-1:]
    if isinstance(p, params.Subjects):
        new["num_subjects"] = min(p.num_subjects, len(study.data.class_names))
    if isinstance(p, params.DifferentSubjects):
        known = set(study.data.class_names)
        new["kinds"] = [[name for name in kind if name in known] or kind for kind in p.kinds]
    if isinstance(p, params.NumberOfImages):
        most = smallest // 2
        new["numbers_of_images"] = [n for n in p.numbers_of_images if n <= most] or [most]
    for key in ("real_percents", "pixels_at_percents", "reference_percents", "synthetic_percents"):
        if key in values:
            new[key] = fitting(values[key])
    if isinstance(p, params.GenerationPercentage):
        new["synthetic_per_class"] = fitting(p.synthetic_per_class)
    if isinstance(p, params.Combinations):
        kept = [row for row in p.rows if fits(row[1])] or [(p.rows[0][0], 100.0, p.rows[0][2])]
        if kept != p.rows:
            new["rows"] = [list(row) for row in kept]  # as a notebook writes them
    for key in ("protocols_at_percent", "rivals_at_percent", "outside_at_percent"):
        among = new.get("real_percents") or new.get("synthetic_percents")
        if key in values and among:
            own = values[key]
            new[key] = own if own in among else min(among)
    return {key: value for key, value in new.items() if value != values[key]}


def can_have(study: Study, name: str, count: int) -> bool:
    """Whether there can be so many images of each class by a technique."""
    technique = techniques()[name]
    try:
        technique.require(study, count)
    except InputError:
        return False
    return not technique.lacking(study.settings)


def check(study: Study, p: params.Experiment) -> None:
    """Check an experiment's parameters against the data; no work starts.

    Raises:
        InputError: a real subset would lack images, or of the wrong kind or number.
    """
    if isinstance(p, params.Subjects) and p.num_subjects > len(study.data.class_names):
        raise InputError(
            f"num_subjects: {p.num_subjects}, but there are {len(study.data.class_names)} "
            "classes, and each subject is of another: choose at most that many"
        )
    if isinstance(p, params.NumberOfImages):
        smallest = int(np.bincount(study.data.splits["train"].labels).min())
        if max(p.numbers_of_images) > smallest // 2:
            raise InputError(
                f"numbers_of_images: {max(p.numbers_of_images)}, but the smallest class has "
                f"{smallest} training images, of which half are held back: choose at most "
                f"{smallest // 2}"
            )
    if isinstance(p, params.DifferentSubjects):
        classes = set(study.data.class_names)
        for kind in map(set, p.kinds):  # of other data, if not one of its classes is known
            if kind & classes and kind - classes:
                raise InputError(f"kinds: '{min(kind - classes)}' is not a class of the data")
    if isinstance(p, params.WithControlNet):
        for key in ("rivals_at_percent", "outside_at_percent"):
            _require_among(key, getattr(p, key), p.synthetic_percents)
    if isinstance(p, params.Rivals):
        for percent in p.shifted_percents:
            _require_among("shifted_percents", percent, p.real_percents)
    if isinstance(p, params.Runs):
        every = every_cell(study, p)
        percents = [cell.real_percent for cell in every if cell.real_percent]
        check_percents(study, percents, {cell.technique for cell in every if cell.technique})
        require_whole_labels(study, every)
        for name, most in numbers_made(every).items():
            techniques()[name].require(study, most)


def _require_among(key: str, percent: float, percents: Iterable[float]) -> None:
    if percent not in percents:
        known = ", ".join(f"{one:g}" for one in percents)
        raise InputError(f"{key}: {percent:g} is not among {known}")


def require_techniques(study: Study, p: params.Experiment) -> None:
    """Check that all is set, and goes with the models, which an experiment's techniques need.

    Raises:
        InputError: something is only planned with, or does not go with the foundation model.
    """
    names: Iterable[str] = p.techniques if isinstance(p, params.Subjects) else ()
    if isinstance(p, params.Runs):
        names = numbers_made(every_cell(study, p))
    for name in names:
        if lacking := techniques()[name].lacking(study.settings):
            raise InputError(f"{lacking}, or do without '{name}'")
        techniques()[name].check(study.settings)


def numbers_made(every: list[Cell]) -> dict[str, int]:
    """The most images of a class that cells need of each technique."""
    most: dict[str, int] = {}
    for cell in every:
        if cell.technique:
            most[cell.technique] = max(cell.num_made, most.get(cell.technique, 0))
    return most


def require_whole_labels(study: Study, every: list[Cell]) -> None:
    """Check that labels are mixed only where a classifier learns by the controlled protocol.

    Raises:
        InputError: they are mixed elsewhere.
    """
    for cell in every:
        is_mixed = training.share(study, cell) < 1 or cell.augmentation in ALPHAS
        if is_mixed and (cell.task, cell.protocol) != ("classification", "controlled"):
            raise InputError(
                f"{cell.arm}: its labels are mixed, which is for classifiers of the controlled "
                "protocol alone"
            )


def check_percents(study: Study, percents: list[float], names: set[str]) -> None:
    """Check that every real subset has an image of each class and all that models learn from.

    A personalised model learns from fewer images of a class whose subset is smaller, but from three
    at least, if it is not asked to learn from fewer, and if there are as many (thesis: three to
    five).

    Raises:
        InputError: a class would be empty, or a personalised model would learn from too few images.
    """
    labels, fewest = study.data.splits["train"].labels, min(percents)
    subset(labels, fewest)  # refuses to leave a class empty
    whole = int(np.bincount(labels).min())
    smallest = subset_size(whole, fewest)
    for name in names:
        technique = techniques()[name]
        if technique.learns:
            key, wanted = technique.num_inputs(study.settings)
            wanted = min(wanted, whole)
            if smallest < min(wanted, FEWEST_INPUTS):
                raise InputError(
                    f"{key}: {wanted}, but the smallest real subset ({fewest:g} %) has "
                    f"{smallest} of a class: choose at most that many"
                )
