"""PyTorch, imported when it is first used: that takes seconds, and a plan or an error needs none.

Files of this module write ``from sdaug_utils.lazy import torch``.
"""

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING


def lazily(name: str) -> ModuleType:
    """A module that is executed at the first look at one of its attributes (importlib's recipe)."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    import torch as torch
else:
    torch = lazily("torch")
