"""What every step of a study needs at hand: its settings, its real images, its store."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sdaug_utils import datasets
from sdaug_utils.datasets import Dataset
from sdaug_utils.errors import InputError
from sdaug_utils.params import Domain, Settings, load_settings
from sdaug_utils.store import Store


@dataclass(frozen=True, eq=False)
class Study:
    profile: str
    settings: Settings
    data: Dataset
    store: Store


def open_study(
    profile: str, store: Store | None = None, domain: Domain = "main", download: bool = True
) -> Study:
    """Check a profile's settings and data, and open the store; no work starts.

    ``domain`` says which of the profile's two data sets: only experiment 09 uses the second.
    ``download`` False keeps a data set that the profile would download from being downloaded.

    Raises:
        InputError: anything in the profile, the data files or the store's folder is amiss.
    """
    settings = load_settings(profile)
    chosen = settings.data[domain]
    fetch = chosen.download and download
    data = datasets.load(**chosen.model_dump(exclude={"download"}), download=fetch)
    return Study(profile, settings, data, store or Store())


def check_percents(
    study: Study, percents: Sequence[float], techniques: Collection[str | None]
) -> None:
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
        if name.replace("_", "-") in techniques and wanted > per_class:
            raise InputError(
                f"{name}.num_input_images: {wanted}, but the smallest real subset "
                f"({min(percents):g} %) has {per_class} per class: choose at most that many"
            )
