"""Experiment 03: how much real data (thesis, section 4.3.3), and ways of training."""

from typing import ClassVar

from pydantic import Field

from sdaug_utils.data.datasets import subset
from sdaug_utils.experiments.base import Arm, AtPercentages, Numbers, baselines, synthetic
from sdaug_utils.params import Percent, Protocol
from sdaug_utils.study import Study
from sdaug_utils.training.runs import LENGTH, RECIPE, Run, repeated

VIEWS = (f"{RECIPE}.min_views", f"{RECIPE}.min_synthetic_views")


class TrainingPercentage(AtPercentages):
    """The grid, a classifier on pixels, the published protocol, lengths, views."""

    notebook = "03-training-percentage"
    percents = ("real_percents", "pixels_at_percents")
    percents_of_grid = ("protocols_at_percent",)
    compared: ClassVar[str] = "stable-diffusion-prompt"  # with the baseline, by ways of training
    placebo: ClassVar[str] = "copies"

    pixels_at_percents: list[Percent]  # where a second classifier is tried
    protocols_at_percent: Percent
    protocols_num_draws: int = Field(ge=2)  # of the published protocol, which takes long
    curve_steps: Numbers
    view_numbers: Numbers

    def arms(self, study: Study) -> list[Arm]:
        counts = [(percent, [self.synthetic_per_class]) for percent in self.real_percents]
        return super().arms(study) + synthetic([self.placebo], counts)

    def runs(self, study: Study) -> list[Run]:
        return [
            *self.grid(study),
            *self.by_protocol(study),
            *self.on_pixels(),
            *self.by_length(study),
            *self.by_views(study),
            *self.at_both_learning_rates(study),
        ]

    def on_pixels(self) -> list[Run]:
        """Baseline, techniques and placebo for a classifier on pixels."""
        counts = [(percent, [self.synthetic_per_class]) for percent in self.pixels_at_percents]
        arms = baselines(self.pixels_at_percents)
        arms += synthetic([*self.techniques, self.placebo], counts)
        return repeated(arms, "pixels", self.num_draws, 1)

    def of_protocol(self, protocol: Protocol, num_draws: int) -> list[Run]:
        """Baseline, plain prompts and placebo, at one real percentage."""
        counts = [(self.protocols_at_percent, [self.synthetic_per_class])]
        arms = baselines([self.protocols_at_percent])
        arms += synthetic([self.compared, self.placebo], counts)
        return repeated(arms, protocol, num_draws, 1)

    def by_protocol(self, study: Study) -> list[Run]:
        """The published protocol, and of each run a frozen, normalised twin, all else equal.

        A twin sees the same images at the same size, at the same rate and for as many updates, and
        its last weights are tested.
        """
        published = self.of_protocol("published", self.protocols_num_draws)
        like = study.settings.classifier.published
        same = {
            f"{RECIPE}.learning_rate": like.learning_rate,
            f"{RECIPE}.batch_size": like.batch_size,
            "classifier.image_size": like.image_size,
        }
        frozen = {"protocol": "controlled", "updates_as": "published"}
        return published + [run.model_copy(update=frozen).changed(same) for run in published]

    def by_length(self, study: Study) -> list[Run]:
        """A run of each arm after some updates, with the most and with the least real images."""
        last = study.settings.classifier.controlled.max_train_steps
        steps = [step for step in self.curve_steps if step < last] + [last]
        return [
            after(run.model_copy(update={"protocol": "controlled"}), step)
            for run in self._at_ends(study)
            if run.draw == run.seed == 0
            for step in steps
        ]

    def by_views(self, study: Study) -> list[Run]:
        """Augmented arms, with most and least real images, with fewer views of each image."""
        ends = [run.model_copy(update={"protocol": "controlled"}) for run in self._at_ends(study)]
        augmented = [run for run in ends if run.augmentation != "none"]
        return [
            # No views beside these for being few images: num_augmented is off.
            run.changed(dict.fromkeys(VIEWS, number) | {f"{RECIPE}.num_augmented": 1})
            for number in self.view_numbers
            for run in augmented
            if number <= _most_views(study, run)
        ]

    @staticmethod
    def num_views(run: Run) -> int:
        """Views per image in a run of :meth:`by_views`."""
        return int(dict(run.overrides)[VIEWS[0]])

    def at_both_learning_rates(self, study: Study) -> list[Run]:
        """The same arms after some updates, at each protocol's learning rate."""
        theirs = {f"{RECIPE}.learning_rate": study.settings.classifier.published.learning_rate}
        steps = sorted({*self.curve_steps, *self.budgets(study)})
        return [
            after(run.changed(rate), step)
            for rate in (theirs, {})
            for run in self.of_protocol("controlled", self.num_draws)
            for step in steps
        ]

    def budgets(self, study: Study) -> tuple[int, int]:
        """Updates in all the published protocol's epochs, for the baseline and for the others."""
        num_real = len(subset(study.data.splits["train"].labels, self.protocols_at_percent))
        num_synthetic = self.synthetic_per_class * len(study.data.class_names)
        published = study.settings.classifier.published
        return published.max_updates(num_real), published.max_updates(num_real + num_synthetic)

    def _at_ends(self, study: Study) -> list[Run]:
        ends = (max(self.real_percents), min(self.real_percents))
        return [run for run in self.grid(study) if run.real_percent in ends]


def after(run: Run, num_updates: int) -> Run:
    """A run whose weights are tested after so many updates."""
    return run.changed(dict.fromkeys(LENGTH, num_updates))


def _most_views(study: Study, run: Run) -> int:
    num_real = len(subset(study.data.splits["train"].labels, run.real_percent, run.draw))
    return study.settings.classifier.controlled.num_views(num_real)
