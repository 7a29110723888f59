"""A text-to-image pipeline by name: the shipped miniature, a local diffusers folder, a hub id.

diffusers and transformers take seconds to import: they are, where a pipeline is loaded, so that
whoever only needs a key of the store does not wait for them.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch
from tqdm import tqdm

from sdaug_utils.errors import InputError
from sdaug_utils.params import Control, ControlNet, Sampling, Settings, Technique
from sdaug_utils.store import verify_checksums

if TYPE_CHECKING:
    import diffusers

HUB_ID = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"
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


Item = TypeVar("Item")
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
        done: list[Result] = []
        while len(done) < len(items):
            part, short = items[len(done) : len(done) + self.size], None
            try:
                done += work(part)
            except torch.OutOfMemoryError as error:
                short = str(error).split(". ")[0]
            if short:  # outside of the handler, which keeps the tensors of the failed pass alive
                self._halve(len(part), short)
        return done

    def _halve(self, size: int, reason: str) -> None:
        if size == 1:
            raise InputError(f"{self.name}: the GPU's memory is too small even for one ({reason})")
        self.size = size // 2
        torch.cuda.empty_cache()
        tqdm.write(f"{self.name}: {size} exceed the GPU's memory: going on with {self.size}")


def locate(name: str, part: str = "") -> Path:
    """The folder that ``from_pretrained`` is to load.

    ``miniature`` is the shipped model; its ControlNets are the parts ``controlnet-...`` of it. A
    local folder may be relative to the project. A hub id may end in ``@`` and a revision; without
    one it is the main branch. What the hub's cache lacks is downloaded, safetensors only.

    Raises:
        InputError: no such folder; not in the hub's cache, and the hub has not got it either.
    """
    if name == "miniature":
        return MINIATURE_WEIGHTS / part
    if (PROJECT / name).is_dir():
        return PROJECT / name
    if re.fullmatch(HUB_ID, name):
        return _from_hub(name, part)
    key = f"controlnet.{part.removeprefix('controlnet-')}" if part else "foundation"
    raise InputError(f"{key}: '{name}' is neither 'miniature' nor a folder nor a hub id")


@cache
def _from_hub(name: str, part: str) -> Path:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from huggingface_hub import constants, snapshot_download

    identifier, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None}
    fetch: Callable[..., str] = snapshot_download
    if part:
        wanted["allow_patterns"] = ["config.json", "diffusion_pytorch_model.safetensors"]
    else:
        wanted["use_safetensors"], fetch = True, DiffusionPipeline.download
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the hub is out of reach is told below, in one line
    try:
        try:
            folder = fetch(identifier, **wanted)
        except Exception:  # of any kind: a firewall's time-out is no OSError
            folder = fetch(identifier, local_files_only=True, **wanted)
    except Exception as error:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"model '{name}': not in {constants.HF_HUB_CACHE} and not to be had from the hub: run "
            f"'hf download {identifier}{at}' where there is internet"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    return Path(folder)


def resolved(name: str, part: str = "") -> str:
    """A model's name with what it is at the moment: a hub id with its commit, as tables show it."""
    folder = locate(name, part)
    is_snapshot = folder.parent.name == "snapshots"
    return f"{name.partition('@')[0]}@{folder.name}" if is_snapshot else name


@cache
def revision(foundation: str) -> str:
    """What identifies the weights, for the store's keys: a digest of files, or the hub's commit.

    The ControlNets beside a pipeline do not count: its images do not depend on them.

    Raises:
        InputError: a weight file of the miniature is missing or corrupt; no such folder.
    """
    folder = locate(foundation)
    if foundation == "miniature":
        checksums = verify_checksums(folder)
    elif folder.parent.name == "snapshots":
        return folder.name  # the hub's commit
    elif (folder / "model_index.json").exists():
        checksums = _checksums(folder)
    else:
        raise InputError(f"foundation: '{foundation}': a folder without model_index.json")
    return _digest({k: v for k, v in checksums.items() if not k.startswith("controlnet-")})


@cache
def controlnet_revision(name: str, technique: str) -> str:
    """As :func:`revision`, of the ControlNet of a technique.

    Raises:
        InputError: a weight file of the miniature is missing or corrupt; no such folder.
    """
    folder = locate(name, technique)
    if name == "miniature":
        every = verify_checksums(MINIATURE_WEIGHTS)
        return _digest({k: v for k, v in every.items() if k.startswith(f"{technique}/")})
    if folder.parent.name == "snapshots":
        return folder.name
    if not (folder / "config.json").exists():
        key = technique.removeprefix("controlnet-")
        raise InputError(f"controlnet.{key}: '{name}': a folder without config.json")
    return _digest(_checksums(folder))


def controlnet_name(settings: Settings, technique: str) -> str:
    """Which ControlNet a technique uses."""
    own = settings.controlnet
    return own.canny if technique == "controlnet-canny" else own.segmentation


def _checksums(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _digest(checksums: dict[str, str]) -> str:
    listing = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(listing.encode()).hexdigest()[:20]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_pipeline(
    settings: Settings, technique: Technique = "stable-diffusion-prompt"
) -> "diffusers.StableDiffusionPipeline":
    """The text-to-image pipeline of a profile, in evaluation mode on its device.

    For a ControlNet technique it is a ``StableDiffusionControlNetPipeline`` of the same parts.

    Raises:
        InputError: as :func:`revision`.
    """
    revision(settings.foundation)
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # It warns of how a new token's embedding is initialised, though the learnt one follows at once.
    transformers.utils.logging.set_verbosity_error()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        locate(settings.foundation),
        dtype=dtype_of(settings),
        use_safetensors=True,
        requires_safety_checker=False,
        **({} if settings.sampling.safety_checker else {"safety_checker": None}),
    ).to(device_of(settings))
    sampling: Sampling | ControlNet = settings.sampling
    if technique in get_args(Control):
        sampling = settings.controlnet
        controlnet = diffusers.ControlNetModel.from_pretrained(
            locate(controlnet_name(settings, technique), technique),
            dtype=dtype_of(settings),
            use_safetensors=True,
        ).to(device_of(settings))
        pipeline = diffusers.StableDiffusionControlNetPipeline(
            **pipeline.components, controlnet=controlnet, requires_safety_checker=False
        )
    if sampling.scheduler != "default":
        name, options = SCHEDULERS[sampling.scheduler]
        scheduler = getattr(diffusers, name)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
    if settings.attention == "xformers":
        _use_xformers(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _use_xformers(pipeline: "diffusers.StableDiffusionPipeline") -> None:
    try:
        pipeline.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"attention: xformers does not work here ({reason}); choose auto or sdpa, or the "
            "versions of environment.yml"
        ) from error
