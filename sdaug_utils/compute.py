"""Where the work is done: device, precision, batches that fit into memory, hardware."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from sdaug_utils.errors import InputError
from sdaug_utils.lazy import torch
from sdaug_utils.params import Settings

GPU_DRIVERS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")  # what Linux shows of them in /dev
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "timm")  # make artefacts
NUMERICAL = ("numpy", "scipy", "scikit-learn", "pandas", "opencv-python-headless", "pillow")
TOOLS = (*LIBRARIES, *NUMERICAL, "seaborn", "matplotlib")


Item = TypeVar("Item")
Result = TypeVar("Result")


def device_of(settings: Settings) -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU."""
    return torch.device(_device_name(settings))


def dtype_of(settings: Settings) -> torch.dtype:
    """``auto`` is half precision on a GPU and single precision on the CPU."""
    return getattr(torch, dtype_name(settings))


def dtype_name(settings: Settings) -> str:
    """The name of :func:`dtype_of`, found without PyTorch where there is no GPU driver."""
    if settings.precision != "auto":
        return settings.precision
    return "float32" if _device_name(settings) == "cpu" else "float16"


def _device_name(settings: Settings) -> str:
    return _best_device() if settings.device == "auto" else settings.device


@cache
def _best_device() -> str:
    """The CPU is found without PyTorch where Linux shows no GPU driver."""
    drivers = [path for name in GPU_DRIVERS for path in Path("/dev").glob(name)]
    if platform.system() == "Linux" and not drivers:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def half_precision(settings: Settings) -> str:
    """bfloat16, which needs no scaling of the loss, unless a GPU has no hardware for it."""
    if _device_name(settings) != "cuda" or not torch.cuda.is_available():
        return "bfloat16"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@contextmanager
def one_thread(settings: Settings) -> Iterator[None]:
    """On the CPU one thread of PyTorch: results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    if device_of(settings).type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass
class Batch:
    """How many items go through a model at once: half as many each time a GPU's memory is short."""

    size: int
    name: str  # of the parameter that sets the size

    def run(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """The results of ``work`` on parts of the items; InputError if not even one item fits."""
        done: list[Result] = []
        while len(done) < len(items):
            tried = self.size  # ``work`` fills a shorter part up to it
            try:
                done += work(items[len(done) : len(done) + tried])
                continue
            except torch.OutOfMemoryError as error:
                why = str(error).split(". ")[0]
            # Outside of the handler, which keeps the tensors of the failed pass alive.
            if tried == 1:
                raise InputError(f"{self.name}: the GPU's memory is too small even for one ({why})")
            self.size = tried // 2
            torch.cuda.empty_cache()
            tqdm.write(f"{self.name}: {tried} exceed the GPU's memory: going on with {self.size}")
        return done


def hardware() -> dict[str, object]:
    """Processor, cores, memory and GPU, without the machine's name or paths (thesis, table A.1)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts: dict[str, object] = {"processor": processor(), "cores": os.cpu_count()}
    facts |= {"memory GiB": round(memory), "gpu": None}
    if shutil.which("nvidia-smi") and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "gpu memory GiB": round(gpu.total_memory / 2**30, 1),
            "CUDA capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
        }
    return facts


@cache
def made_with() -> dict[str, str]:
    """What an artefact made now is made with: versions of libraries, and the GPU or processor."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {name: version(name) for name in LIBRARIES} | {"device": gpu or processor()}


def peak_memory(of_children: bool = False) -> float:
    """The most memory that this process has had so far, or any that it has waited for, in GiB."""
    import resource

    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    per_gib = 2**30 if platform.system() == "Darwin" else 2**20  # Linux counts in KiB
    return resource.getrusage(who).ru_maxrss / per_gib


def processor() -> str:
    """The processor's name, without that of the machine."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
