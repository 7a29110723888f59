"""Experiment 08: segmenters, with images that follow trimaps (thesis, section 4.3.8)."""

from pydantic import Field

from sdaug_utils.experiments.base import Arm, Numbers, Runs, baselines, counts_of, synthetic
from sdaug_utils.params import Percent
from sdaug_utils.study import Study
from sdaug_utils.training.runs import Run


class Segmentation(Runs):
    """Numbers of synthetic images, and whether training is long enough."""

    notebook = "08-segmentation"
    needs_trimaps = True
    percents = ("synthetic_percents",)

    update_numbers: Numbers  # after which the setting with the most images is tested
    # By real %, in % of those images:
    synthetic_percents: dict[Percent, Numbers] = Field(min_length=1)

    def arms(self, study: Study) -> list[Arm]:
        counts = counts_of(study, self.synthetic_percents)
        arms = baselines(self.synthetic_percents) + synthetic(["controlnet-segmentation"], counts)
        return [{**arm, "task": "segmentation"} for arm in arms]

    def runs(self, study: Study) -> list[Run]:
        return self.grid(study) + self.by_updates(study)

    def by_updates(self, study: Study) -> list[Run]:
        """The most images at the highest real percentage, and their baseline, by updates."""
        grid = self.grid(study)
        largest = max(grid, key=lambda run: (run.real_percent, run.synthetic_per_class))
        pair = [
            run.model_copy(update={"protocol": "controlled"})
            for run in grid
            if run.draw == 0
            and run.real_percent == largest.real_percent
            and run.synthetic_per_class in (0, largest.synthetic_per_class)
        ]
        own = study.settings.segmenter.max_train_steps
        return [
            run if number == own else run.changed({"segmenter.max_train_steps": number})
            for number in self.update_numbers
            for run in pair
        ]
