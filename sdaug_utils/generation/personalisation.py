"""Teaching the foundation model a subject from a few images: what such techniques share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from sdaug_utils.compute import device_of, dtype_name, half_precision
from sdaug_utils.data.images import digests
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import Pipeline, revision
from sdaug_utils.generation.technique import Request, Section, Technique
from sdaug_utils.lazy import torch
from sdaug_utils.params import Settings
from sdaug_utils.store import digest
from sdaug_utils.study import Study

CODE_VERSION = 1
ENCODED_AT_ONCE = 8  # images: class images are many
NOT_OF_THE_MODEL = {
    "num_input_images",  # the inputs themselves determine it
    "subjects_at_once",
    "gradient_checkpointing",
    "keep_models",
    "optimizer",  # in extra_model_spec, if it is not the usual one
}


class Personalised(Technique):
    """A technique that learns a model from the first images of a class's subset.

    Models are keyed by what they learn from, not by whom they are for: subjects with the same
    inputs share one.
    """

    section: ClassVar[Section]
    learning_section: ClassVar[str]  # of the settings, with num_input_images
    inputs: ClassVar[Literal["none", "first", "all"]] = "first"
    learns = True
    image_cost = "image of a personalised model"
    model_bytes: ClassVar[float] = 0  # of a model of Stable Diffusion 1.5's size, if it is large

    def recipe(self, settings: Settings) -> Any:
        """The hyper-parameters of learning."""
        return getattr(settings, self.learning_section)

    def num_inputs(self, settings: Settings) -> int:
        """How many images a model learns from."""
        return self.recipe(settings).num_input_images

    def at_once(self, settings: Settings) -> int:
        """How many models learn in one batch."""
        return 1

    def keeps_models(self, settings: Settings) -> bool:
        """Whether a model stays in the store when its images are made."""
        return True

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        """What learning a model costs: a key of the plan's rates, and how many of it."""
        raise NotImplementedError

    def learn(
        self, study: Study, pipeline: Pipeline, requests: Sequence[Request], folders: Sequence[Path]
    ) -> None:
        """Learn the model of each request and save it in its folder; ``pipeline`` is not changed.

        With mixed precision passes are in half precision, weights in single precision.
        """
        raise NotImplementedError

    def extra_model_spec(self, settings: Settings, draw: int) -> dict[str, Any]:
        """What else determines a model."""
        return {}

    def model_spec(
        self, settings: Settings, inputs: Sequence[np.ndarray], draw: int
    ) -> dict[str, Any]:
        """What determines a model: inputs, foundation, hyper-parameters."""
        spec = {
            "version": CODE_VERSION,
            "technique": self.model_folder,
            "foundation": revision(settings.foundation),
            "dtype": f"torch.{dtype_name(settings)}",
            "settings": self.recipe(settings).model_dump(exclude=NOT_OF_THE_MODEL),
            "resolution": settings.sampling.resolution,
            "class_images": None,  # DreamBooth has some
            "inputs": digests(inputs),
            "draw": draw,
        }
        if settings.training_precision == "mixed":
            spec["precision"] = f"torch.{half_precision(settings)}"
        return spec | self.extra_model_spec(settings, draw)

    def seed(self, request: Request) -> int:
        """The seed that a request's model learns with."""
        return int(digest(request.model)[:12], 16)


class NoisyLatents:
    """Draws training examples for the U-Net from a few images, from a seed of its own."""

    def __init__(
        self, pipeline: Pipeline, images: Sequence[np.ndarray], resolution: int, seed: int
    ) -> None:
        """Encode 8-bit RGB images (height, width, 3), resized to a square of ``resolution``."""
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.scale = pipeline.vae.config.scaling_factor
        self.generator = torch.Generator().manual_seed(seed)
        side, smooth = (resolution, resolution), Image.Resampling.BILINEAR
        squares = [np.asarray(Image.fromarray(image).resize(side, smooth)) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            encoded = [
                pipeline.vae.encode(part.to(pipeline.device, pipeline.dtype)).latent_dist
                for part in pixels.split(ENCODED_AT_ONCE)
            ]
        self.mean = torch.cat([latents.mean.float() for latents in encoded])
        self.std = torch.cat([latents.std.float() for latents in encoded])

    def __call__(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps and the target of the model's prediction."""
        device, config = self.mean.device, self.scheduler.config

        def normal() -> torch.Tensor:
            shape = (batch_size, *self.mean.shape[1:])
            return torch.randn(shape, generator=self.generator).to(device)

        def integers(below: int) -> torch.Tensor:
            return torch.randint(below, (batch_size,), generator=self.generator).to(device)

        rows = integers(len(self.mean))
        latents = self.scale * (self.mean[rows] + self.std[rows] * normal())
        noise, timesteps = normal(), integers(config.num_train_timesteps)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if config.prediction_type == "epsilon":
            return noisy, timesteps, noise
        if config.prediction_type == "v_prediction":
            return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)
        raise InputError(
            f"foundation: its U-Net predicts '{config.prediction_type}': only one that predicts "
            "epsilon or v can be personalised"
        )


def token_ids(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
    """Prompts as (n, length) tokens, padded to the tokenizer's length."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


class Precision:
    """Single precision, or mixed: passes in half precision and a loss that is scaled if need be."""

    def __init__(self, settings: Settings) -> None:
        mixed, device = settings.training_precision == "mixed", device_of(settings)
        half = getattr(torch, half_precision(settings)) if mixed else None
        self.autocast = torch.autocast(device.type, half, enabled=mixed)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
