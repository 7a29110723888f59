"""Experiment 06: images that follow the edges of real ones (thesis, section 4.3.6)."""

from pydantic import Field

from sdaug_utils.experiments.base import (
    Arm,
    Numbers,
    Runs,
    baselines,
    counts_of,
    require_among,
    synthetic,
)
from sdaug_utils.params import Percent, Technique
from sdaug_utils.registry import register_experiment
from sdaug_utils.study import Study

CONTROLNET = "controlnet-canny"


@register_experiment
class WithControlNet(Runs):
    """ControlNet and others; control images from the real subset, and from outside it."""

    notebook = "06-controlnet"
    percents = ("synthetic_percents",)
    percents_of_grid = ("rivals_at_percent", "outside_at_percent")

    synthetic_percents: dict[Percent, Numbers] = Field(min_length=1)  # of the real images
    compared_with: list[Technique]
    rivals: list[Technique]
    rivals_at_percent: Percent
    outside_at_percent: Percent

    def arms(self, study: Study) -> list[Arm]:
        """Each technique's numbers of images; rivals and outside controls at one real % each."""
        counts = counts_of(study, self.synthetic_percents)
        at_rivals = [pair for pair in counts if pair[0] == self.rivals_at_percent]
        subset_images = len(study.data.splits["train"]) / len(study.data.class_names)
        subset_images *= self.outside_at_percent / 100  # with no more, all controls are inside
        outside = [
            (percent, [count for count in numbers if count > subset_images])
            for percent, numbers in counts
            if percent == self.outside_at_percent
        ]
        arms = baselines(self.synthetic_percents)
        arms += synthetic([CONTROLNET, *self.compared_with], counts)
        arms += synthetic(self.rivals, at_rivals)
        arms += [{**arm, "controls_from_outside": True} for arm in synthetic([CONTROLNET], outside)]
        return arms

    def check(self, study: Study) -> None:
        """Check that rivals and outside controls are tried where there are runs."""
        for key in self.percents_of_grid:
            require_among(key, getattr(self, key), self.synthetic_percents)
        super().check(study)
