"""Techniques and experiments by name: each is a file, which registers what it holds.

Nothing else in the module names a technique, but claims and the experiments that are about it; and
nothing but its notebook and its claims names an experiment.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

TECHNIQUES: dict[str, Any] = {}
EXPERIMENTS: dict[str, Any] = {}

Class = TypeVar("Class", bound=type)


def register(technique: Class) -> Class:
    """Decorate a class of :class:`sdaug_utils.generation.technique.Technique`: make it known."""
    TECHNIQUES[technique.name] = technique()  # type: ignore[attr-defined]
    return technique


def register_experiment(experiment: Class) -> Class:
    """Decorate a class of :class:`sdaug_utils.experiments.base.Experiment`: make it known."""
    EXPERIMENTS[experiment.notebook] = experiment  # type: ignore[attr-defined]
    return experiment


@cache
def techniques() -> dict[str, Any]:
    """Every technique by its name, in alphabetical order."""
    return _all_of("sdaug_utils.generation.techniques", TECHNIQUES)


@cache
def experiments() -> dict[str, Any]:
    """The class of every experiment by the name of its notebook, in alphabetical order."""
    return _all_of("sdaug_utils.experiments", EXPERIMENTS)


def _all_of(name: str, registered: dict[str, Any]) -> dict[str, Any]:
    """What the files of a folder have registered, sorted in place."""
    package = importlib.import_module(name)
    for file in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{name}.{file.name}")
    for key in sorted(registered):
        registered[key] = registered.pop(key)
    return registered


def unit_of(number: str) -> str:
    """What the experiment of a notebook's number repeats: draws or subjects."""
    return next(
        (known.unit for name, known in experiments().items() if name.startswith(number)), "draws"
    )
