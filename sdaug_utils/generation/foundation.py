"""A text-to-image pipeline by name: the shipped miniature, a local diffusers folder, a hub id.

diffusers and transformers take seconds to import. This happens where a pipeline is loaded, so that
whoever only needs a key of the store does not wait.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    """The folder of a model: of a pipeline or, for a ``part`` ``controlnet-...``, of a ControlNet.

    ``miniature`` is the shipped model; the parts ``controlnet-...`` are its ControlNets. A local
    folder may be relative to the project. A hub id may end in ``@`` and a revision; without one it
    is the main branch. What the hub's cache lacks is downloaded, safetensors only.
    Raises InputError if there is no such folder, or neither the cache nor the hub has the model.
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
            if part or constants.HF_HUB_OFFLINE:  # download() knows neither
                return Path(snapshot_download(identifier, **wanted))
            return _pipeline_from_hub(identifier, revision)
        except Exception:  # of any kind: a firewall's time-out is no OSError
            return Path(snapshot_download(identifier, local_files_only=True, **wanted))
    except Exception as error:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"model '{name}': not in {constants.HF_HUB_CACHE} and not to be had from the hub: run "
            f"'hf download {identifier}{at}' where there is internet"
        ) from error


def _pipeline_from_hub(identifier: str, revision: str) -> Path:
    """Download those files of a pipeline that it needs; log nothing if the hub is away."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        arguments = {"revision": revision or None, "use_safetensors": True}
        return Path(DiffusionPipeline.download(identifier, **arguments))
    finally:
        logging.set_verbosity(verbosity)


@cache
def revision(name: str, part: str = "") -> str:
    """What identifies weights, for the store's keys: a digest of files, or the hub's commit.

    The ControlNets beside a pipeline do not count: its images do not depend on them.
    Raises InputError if there is no such folder, or a file of the miniature is missing or corrupt.
    """
    folder = locate(name, part)
    if folder.parent.name == "snapshots":
        return folder.name  # the hub's commit
    if name == "miniature":
        checksums = verify_checksums(MINIATURE_WEIGHTS)
    else:
        needed = "config.json" if part else "model_index.json"
        if not (folder / needed).exists():
            raise InputError(f"{_key(part)}: '{name}': a folder without {needed}")
        files = [path for path in folder.rglob("*") if path.is_file()]
        checksums = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    if name == "miniature" and part:
        own = [file for file in checksums if file.startswith(f"{part}/")]
    else:
        own = [file for file in checksums if not file.startswith("controlnet-")]
    return digest_of("\n".join(f"{file} {checksums[file]}" for file in sorted(own)).encode())


def resolved(name: str, part: str = "") -> str:
    """A model's name for tables; a hub id with its present commit."""
    folder, identifier = locate(name, part), name.partition("@")[0]
    return f"{identifier}@{folder.name}" if folder.parent.name == "snapshots" else name


def check(settings: Settings) -> None:
    """Check what only the models and this machine can tell; nothing is loaded.

    Raises InputError if the VAE does not divide the resolution, or if this machine has not got the
    device, a compiler or the attention.
    """
    config = json.loads((locate(settings.foundation) / "vae" / "config.json").read_text())
    factor = max(8, 2 ** (len(config["block_out_channels"]) - 1))  # diffusers requires 8
    if settings.sampling.resolution % factor:
        raise InputError(
            f"sampling.resolution: {settings.sampling.resolution} is no multiple of {factor}, by "
            f"which the VAE of '{settings.foundation}' makes images smaller"
        )
    is_gpu = settings.device in ("cuda", "mps")
    if is_gpu and not torch.get_device_module(settings.device).is_available():
        raise InputError(f"device: there is no '{settings.device}' here: choose auto or cpu")
    if settings.compile and not any(map(shutil.which, COMPILERS)):
        raise InputError(f"compile: there is no compiler here: none of {', '.join(COMPILERS)}")
    if settings.attention == "xformers":
        with _explaining_xformers("load"):
            import xformers.ops  # noqa: F401


@contextmanager
def _explaining_xformers(verb: str) -> Iterator[None]:
    """Make an InputError of any error: xformers is compiled against one version of torch."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"attention: xformers does not {verb} here ({' '.join(str(error).split())[:120]}); "
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


def is_distilled(pipeline: Pipeline) -> bool:
    """Whether the U-Net has learnt to guide in one pass instead of two (Meng et al., CVPR 2023).

    Such a U-Net is given the guidance scale; diffusers' pipelines see to that.
    """
    return pipeline.unet.config.time_cond_proj_dim is not None


def scale_condition(pipeline: Pipeline, count: int) -> torch.Tensor | None:
    """What a distilled U-Net is trained with, (count, width); None for any other.

    It is guidance scale 1, no guidance. diffusers embeds ``scale - 1``, hence zeros.
    """
    if not is_distilled(pipeline):
        return None
    width = pipeline.unet.config.time_cond_proj_dim
    embedded = pipeline.get_guidance_scale_embedding(torch.zeros(count), embedding_dim=width)
    return embedded.to(pipeline.device)


def compile_if_asked(settings: Settings, network: Any) -> None:
    """Have a network compiled at its first call, if the profile says so.

    A deep copy has to be compiled again, which torch's cache makes fast.
    """
    if settings.compile:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        network.compile(dynamic=False)


_logged = set[str]()


def _is_new(record: LogRecord) -> bool:
    """Whether a message is logged for the first time."""
    message = record.getMessage()
    is_new = message not in _logged
    _logged.add(message)
    return is_new


def load_pipeline(
    settings: Settings,
    sampling: Sampling | None = None,
    kind: str = "StableDiffusionPipeline",
    **parts: Any,
) -> Pipeline:
    """The text-to-image pipeline of a profile, in evaluation mode on its device.

    ``sampling`` names its scheduler, by default as in the settings; ``kind`` is its class in
    diffusers, which may need further networks as ``parts``.
    Raises InputError as :func:`revision` does, or if xformers is asked for and does not work here.
    """
    revision(settings.foundation)  # raises if files are missing or corrupt
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # It warns of how a new token's embedding is initialised, though the learnt one follows at once.
    transformers.utils.logging.set_verbosity_error()
    pipeline = (
        getattr(diffusers, kind)
        .from_pretrained(
            locate(settings.foundation),
            dtype=dtype_of(settings),
            use_safetensors=True,
            requires_safety_checker=False,
            **({} if settings.sampling.safety_checker else {"safety_checker": None}),
            **parts,
        )
        .to(device_of(settings))
    )
    for network in (pipeline.vae, pipeline.unet, *parts.values()):
        if pipeline.device.type == "cuda":  # where convolutions are fastest so
            network.to(memory_format=torch.channels_last)
        if network is not pipeline.vae:
            compile_if_asked(settings, network)
    # It warns of a prompt too long for the text encoder at each of thousands of passes.
    getLogger(type(pipeline).__module__).addFilter(_is_new)
    scheduler = (sampling or settings.sampling).scheduler
    if scheduler != "default":
        name, options = SCHEDULERS[scheduler]
        chosen = getattr(diffusers, name)
        pipeline.scheduler = chosen.from_config(pipeline.scheduler.config, **options)
    if settings.attention == "xformers":
        with _explaining_xformers("work"):
            pipeline.enable_xformers_memory_efficient_attention()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
