"""Experiment 04: numbers of synthetic images beside real ones (thesis, section 4.3.4)."""

from pydantic import Field

from sdaug_utils.experiments.base import Arm, ByAmount, Numbers, synthetic
from sdaug_utils.params import Percent
from sdaug_utils.study import Study


class GenerationPercentage(ByAmount):
    """Numbers of synthetic images at some real percentages."""

    notebook = "04-generation-percentage"
    percents = ("synthetic_per_class", "copies_per_class")

    copies_per_class: dict[Percent, Numbers] = Field(min_length=1)  # the placebo, by real %

    def arms(self, study: Study) -> list[Arm]:
        return super().arms(study) + synthetic(["copies"], list(self.copies_per_class.items()))
