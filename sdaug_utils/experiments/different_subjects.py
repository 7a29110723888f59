"""Experiment 02: inputs that are less and less alike (thesis, section 4.3.2)."""

import itertools
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, field_validator

from sdaug_utils.errors import InputError
from sdaug_utils.evidence.subjects import Subject, input_sets, stand_ins
from sdaug_utils.experiments.base import Subjects
from sdaug_utils.generation.technique import Request, request
from sdaug_utils.params import known_technique
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study

SIZES = [3, 5, 7, 5]  # of the four sets of inputs


def follows_prompts_alone(technique: Any) -> bool:
    """Whether it generates images without any real ones."""
    return technique.is_generative and technique.inputs == "none"


class DifferentSubjects(Subjects):
    """Each subject is learnt from four sets of inputs, of one class and of several."""

    notebook = "02-different-subjects"

    kinds: list[list[str]]  # classes of one kind; a class of none is a kind of its own
    bare_name: str  # of all kinds: "animal"
    # Which makes images of it:
    bare_technique: Annotated[
        str, AfterValidator(partial(known_technique, suits=follows_prompts_alone))
    ]

    @field_validator("kinds")
    @classmethod
    def _no_class_twice(cls, value: list[list[str]]) -> list[list[str]]:
        names = [name for kind in value for name in kind]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"'{twice[0]}' is of two kinds")
        return value

    def subjects(self, study: Study) -> list[Subject]:
        """Four sets of inputs for each of the first classes."""
        return [part for sets in input_sets(study, self.num_subjects) for part in sets]

    def planned_subjects(self, study: Study) -> list[Subject]:
        return stand_ins(study, self.num_subjects, SIZES)

    def requests(self, study: Study) -> list[Request]:
        return super().requests(study) + self.bare_requests(study)

    def bare_requests(self, study: Study) -> list[Request]:
        """Images of a kind's bare name by the same prompts: nothing is personalised."""
        technique, indices = techniques()[self.bare_technique], range(self.images_per_prompt)
        return [  # the same prompts for each subject that they are compared with
            request(study, technique, self.bare_name, prompt, indices, draw=number)
            for number, prompt in itertools.product(range(self.num_subjects), self.prompts)
        ]

    def technique_names(self, study: Study) -> list[tuple[Study, str]]:
        return [*super().technique_names(study), (study, self.bare_technique)]

    def values_allowed(self, study: Study) -> dict[str, Any]:
        known = set(study.data.class_names)  # a kind of which none is known stays
        kinds = [[name for name in kind if name in known] or kind for kind in self.kinds]
        return super().values_allowed(study) | {"kinds": kinds}

    def check(self, study: Study) -> None:
        super().check(study)
        classes = set(study.data.class_names)
        for kind in map(set, self.kinds):
            if kind & classes and kind - classes:
                raise InputError(f"kinds: '{min(kind - classes)}' is not a class of the data")
