"""Techniques by name: every file of ``generation/techniques`` registers what it holds.

Nothing else in the module names a technique, but claims and the experiments that are about it.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

REGISTERED: dict[str, Any] = {}

Class = TypeVar("Class", bound=type)


def register(technique: Class) -> Class:
    """Decorate a class of :class:`sdaug_utils.generation.technique.Technique`: make it known."""
    REGISTERED[technique.name] = technique()  # type: ignore[attr-defined]
    return technique


@cache
def techniques() -> dict[str, Any]:
    """Every technique by its name, in alphabetical order."""
    package = importlib.import_module("sdaug_utils.generation.techniques")
    for file in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{file.name}")
    for name in sorted(REGISTERED):
        REGISTERED[name] = REGISTERED.pop(name)
    return REGISTERED
