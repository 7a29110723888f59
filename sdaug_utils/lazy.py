"""PyTorch, imported when it is first used: that takes seconds, and a plan or an error needs none.

Other files write ``from sdaug_utils.lazy import torch``.
"""

import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or "torch" in sys.modules:
    import torch as torch
else:  # importlib's recipe for a lazy import
    spec = importlib.util.find_spec("torch")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    torch = sys.modules["torch"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(torch)
