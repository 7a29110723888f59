"""Experiment 05: synthetic images alone (thesis, section 4.3.5)."""

from pydantic import Field

from sdaug_utils.experiments.base import Arm, Numbers, Runs, baselines, synthetic
from sdaug_utils.params import Percent, TechniqueName
from sdaug_utils.study import Study


class AllGenerated(Runs):
    """Classifiers that see no real image, beside some that see nothing else."""

    notebook = "05-all-generated"
    percents = ("reference_percents",)

    techniques: list[TechniqueName] = Field(min_length=1)
    synthetic_per_class: Numbers
    further_numbers: dict[TechniqueName, Numbers]
    reference_percents: list[Percent] = Field(min_length=1)

    def arms(self, study: Study) -> list[Arm]:
        arms = baselines(self.reference_percents)
        arms += synthetic(self.techniques, [(0.0, self.synthetic_per_class)])
        for technique, numbers in self.further_numbers.items():
            arms += synthetic([technique], [(0.0, numbers)])
        return arms
