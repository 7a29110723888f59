"""A text-to-image pipeline by name: the shipped miniature or a local diffusers folder.

diffusers and transformers take seconds to import: they are, where a pipeline is loaded, so that
whoever only needs a key of the store does not wait for them.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from sdaug_utils.errors import InputError
from sdaug_utils.params import Settings
from sdaug_utils.store import verify_checksums

if TYPE_CHECKING:
    import diffusers

PROJECT = Path(__file__).parents[1]
MINIATURE_WEIGHTS = PROJECT / "miniature" / "weights"
SCHEDULERS: dict[str, tuple[str, dict[str, bool]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def device_of(settings: Settings) -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU."""
    if settings.device != "auto":
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_of(settings: Settings) -> torch.dtype:
    """``auto`` is half precision on a GPU and single precision on the CPU."""
    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    return torch.float32 if device_of(settings).type == "cpu" else torch.float16


Result = TypeVar("Result")


def in_parallel(
    settings: Settings, work: Callable[[int], Result], items: Sequence[int]
) -> list[Result]:
    """Do independent pieces of work on a thread per core; one after the other on a GPU.

    Small networks gain little from several cores: a thread per piece keeps all of them busy.
    The results do not depend on the number of workers.
    """
    if device_of(settings).type != "cpu":
        return [work(item) for item in items]
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        return list(executor.map(work, items))


def locate(foundation: str) -> Path:
    """The folder that ``from_pretrained`` is to load; relative ones start at the project."""
    return MINIATURE_WEIGHTS if foundation == "miniature" else PROJECT / foundation


@cache
def revision(foundation: str) -> str:
    """What identifies the weights, for the store's keys: a digest of the folder's files.

    The ControlNets beside a pipeline do not count: its images do not depend on them.

    Raises:
        InputError: a weight file of the miniature is missing or corrupt; no such folder.
    """
    folder = locate(foundation)
    if foundation == "miniature":
        checksums = verify_checksums(folder)
    elif (folder / "model_index.json").exists():
        checksums = {
            path.relative_to(folder).as_posix(): _sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    else:
        raise InputError(
            f"foundation: '{foundation}' is neither 'miniature' nor a folder with model_index.json"
        )
    listing = "\n".join(
        f"{name} {value}"
        for name, value in sorted(checksums.items())
        if not name.startswith("controlnet-")
    )
    return hashlib.sha256(listing.encode()).hexdigest()[:20]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_pipeline(settings: Settings) -> "diffusers.StableDiffusionPipeline":
    """The text-to-image pipeline of a profile, in evaluation mode on its device.

    Raises:
        InputError: as :func:`revision`.
    """
    revision(settings.foundation)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        locate(settings.foundation),
        dtype=dtype_of(settings),
        use_safetensors=True,
        requires_safety_checker=False,
    ).to(device_of(settings))
    if settings.sampling.scheduler != "default":
        name, options = SCHEDULERS[settings.sampling.scheduler]
        scheduler = getattr(diffusers, name)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
