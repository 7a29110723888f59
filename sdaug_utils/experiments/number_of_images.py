"""Experiment 01: how many images a model is personalised on (thesis, section 4.3.1)."""

from typing import Any

import numpy as np

from sdaug_utils.errors import InputError
from sdaug_utils.evidence.subjects import Subject, nearest_subjects, stand_ins, with_first
from sdaug_utils.experiments.base import Numbers, Subjects
from sdaug_utils.study import Study


class NumberOfImages(Subjects):
    """Each subject is learnt from nested sets of its images."""

    notebook = "01-number-of-images"

    numbers_of_images: Numbers

    def subjects(self, study: Study) -> list[Subject]:
        """The subjects with the smallest set of inputs, then with the next."""
        whole = nearest_subjects(study, self.num_subjects, max(self.numbers_of_images))
        return [part for number in self.numbers_of_images for part in with_first(whole, number)]

    def planned_subjects(self, study: Study) -> list[Subject]:
        return stand_ins(study, self.num_subjects, self.numbers_of_images)

    def values_allowed(self, study: Study) -> dict[str, Any]:
        most = _smallest_class(study) // 2  # the other half is held back
        fewer = [number for number in self.numbers_of_images if number <= most] or [most]
        return super().values_allowed(study) | {"numbers_of_images": fewer}

    def check(self, study: Study) -> None:
        super().check(study)
        asked, smallest = max(self.numbers_of_images), _smallest_class(study)
        if asked > smallest // 2:
            raise InputError(
                f"numbers_of_images: {asked}, but the smallest class has {smallest} training "
                f"images, of which half are held back: choose at most {smallest // 2}"
            )


def _smallest_class(study: Study) -> int:
    return int(np.bincount(study.data.splits["train"].labels).min())
