"""What every step of a study needs at hand: its settings, its real images, its store."""

import os
from dataclasses import dataclass
from pathlib import Path

from sdaug_utils.data import datasets
from sdaug_utils.data.images import Dataset
from sdaug_utils.params import Domain, Settings, load_settings
from sdaug_utils.store import Store

FIGURES, RESULTS = (Path(__file__).parents[1] / name for name in ("figures", "results"))


def figures_folder(profile: str) -> Path:
    """Where a profile's figures go; the environment's ``SDAUG_FIGURES`` moves them elsewhere."""
    return Path(os.environ.get("SDAUG_FIGURES") or FIGURES) / profile


def results_folder(profile: str) -> Path:
    """Where a profile's raw runs go; the environment's ``SDAUG_RESULTS`` moves them elsewhere."""
    return Path(os.environ.get("SDAUG_RESULTS") or RESULTS) / profile


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
    ``download`` False keeps a data set that the profile would download from being downloaded; so
    does ``SDAUG_FROM_RESULTS`` in the environment, with which shipped runs are enough.

    Raises:
        InputError: anything in the profile, the data files or the store's folder is amiss.
    """
    settings = load_settings(profile, domain)
    chosen = settings.data[domain]
    fetch = chosen.download and download and not os.environ.get("SDAUG_FROM_RESULTS")
    data = datasets.load(**chosen.model_dump(exclude={"download"}), download=fetch)
    return Study(profile, settings, data, store or Store())
