"""Where the work is done: device, precision, threads, batches that fit; torch comes when used."""

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from sdaug_utils.errors import InputError
from sdaug_utils.params import Settings

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "timm")

Item = TypeVar("Item")
Result = TypeVar("Result")


def device_of(settings: Settings) -> "torch.device":
    """``auto`` is CUDA, else Apple's MPS, else the CPU."""
    import torch

    if settings.device != "auto":
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_of(settings: Settings) -> "torch.dtype":
    """``auto`` is half precision on a GPU and single precision on the CPU."""
    import torch

    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    return torch.float32 if device_of(settings).type == "cpu" else torch.float16


def half_precision(device: "torch.device") -> "torch.dtype":
    """bfloat16, which needs no scaling of the loss, where there is hardware for it."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def in_parallel(
    settings: Settings, work: Callable[[int], Result], items: Sequence[int]
) -> list[Result]:
    """Do independent pieces of work on a thread per core; one after the other on a GPU.

    Small networks gain little from several cores: a thread per piece keeps all of them busy.
    The results do not depend on the number of workers.
    """
    import torch

    if device_of(settings).type != "cpu":
        return [work(item) for item in items]
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        return list(executor.map(work, items))


class Batch:
    """How many items go through a model at once: half as many each time a GPU's memory is short."""

    def __init__(self, size: int, name: str) -> None:
        """``name`` is the parameter that sets the size."""
        self.size, self.name = size, name

    def run(
        self, work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
    ) -> list[Result]:
        """The results of all items, which ``work`` gets in parts.

        Raises:
            InputError: the memory is too small even for one.
        """
        import torch

        done: list[Result] = []
        while len(done) < len(items):
            part, short = items[len(done) : len(done) + self.size], ""
            try:
                done += work(part)
            except torch.OutOfMemoryError as error:
                short = str(error).split(". ")[0]
            if short:  # outside of the handler, which keeps the tensors of the failed pass alive
                if len(part) == 1:
                    raise InputError(
                        f"{self.name}: the GPU's memory is too small even for one ({short})"
                    )
                self.size = len(part) // 2
                torch.cuda.empty_cache()
                tqdm.write(
                    f"{self.name}: {len(part)} exceed the GPU's memory: going on with {self.size}"
                )
        return done


@cache
def made_with() -> dict[str, str]:
    """What an artefact made now is made with: versions of libraries, and the GPU or processor."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {name: version(name) for name in LIBRARIES} | {"device": gpu or processor()}


def processor() -> str:
    """The processor's name, without that of the machine."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
