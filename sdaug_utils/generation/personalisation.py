"""Teaching the foundation model a subject from a few images: what such techniques share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from sdaug_utils.compute import device_of, dtype_name, half_precision
from sdaug_utils.data.images import digests
from sdaug_utils.generation.foundation import Pipeline, revision
from sdaug_utils.generation.technique import Request, Technique
from sdaug_utils.lazy import torch
from sdaug_utils.params import Settings
from sdaug_utils.store import digest
from sdaug_utils.study import Study

CODE_VERSION = 1
ENCODED_AT_ONCE = 8  # images: class images are many
NOT_OF_THE_MODEL = {
    "num_input_images",  # the inputs themselves are
    "subjects_at_once",
    "gradient_checkpointing",
    "keep_models",
    "optimizer",  # only where it is not the usual one
}


class Personalised(Technique):
    """A technique that learns a model from the first images of a class's subset.

    Its section of the settings has ``num_input_images``. Models are keyed by what they learn from,
    not by whom they are for: subjects with the same inputs share one.
    """

    inputs: ClassVar[Literal["none", "first", "all"]] = "first"
    learns: ClassVar = True
    image_cost: ClassVar = "image of a personalised model"
    model_bytes: ClassVar[float] = 0  # of a model of Stable Diffusion 1.5's size, if it is large

    def recipe(self, settings: Settings) -> Any:
        """The hyper-parameters of learning."""
        return self.of(settings)

    def unusual(self, settings: Settings) -> dict[str, Any]:
        """What makes its models another treatment than the paper's own."""
        return {}

    def at_once(self, settings: Settings) -> int:
        """How many models learn in one go."""
        return 1

    def keeps_models(self, settings: Settings) -> bool:
        """Whether a model stays in the store when its images are made."""
        return True

    def learn(
        self,
        study: Study,
        pipeline: Pipeline,
        requests: Sequence[Request],
        folders: Sequence[Path],
        stepped: Callable[[], object] = lambda: None,
    ) -> None:
        """Learn the model of each request and save it in its folder.

        ``pipeline`` stays as it was; ``stepped`` is called after each update. With mixed precision
        passes are in half precision, weights in single precision.
        """
        raise NotImplementedError

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        """What learning a model costs: a key of the plan's rates, and how many of it."""
        raise NotImplementedError

    def num_inputs(self, settings: Settings) -> tuple[str, int]:
        """How many images a model learns from, with the name of the parameter that says so."""
        assert self.section is not None
        return f"{self.section[0]}.num_input_images", self.of(settings).num_input_images

    def model(self, settings: Settings, inputs: Sequence[np.ndarray], draw: int) -> dict[str, Any]:
        """What determines a model: inputs, foundation, hyper-parameters."""
        unusual = self.unusual(settings)
        if settings.training_precision == "mixed":
            unusual["precision"] = f"torch.{half_precision(settings)}"
        return {
            "version": CODE_VERSION,
            "technique": self.model_folder,
            "foundation": revision(settings.foundation),
            "dtype": f"torch.{dtype_name(settings)}",
            "settings": self.recipe(settings).model_dump(exclude=NOT_OF_THE_MODEL),
            "resolution": settings.sampling.resolution,
            "class_images": None,
            "inputs": digests(inputs),
            "draw": draw,
            **unusual,
        }

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
        self.mean, self.std = encode_images(pipeline, images, resolution)
        self.generator = torch.Generator().manual_seed(seed)

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
        if config.prediction_type == "v_prediction":
            return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, timesteps, noise


def encode_images(
    pipeline: Pipeline, images: Sequence[np.ndarray], resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of 8-bit RGB images, resized to a square."""
    side, smooth = (resolution, resolution), Image.Resampling.BILINEAR
    squares = [np.asarray(Image.fromarray(image).resize(side, smooth)) for image in images]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        encoded = [
            pipeline.vae.encode(part.to(pipeline.device, pipeline.dtype)).latent_dist
            for part in pixels.split(ENCODED_AT_ONCE)
        ]
    means, deviations = [x.mean.float() for x in encoded], [x.std.float() for x in encoded]
    return torch.cat(means), torch.cat(deviations)


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
