"""A text-to-image pipeline by name: the shipped miniature, a local diffusers folder, a hub id.

diffusers and transformers take seconds to import: they are, where a pipeline is loaded, so that
whoever only needs a key of the store does not wait for them.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

from sdaug_utils.compute import device_of, dtype_of
from sdaug_utils.errors import InputError
from sdaug_utils.lazy import torch
from sdaug_utils.params import Sampling, Settings
from sdaug_utils.store import digest_of, sha256, verify_checksums

Pipeline = Any  # of diffusers: StableDiffusionPipeline or one of its kind
COMPILERS = ("g++", "clang++", "c++", "cl")  # that torch.compile looks for
RECOMPILE_LIMIT = 64  # torch's default is 8; each shape and kind of pass needs one
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w.-]+)?"
PROJECT = Path(__file__).parents[2]
MINIATURE_WEIGHTS = PROJECT / "miniature" / "weights"
SCHEDULERS: dict[str, tuple[str, dict[str, bool]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def locate(name: str, part: str = "") -> Path:
    """The folder that ``from_pretrained`` is to load: a pipeline, or a ``part`` that goes with it.

    ``miniature`` is the shipped model; the parts ``controlnet-...`` are its ControlNets. A local
    folder may be relative to the project. A hub id may end in ``@`` and a revision; without one it
    is the main branch. What the hub's cache lacks is downloaded, safetensors only.

    Raises:
        InputError: no such folder; not in the hub's cache, and the hub has not got it either.
    """
    if name == "miniature":
        return MINIATURE_WEIGHTS / part
    if (PROJECT / name).is_dir():
        return PROJECT / name
    if re.fullmatch(HUB_ID, name):
        return _from_hub(name, part)
    raise InputError(f"{_key(part)}: '{name}' is neither 'miniature' nor a folder nor a hub id")


def _key(part: str) -> str:
    """The parameter that names a model."""
    return part.replace("-", ".", 1) or "foundation"


@cache
def _from_hub(name: str, part: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    identifier, _, revision = name.partition("@")
    wanted: dict[str, Any] = {"revision": revision or None}
    if part:
        wanted["allow_patterns"] = ["config.json", "diffusion_pytorch_model.safetensors"]
    try:
        try:
            if not (part or constants.HF_HUB_OFFLINE):
                return _pipeline_from_hub(identifier, revision)
            folder = snapshot_download(identifier, **wanted)
        except Exception:  # of any kind: a firewall's time-out is no OSError
            folder = snapshot_download(identifier, local_files_only=True, **wanted)
    except Exception as error:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"model '{name}': not in {constants.HF_HUB_CACHE} and not to be had from the hub: run "
            f"'hf download {identifier}{at}' where there is internet"
        ) from error
    return Path(folder)


def _pipeline_from_hub(identifier: str, revision: str) -> Path:
    """The folder of a pipeline, downloaded as far as it is needed; silent if the hub is away."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder = DiffusionPipeline.download(
            identifier, revision=revision or None, use_safetensors=True
        )
    finally:
        logging.set_verbosity(verbosity)
    return Path(folder)


@cache
def revision(name: str, part: str = "") -> str:
    """What identifies weights, for the store's keys: a digest of files, or the hub's commit.

    The ControlNets beside a pipeline do not count: its images do not depend on them.

    Raises:
        InputError: a weight file of the miniature is missing or corrupt; no such folder.
    """
    folder = locate(name, part)
    if folder.parent.name == "snapshots":
        return folder.name  # the hub's commit
    if name == "miniature":
        every = verify_checksums(MINIATURE_WEIGHTS)
    else:
        needed = "config.json" if part else "model_index.json"
        if not (folder / needed).exists():
            raise InputError(f"{_key(part)}: '{name}': a folder without {needed}")
        files = [path for path in folder.rglob("*") if path.is_file()]
        every = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    if part and name == "miniature":
        own = {k: v for k, v in every.items() if k.startswith(f"{part}/")}
    else:
        own = {k: v for k, v in every.items() if not k.startswith("controlnet-")}
    return digest_of("\n".join(f"{key} {value}" for key, value in sorted(own.items())).encode())


