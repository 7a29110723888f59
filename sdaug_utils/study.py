"""What every step of a study needs at hand: its settings, its real images, its store."""

from collections.abc import Sequence
from dataclasses import dataclass

from sdaug_utils import datasets
from sdaug_utils.datasets import Dataset
from sdaug_utils.errors import InputError
from sdaug_utils.params import Settings, load_settings
from sdaug_utils.store import Store


@dataclass(frozen=True, eq=False)
class Study:
    profile: str
    settings: Settings
    data: Dataset
    store: Store


def open_study(profile: str, store: Store | None = None) -> Study:
    """Check a profile's settings and data, and open the store; no work starts.

    Raises:
        InputError: anything in the profile, the data files or the store's folder is amiss.
    """
    settings = load_settings(profile)
    data = datasets.load(settings.dataset, settings.classes, settings.max_images_per_class)
    return Study(profile, settings, data, store or Store())


def check_percents(study: Study, percents: Sequence[float]) -> None:
    """Check that every real subset has an image of each class and all that models learn from.

    Raises:
        InputError: a class would be empty, or DreamBooth or textual inversion would take more
            images than the smallest subset has, that is, images from outside of it.
    """
    labels = study.data.splits["train"].labels
    smallest = min(len(datasets.subset(labels, percent)) for percent in percents)
    per_class = smallest // len(study.data.class_names)
    for name in ("dreambooth", "textual_inversion"):
        wanted = getattr(study.settings, name).num_input_images
        if wanted > per_class:
            raise InputError(
                f"{name}.num_input_images: {wanted}, but the smallest real subset "
                f"({min(percents):g} %) has {per_class} per class: choose at most that many"
            )
