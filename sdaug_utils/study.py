"""What every step of a study needs at hand: its settings, its real images, its store."""

from dataclasses import dataclass

from sdaug_utils import datasets
from sdaug_utils.datasets import Dataset
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
