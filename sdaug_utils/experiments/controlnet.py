"""Experiment 06: images that follow the edges of real ones (thesis, section 4.3.6)."""

from pydantic import Field

from sdaug_utils.experiments import base
from sdaug_utils.params import Percent, TechniqueName
from sdaug_utils.study import Study

CONTROLNET = "controlnet-canny"


class WithControlNet(base.Runs):
    """ControlNet and others; control images from the real subset, and from outside it."""

    notebook = "06-controlnet"
    percents = ("synthetic_percents",)
    percents_of_grid = ("rivals_at_percent", "outside_at_percent")

    # By real %, in % of those images:
    synthetic_percents: dict[Percent, base.Numbers] = Field(min_length=1)
    compared_with: list[TechniqueName]
    rivals: list[TechniqueName]
    rivals_at_percent: Percent
    outside_at_percent: Percent

    def arms(self, study: Study) -> list[base.Arm]:
        numbers = dict(base.counts_of(study, self.synthetic_percents))
        at_rivals = [(self.rivals_at_percent, numbers.get(self.rivals_at_percent, []))]
        percent = self.outside_at_percent
        inside = len(study.data.splits["train"]) / len(study.data.class_names) * percent / 100
        # A pool follows the subset's images first: up to that many, none is from outside.
        outside = [(percent, [count for count in numbers.get(percent, []) if count > inside])]
        arms = base.baselines(self.synthetic_percents)
        arms += base.synthetic([CONTROLNET, *self.compared_with], list(numbers.items()))
        arms += base.synthetic(self.rivals, at_rivals)
        outside_arms = base.synthetic([CONTROLNET], outside)
        arms += [{**arm, "controls_from_outside": True} for arm in outside_arms]
        return arms
