"""What an experiment is: the parameters of one notebook, and the images and runs that it needs.

An experiment is a subclass in a file of this folder. The plan, the runner, the figures, the report
and the site ask the registry for it; none of them names an experiment.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import AfterValidator, Field, field_validator

from sdaug_utils import params
from sdaug_utils.data.datasets import subset, subset_size
from sdaug_utils.errors import InputError
from sdaug_utils.evidence.subjects import Subject, subject_requests
from sdaug_utils.generation.technique import Request
from sdaug_utils.registry import EXPERIMENTS, techniques
from sdaug_utils.study import Study
from sdaug_utils.training.features import have_features
from sdaug_utils.training.mixing import ALPHAS
from sdaug_utils.training.runs import Run, label_weight, repeated, study_of

FEWEST_INPUTS = 3
Arm = dict[str, Any]  # with its numbers of images: fields of a run, but for draw and seed
Numbers = Annotated[list[params.Count], Field(min_length=1)]
Counts = list[tuple[float, list[int]]]  # (real %, numbers of synthetic images per class)


def personalises(technique: Any) -> bool:
    """Whether it learns from the first few images of a subject."""
    return technique.learns and technique.inputs == "first"


class Experiment(params.Parameters):
    """The values that a notebook's ``parameters`` cell sets, and what follows from them."""

    notebook: ClassVar[str]  # the name of its file, without suffix; it begins with a number
    domain: ClassVar[params.Domain] = "main"  # which of a profile's two data sets it is about
    repeats: ClassVar[str] = "draws"  # what is repeated, and what intervals are taken over
    in_thesis: ClassVar[bool] = True  # others run only if they are asked for
    needs_trimaps: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False  # of the real images, before it can be planned

    profile: str

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "notebook" in vars(cls):
            EXPERIMENTS[cls.notebook] = cls

    def requests(self, study: Study) -> list[Request]:
        """The images that it needs beside those that its runs train on."""
        return []

    def runs(self, study: Study) -> list[Run]:
        """All its training runs."""
        return []

    def technique_names(self, study: Study) -> list[tuple[Study, str]]:
        """The techniques that it needs, each with the study whose settings it is used with."""
        return []

    def values_allowed(self, study: Study) -> dict[str, Any]:
        """Parameters that the data may not allow, each with the nearest value that they allow."""
        return {}

    def fitted(self, study: Study) -> dict[str, Any]:
        """The parameters that must change for the data to allow them, and their new values."""
        new, old = self.values_allowed(study), dict(self)
        return {key: value for key, value in new.items() if value != old[key]}

    def check(self, study: Study) -> None:
        """Raise InputError if the data do not allow the parameters; no work starts."""

    def check_techniques(self, study: Study) -> None:
        """Raise InputError if a technique lacks a setting, or has one that does not fit its model.

        A plan can be made without these settings.
        """
        for own, name in self.technique_names(study):
            if missing := techniques()[name].missing_setting(own.settings):
                raise InputError(f"{missing}, or do without '{name}'")
            techniques()[name].check(own.settings)


class Subjects(Experiment):
    """Few images of each subject, models personalised on them, prompts."""

    repeats = "subjects"
    needs_features = True

    techniques: list[
        Annotated[str, AfterValidator(partial(params.known_technique, suits=personalises))]
    ] = Field(min_length=1)
    prompts: dict[str, params.Attribute | None] = Field(min_length=1)  # and the attribute asked for
    images_per_prompt: int = Field(ge=2)  # one has no diversity
    num_subjects: int = Field(ge=2)  # one has no interval

    @field_validator("prompts")
    @classmethod
    def _with_a_place_for_the_subject(cls, value: dict[str, Any]) -> dict[str, Any]:
        for prompt in value:
            if "{}" not in prompt:
                raise ValueError(f"'{prompt}' has no {{}} for the subject")
        return value

    def subjects(self, study: Study) -> list[Subject]:
        """The subjects, each with the images that a model learns from."""
        raise NotImplementedError

    def planned_subjects(self, study: Study) -> list[Subject]:
        """Placeholders for :meth:`subjects`, for a plan before there are features."""
        raise NotImplementedError

    def requests(self, study: Study) -> list[Request]:
        can_choose = have_features(study, study.data.splits["train"].images())
        chosen = self.subjects(study) if can_choose else self.planned_subjects(study)
        asked = (chosen, self.prompts, self.images_per_prompt)
        return [r for name in self.techniques for r in subject_requests(study, name, *asked)]

    def technique_names(self, study: Study) -> list[tuple[Study, str]]:
        return [(study, name) for name in self.techniques]

    def values_allowed(self, study: Study) -> dict[str, Any]:
        return {"num_subjects": min(self.num_subjects, len(study.data.class_names))}

    def check(self, study: Study) -> None:
        num_classes = len(study.data.class_names)
        if self.num_subjects > num_classes:
            raise InputError(
                f"num_subjects: {self.num_subjects}, but there are {num_classes} classes, and each "
                "subject is of another: choose at most that many"
            )


