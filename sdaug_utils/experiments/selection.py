"""Experiment 10: which of the generated images to keep (thesis, chapter 6: future work)."""

import pydantic
from pydantic import Field, field_validator

from sdaug_utils.experiments.base import Arm, Numbers, Runs, baselines, synthetic
from sdaug_utils.params import Percent, Rule, TechniqueName
from sdaug_utils.study import Study


class Selection(Runs):
    """As many images of each class, chosen from more by different rules."""

    notebook = "10-selection"
    in_thesis = False
    percents = ("real_percents",)

    techniques: list[TechniqueName] = Field(min_length=1)
    rules: list[Rule] = Field(min_length=2)
    real_percents: list[Percent] = Field(min_length=1)
    chosen_from: int = Field(ge=2)  # images per class
    kept_per_class: int = Field(ge=1)
    # Of the first technique, at the smallest percentage:
    further_kept: Numbers

    @field_validator("rules")
    @classmethod
    def _with_the_control(cls, names: list[str]) -> list[str]:
        if "chance" not in names:
            raise ValueError("'chance' must be among them: it is the control")
        return names

    @pydantic.model_validator(mode="after")
    def _keeps_no_more_than_there_are(self) -> "Selection":
        if max(self.kept_per_class, *self.further_kept) > self.chosen_from:
            raise ValueError(f"chosen_from: {self.chosen_from}, of which no more can be kept")
        return self

    def arms(self, study: Study) -> list[Arm]:
        counts = [(percent, [self.kept_per_class]) for percent in self.real_percents]
        rows = synthetic(self.techniques, counts)
        rows += synthetic(self.techniques[:1], [(min(self.real_percents), self.further_kept)])
        chosen = {"chosen_from": self.chosen_from}
        return baselines(self.real_percents) + [
            {**row, **chosen, "rule": rule} for row in rows for rule in self.rules
        ]
