"""Experiment 01: how many images a model is personalised on (thesis, section 4.3.1)."""

from typing import Any

import numpy as np

from sdaug_utils.errors import InputError
from sdaug_utils.evidence.subjects import Subject, nearest_subjects, stand_ins, with_first
from sdaug_utils.experiments.base import Numbers, Subjects
from sdaug_utils.registry import register_experiment
from sdaug_utils.study import Study


@register_experiment
class NumberOfImages(Subjects):
    """Each subject is learnt from nested sets of its images."""

    notebook = "01-number-of-images"

    numbers_of_images: Numbers

    def subjects(self, study: Study) -> list[Subject]:
        """The subjects with the smallest set of inputs, then with the next."""
        whole = nearest_subjects(study, self.num_subjects, max(self.numbers_of_images))
        return [part for number in self.numbers_of_images for part in with_first(whole, number)]

    def planned_subjects(self, study: Study) -> list[Subject]:
        """As many, chosen without a look at an image."""
        return stand_ins(study, self.num_subjects, self.numbers_of_images)

    def values_allowed(self, study: Study) -> dict[str, Any]:
        """No more images of a subject than half the smallest class."""
        most = _most(study)
        fewer = [number for number in self.numbers_of_images if number <= most] or [most]
        return super().values_allowed(study) | {"numbers_of_images": fewer}

    def check(self, study: Study) -> None:
        """Check that half of each class suffices: the other half is held back."""
        super().check(study)
        if max(self.numbers_of_images) > _most(study):
            smallest = np.bincount(study.data.splits["train"].labels).min()
            raise InputError(
                f"numbers_of_images: {max(self.numbers_of_images)}, but the smallest class has "
                f"{smallest} training images, of which half are held back: choose at most "
                f"{_most(study)}"
            )


def _most(study: Study) -> int:
    return int(np.bincount(study.data.splits["train"].labels).min()) // 2
