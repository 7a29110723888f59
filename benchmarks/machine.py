"""Describe the machine that a benchmark ran on."""

import platform
from importlib.metadata import version

from sdaug_utils.compute import hardware


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, without names or paths."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return hardware() | {"python": platform.python_version()} | libraries