def check(settings: Settings) -> None:
    """Check what only the models and this machine can tell; nothing is loaded.

    Raises:
        InputError: a resolution that the VAE does not divide; a device, a compiler or an attention
            that this machine has not got.
    """
    config = json.loads((locate(settings.foundation) / "vae" / "config.json").read_text())
    factor = max(8, 2 ** (len(config["block_out_channels"]) - 1))  # of 8: diffusers' pipelines
    if settings.sampling.resolution % factor:
        raise InputError(
            f"sampling.resolution: {settings.sampling.resolution} is no multiple of {factor}, by "
            f"which the VAE of '{settings.foundation}' makes images smaller"
        )
    is_there: dict[str, Callable[[], bool]] = {
        "cuda": lambda: torch.cuda.is_available(),
        "mps": lambda: torch.backends.mps.is_available(),
    }
    if settings.device in is_there and not is_there[settings.device]():
        raise InputError(f"device: there is no '{settings.device}' here: choose auto or cpu")
    if settings.compile and not any(map(shutil.which, COMPILERS)):
        raise InputError(f"compile: there is no compiler here: none of {', '.join(COMPILERS)}")
    if settings.attention == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except Exception as error:  # of any kind: it is compiled against one version of torch
            raise InputError(
                f"attention: xformers does not load here ({' '.join(str(error).split())[:120]}); "
                "choose auto or sdpa, or the versions of environment.yml"
            ) from error


@cache
def vocabulary(name: str) -> frozenset[str]:
    """The tokens that a model's text encoder knows; ``</w>`` ends a word."""
    folder = locate(name) / "tokenizer"
    if (folder / "vocab.json").exists():
        return frozenset(json.loads((folder / "vocab.json").read_text()))
    whole = json.loads((folder / "tokenizer.json").read_text())
    added = [token["content"] for token in whole.get("added_tokens", [])]
    return frozenset([*whole["model"]["vocab"], *added])


def resolved(name: str, part: str = "") -> str:
    """A model's name with what it is at the moment: a hub id with its commit, as tables show it."""
    folder = locate(name, part)
    is_snapshot = folder.parent.name == "snapshots"
    return f"{name.partition('@')[0]}@{folder.name}" if is_snapshot else name


def takes_scale(pipeline: Pipeline) -> bool:
    """Whether guidance is folded into the U-Net, so that one pass does what else takes two.

    Such a U-Net is told the scale (Meng et al., CVPR 2023); diffusers' pipelines see to that.
    """
    return pipeline.unet.config.time_cond_proj_dim is not None


def scale_condition(pipeline: Pipeline, count: int, scale: float = 1.0) -> Any:
    """What such a U-Net is told of the guidance scale, (count, width); None for any other.

    A model that learns is trained at scale 1, which is no guidance.
    """
    if not takes_scale(pipeline):
        return None
    width = pipeline.unet.config.time_cond_proj_dim
    embedded = pipeline.get_guidance_scale_embedding(
        torch.full((count,), scale - 1.0), embedding_dim=width
    )
    return embedded.to(pipeline.device)


def compiled(settings: Settings, network: Any) -> Any:
    """The same network, compiled when it is first called, if a profile says so.

    The whole of it, not block by block. A copy has to be told again, and finds the code that was
    made for the first.
    """
    if settings.compile:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        network.compile(dynamic=False)
    return network


def to_channels_last(network: Any) -> Any:
    """The same network with its weights where a GPU's convolutions are fastest."""
    if network.device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    return network


_TOLD = set[str]()


def _not_told(record: LogRecord) -> bool:
    """Let a message pass once."""
    message = record.getMessage()
    is_new = message not in _TOLD
    _TOLD.add(message)
    return is_new


def load_pipeline(
    settings: Settings,
    sampling: Sampling | None = None,
    kind: str = "StableDiffusionPipeline",
    **parts: Any,
) -> Pipeline:
    """The text-to-image pipeline of a profile, in evaluation mode on its device.

    Args:
        sampling: whose scheduler it gets; by default that of the settings.
        kind: another class of diffusers that works with the same parts ...
        parts: ... and these.

    Raises:
        InputError: as :func:`revision`; xformers is asked for and does not work here.
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
    compiled(settings, to_channels_last(pipeline.unet))
    to_channels_last(pipeline.vae)
    if kind != type(pipeline).__name__:
        every = pipeline.components | parts
        pipeline = getattr(diffusers, kind)(**every, requires_safety_checker=False)
    # It tells of a prompt too long for the text encoder, at each of thousands of passes.
    getLogger(type(pipeline).__module__).addFilter(_not_told)
    scheduler = (sampling or settings.sampling).scheduler
    if scheduler != "default":
        name, options = SCHEDULERS[scheduler]
        chosen = getattr(diffusers, name)
        pipeline.scheduler = chosen.from_config(pipeline.scheduler.config, **options)
    if settings.attention == "xformers":
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ImportError, NotImplementedError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"attention: xformers does not work here ({reason}); choose auto or sdpa, or the "
                "versions of environment.yml"
            ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
