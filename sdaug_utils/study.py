"""What every step of a study needs at hand: its settings, its real images, its store."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

from sdaug_utils import params
from sdaug_utils.data import datasets
from sdaug_utils.data.images import Dataset
from sdaug_utils.params import Domain, Settings, invocation_of, load_settings
from sdaug_utils.store import Store, require_writable, write_atomically

ROOT = datasets.PROJECT
WRITTEN: list[str] = []  # paths of the figures, tables and raw runs that this process wrote
CONFIG = "config.yaml"  # in a run's folder: what was asked for
STANDS_FOR = {"main": "oxford-iiit-pet", "second": "food-101"}  # the thesis's data sets


def output() -> Path:
    """Where runs, figures and results go: the environment's ``SDAUG_OUTPUT``, else the project."""
    return Path(os.environ.get("SDAUG_OUTPUT") or ROOT)


def figures_folder(profile: str) -> Path:
    """Where a profile's figures go, and the tables behind them."""
    return output() / "figures" / invocation_of(profile).name


def results_folder(profile: str) -> Path:
    """Where a profile's raw runs go."""
    return output() / "results" / invocation_of(profile).name


def write_config(
    profile: str, folder: Path | None = None, file: str = CONFIG, **asked: Any
) -> tuple[str, Path]:
    """Write what is ``asked`` for, as :func:`params.configure` resolves it, into a ``config.yaml``.

    Args:
        folder: where the file goes, by default ``runs/<name>``.
        file: its name; another one than ``config.yaml`` if nothing is run.

    Returns a value for ``profile`` of :func:`open_study` (the profile's own name if nothing changes
    it, else the written file's path) and the folder. Raises InputError if a value is not valid or
    the folder cannot be written to.
    """
    sections = params.configure(profile, **asked)
    name = sections["run"]["name"]
    folder = folder or output() / "runs" / name
    require_writable(folder)
    target, text = folder / file, yaml.safe_dump(sections, sort_keys=False)
    write_atomically(target, text)
    is_plain = name == profile and not sections["run"]["from_results"]
    return profile if is_plain else str(target.resolve()), folder


@dataclass(frozen=True, eq=False)
class Study:
    """One profile and one of its data sets, opened: settings, real images, store."""

    profile: str  # its name, or the path of a config.yaml
    settings: Settings
    data: Dataset
    store: Store
    domain: Domain = "main"

    @cached_property
    def name(self) -> str:
        """The run's name, which its folders under figures and results have."""
        return invocation_of(self.profile).name

    @property
    def stands_for(self) -> str:
        """The thesis's data set whose published results are compared; "" for one's own images."""
        own = self.settings.data[self.domain].name == "imagefolder"
        return "" if own else STANDS_FOR[self.domain]

    def changed(self, changes: Mapping[str, Any]) -> "Study":
        """The same data and store with other settings, as in ``{"sampling.prompt": "a {}"}``."""
        return _changed(self, tuple(sorted(changes.items()))) if changes else self


@lru_cache(maxsize=256)
def _changed(study: Study, changes: tuple[tuple[str, Any], ...]) -> Study:
    """The same object for the same changes, since much is cached by study."""
    return replace(study, settings=params.changed(study.settings, dict(changes)))


def open_study(
    profile: str, store: Store | None = None, domain: Domain = "main", download: bool = True
) -> Study:
    """Check a profile's settings and data, and open the store; no work starts.

    Raises InputError if anything in the profile, the data files or the store's folder is wrong.

    Args:
        profile: its name, or the path of a ``config.yaml`` that was made of one.
        domain: which of the profile's two data sets.
        download: False never downloads the data set, even if the profile allows it.
    """
    settings = load_settings(profile, domain)
    chosen = settings.data[domain]
    fetch = chosen.download and download and not invocation_of(profile).from_results
    data = datasets.load(**chosen.model_dump(exclude={"download"}), download=fetch)
    return Study(profile, settings, data, store or Store(), domain)