class Runs(Experiment):
    """Classifiers or segmenters, trained once for each draw and seed of each arm."""

    percents: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that list real percentages, first the grid's own."""
    percents_of_grid: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that are one of the grid's percentages."""

    protocol: params.Protocol
    num_draws: int = Field(ge=2)  # one draw has no interval
    num_seeds: int = Field(ge=1)

    def arms(self, study: Study) -> list[Arm]:
        """Each arm of the grid, at each of its numbers of images."""
        raise NotImplementedError

    def grid(self, study: Study) -> list[Run]:
        """The grid: every arm, in each draw and with each seed."""
        return repeated(self.arms(study), self.protocol, self.num_draws, self.num_seeds)

    def runs(self, study: Study) -> list[Run]:
        return self.grid(study)

    def technique_names(self, study: Study) -> list[tuple[Study, str]]:
        found = by_settings(study, self.runs(study))
        return [(own, name) for own, runs in found.items() for name in images_needed(runs)]

    def values_allowed(self, study: Study) -> dict[str, Any]:
        """Real percentages that leave too few images of a class are left out."""
        values, names = dict(self), images_needed(self.grid(study))
        new = {key: allowed(study, values[key], names) for key in self.percents}
        for key in self.percents_of_grid:
            known = new[self.percents[0]]
            new[key] = values[key] if values[key] in known else min(known)
        return new

    def check(self, study: Study) -> None:
        grid = self.grid(study)
        names = [(x.arm, x.real_percent, x.synthetic_per_class, x.draw, x.seed) for x in grid]
        if len(set(names)) < len(names):
            raise InputError(
                f"{self.notebook}: runs that differ in overrides need a 'variant' each"
            )
        percents = [run.real_percent for run in grid if run.real_percent]
        percents += [percent for key in self.percents for percent in getattr(self, key)]
        for own, runs in by_settings(study, self.runs(study)).items():
            require_trainable(own, runs)
            needed = images_needed(runs)
            check_percents(own, percents, needed)
            for name, most in needed.items():
                techniques()[name].require(own, most)
        for key in self.percents_of_grid:
            require_among(key, getattr(self, key), getattr(self, self.percents[0]))


class AtPercentages(Runs):
    """Arms with as many synthetic images at each real percentage."""

    percents: ClassVar[tuple[str, ...]] = ("real_percents",)

    real_percents: list[params.Percent] = Field(min_length=1)
    augmentations: list[params.Augmentation] = Field(min_length=1)
    techniques: list[params.TechniqueName] = Field(min_length=1)
    synthetic_per_class: int = Field(ge=1)

    @field_validator("augmentations")
    @classmethod
    def _with_baseline(cls, names: list[str]) -> list[str]:
        if "none" not in names:
            raise ValueError("'none' must be among them: it is the baseline")
        return names

    def arms(self, study: Study) -> list[Arm]:
        arms = baselines(self.real_percents, self.augmentations)
        counts = [(percent, [self.synthetic_per_class]) for percent in self.real_percents]
        return arms + synthetic(self.techniques, counts)


