"""Experiment 11: what else one could do, techniques of the literature beside the thesis's."""

from typing import Any

from pydantic import Field

from sdaug_utils.data.shifts import SHIFTS
from sdaug_utils.experiments import base
from sdaug_utils.params import Augmentation, Percent
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training.runs import Run, repeated


class Rivals(base.AtPercentages):
    """All techniques on test images as they are, and on shifted ones."""

    notebook = "11-rivals"
    in_thesis = False

    shifted_percents: list[Percent] = Field(min_length=1)  # where shifted test images are tried
    shifted_augmentations: list[Augmentation]  # there alone, and on real images only

    def runs(self, study: Study) -> list[Run]:
        return self.grid(study) + self.on_shifted_images(study)

    def on_shifted_images(self, study: Study) -> list[Run]:
        """One seed of the grid and of some augmentations, at some real percentages."""
        arms = base.baselines(self.shifted_percents, self.shifted_augmentations)
        both = self.grid(study) + repeated(arms, self.protocol, self.num_draws, 1)
        return [
            run.model_copy(update={"protocol": "controlled", "test_sets": ("none", *SHIFTS)})
            for run in both
            if run.real_percent in self.shifted_percents and run.seed == 0
        ]

    def values_allowed(self, study: Study) -> dict[str, Any]:
        new, needed = super().values_allowed(study), base.images_needed(self.grid(study))
        known = techniques()
        new["techniques"] = [
            name
            for name in self.techniques
            if base.is_fine(known[name].require, study, needed[name])
            and not known[name].missing_setting(study.settings)
        ]
        among = new["real_percents"]
        shifted = [percent for percent in self.shifted_percents if percent in among]
        return new | {"shifted_percents": shifted or among[-1:]}

    def check(self, study: Study) -> None:
        for percent in self.shifted_percents:
            base.require_among("shifted_percents", percent, self.real_percents)
        super().check(study)
