"""Techniques and experiments by name: each is a file with a class, which registers itself.

No other file of the package names a technique, but for claims, experiments about it and messages;
only its notebook and its claims (and the site's main figure) name an experiment.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any

TECHNIQUES: dict[str, Any] = {}  # filled as files are imported: ask techniques() ...
EXPERIMENTS: dict[str, Any] = {}  # ... and experiments()


@cache
def techniques() -> dict[str, Any]:
    """Every technique by its name, in alphabetical order."""
    return _all_of("sdaug_utils.generation.techniques", TECHNIQUES)


@cache
def experiments() -> dict[str, Any]:
    """The class of every experiment by the name of its notebook, in alphabetical order."""
    return _all_of("sdaug_utils.experiments", EXPERIMENTS)


def _all_of(name: str, registered: dict[str, Any]) -> dict[str, Any]:
    """Import every file of a folder; return what they have registered, sorted by name."""
    package = importlib.import_module(name)
    for file in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{name}.{file.name}")
    for key in sorted(registered):
        registered[key] = registered.pop(key)  # in place: later classes are found in it, too
    return registered


def repeats_of(number: str) -> str:
    """What the experiment of a notebook's number repeats: "draws" or "subjects"."""
    return next(
        (known.repeats for name, known in experiments().items() if name.startswith(number)), "draws"
    )