class ByAmount(Runs):
    """Numbers of synthetic images at some real percentages."""

    percents: ClassVar[tuple[str, ...]] = ("synthetic_per_class",)  # a dictionary, by real %

    techniques: list[params.TechniqueName] = Field(min_length=1)
    synthetic_per_class: dict[params.Percent, Numbers] = Field(min_length=1)  # by real %
    further_numbers: dict[params.TechniqueName, Numbers]  # of synthetic images, by technique

    def arms(self, study: Study) -> list[Arm]:
        counts = list(self.synthetic_per_class.items())
        arms = baselines(self.synthetic_per_class) + synthetic(self.techniques, counts)
        for technique, numbers in self.further_numbers.items():
            arms += synthetic([technique], [(real, numbers) for real, _ in counts])
        return arms


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
    """From percentages of the real images, by real %: numbers per class, at least 1."""
    real_images = len(study.data.splits["train"]) / len(study.data.class_names)
    return [
        (real, [max(1, round(real_images * real / 100 * percent / 100)) for percent in percents])
        for real, percents in synthetic_percents.items()
    ]


def images_needed(runs: Iterable[Run]) -> dict[str, int]:
    """The most images per class that the runs need, by technique."""
    most: dict[str, int] = {}
    for run in runs:
        if run.technique:
            most[run.technique] = max(run.num_made, most.get(run.technique, 0))
    return most


def is_fine(check: Callable[..., object], *arguments: Any) -> bool:
    """Whether a check raises no InputError."""
    try:
        check(*arguments)
    except InputError:
        return False
    return True


def allowed(study: Study, values: Any, names: Collection[str]) -> Any:
    """The real percentages of a list, or a dictionary's, that leave enough images; else 100 %.

    Args:
        names: techniques that learn from these images.
    """
    kept = [percent for percent in values if is_fine(check_percents, study, [percent], names)]
    if isinstance(values, dict):
        numbers = next(iter(values.values()))
        return {percent: values[percent] for percent in kept} or {100.0: numbers}
    return kept or ([100.0] if values else [])


def require_among(key: str, percent: float, percents: Iterable[float]) -> None:
    """Raise InputError if a percentage is not one of some."""
    if percent not in percents:
        known = ", ".join(f"{one:g}" for one in percents)
        raise InputError(f"{key}: {percent:g} is not among {known}")


def by_settings(study: Study, runs: Iterable[Run]) -> dict[Study, list[Run]]:
    """Runs by the study with the settings that they override; InputError for an unknown one."""
    found: dict[Study, list[Run]] = {}
    for run in runs:
        found.setdefault(study_of(study, run), []).append(run)
    return found


def require_trainable(study: Study, runs: Iterable[Run]) -> None:
    """Raise InputError if a run asks for what its way of training would ignore."""
    for run in runs:
        is_controlled = (run.task, run.protocol) == ("classification", "controlled")
        is_mixed = label_weight(study, run) < 1 or run.augmentation in ALPHAS
        wrong = {
            "its labels are mixed": is_mixed and not is_controlled,
            "updates_as": bool(run.updates_as) and (not is_controlled or bool(run.rule)),
            "test_sets": bool(run.test_sets) and not is_controlled,
            "a rule": run.rule is not None and run.task == "segmentation",
            "an augmentation": run.augmentation != "none"
            and (run.task == "segmentation" or run.protocol == "pixels"),
            "other data": any(path.split(".")[0] == "data" for path, _ in run.overrides),
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise InputError(
                    f"{run.arm}: {what}, which a {run.task} run of protocol '{run.protocol}' does "
                    "not know"
                )


def check_percents(study: Study, percents: list[float], names: Collection[str]) -> None:
    """Raise InputError if a real subset has no image of a class, or too few to learn a model from.

    Where a class's subset is smaller than the number of inputs asked for, the model learns from all
    of it. That is accepted down to three images (the thesis uses three to five), or fewer where
    fewer are asked for or the whole class has fewer.
    """
    labels, lowest = study.data.splits["train"].labels, min(percents)
    subset(labels, lowest)  # refuses to leave a class empty
    whole = int(np.bincount(labels).min())
    smallest = subset_size(whole, lowest)
    for name in names:
        technique = techniques()[name]
        if technique.learns:
            wanted = min(technique.num_inputs(study.settings), whole)
            if smallest < min(wanted, FEWEST_INPUTS):
                raise InputError(
                    f"{name} learns from {wanted} images, but the smallest real subset "
                    f"({lowest:g} %) has {smallest} of a class: choose a larger percentage"
                )
