"""Experiment 11: what else one could do, techniques of the literature beside the thesis's."""

from typing import Any

from pydantic import Field

from sdaug_utils.data.shifts import SHIFTS
from sdaug_utils.errors import InputError
from sdaug_utils.experiments.base import AtPercentages, baselines, images_needed, require_among
from sdaug_utils.params import Augmentation, Percent
from sdaug_utils.registry import register_experiment, techniques
from sdaug_utils.study import Study
from sdaug_utils.training.runs import Run, repeated


@register_experiment
class Rivals(AtPercentages):
    """All techniques on test images as they are, and on shifted ones."""

    notebook = "11-rivals"
    in_thesis = False

    shifted_percents: list[Percent] = Field(min_length=1)  # where shifted test images are tried
    shifted_augmentations: list[Augmentation]  # there alone, and on real images only

    def runs(self, study: Study) -> list[Run]:
        """The main table, and those that are tested on shifted images."""
        return self.grid(study) + self.on_shifted_images(study)

    def on_shifted_images(self, study: Study) -> list[Run]:
        """One seed of the main table and of some augmentations, at some real percentages."""
        arms = baselines(self.shifted_percents, self.shifted_augmentations)
        both = self.grid(study) + repeated(arms, self.protocol, self.num_draws, 1)
        return [
            run.model_copy(update={"test_sets": ("none", *SHIFTS)})
            for run in both
            if run.real_percent in self.shifted_percents and run.seed == 0
        ]

    def fitted(self, study: Study) -> dict[str, Any]:
        """Only techniques that the data allow, only percentages that there are."""
        new, numbers = super().fitted(study), images_needed(self.grid(study))
        there_are = [name for name in self.techniques if _can_have(study, name, numbers[name])]
        among = new.get("real_percents", self.real_percents)
        shifted = [percent for percent in self.shifted_percents if percent in among] or among[-1:]
        own = {"techniques": there_are, "shifted_percents": shifted}
        return new | {key: value for key, value in own.items() if value != getattr(self, key)}

    def check(self, study: Study) -> None:
        """Check that shifted images are tried where there are runs."""
        for percent in self.shifted_percents:
            require_among("shifted_percents", percent, self.real_percents)
        super().check(study)


def _can_have(study: Study, name: str, count: int) -> bool:
    """Whether there can be so many images of each class by a technique."""
    technique = techniques()[name]
    try:
        technique.require(study, count)
    except InputError:
        return False
    return not technique.missing_setting(study.settings)
