"""Teaching the foundation model a subject from a few images: what such techniques share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdaug_utils.compute import device_of, dtype_of, half_precision
from sdaug_utils.data.images import digests
from sdaug_utils.generation.foundation import Pipeline, revision
from sdaug_utils.generation.technique import Request, Technique
from sdaug_utils.params import Settings
from sdaug_utils.store import Spec, digest
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

    inputs: ClassVar = "first"
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
        label: str | None,
    ) -> None:
        """Learn the model of each request and save it in its folder; ``label`` names progress."""
        raise NotImplementedError

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        """What learning a model costs: a key of the plan's rates, and how many of it."""
        raise NotImplementedError

    def num_inputs(self, settings: Settings) -> tuple[str, int]:
        """How many images a model learns from, with the name of the parameter that says so."""
        assert self.section is not None
        return f"{self.section[0]}.num_input_images", self.of(settings).num_input_images

    def model(
        self,
        settings: Settings,
        inputs: Sequence[np.ndarray],
        draw: int,
        class_images: Spec | None = None,
    ) -> Spec:
        """What determines a model: inputs, foundation, hyper-parameters."""
        unusual = self.unusual(settings)
        if settings.training_precision == "mixed":
            unusual["precision"] = str(half_precision(device_of(settings)))
        return {
            "version": CODE_VERSION,
            "technique": self.name,
            "foundation": revision(settings.foundation),
            "dtype": str(dtype_of(settings)),
            "settings": self.recipe(settings).model_dump(exclude=NOT_OF_THE_MODEL),
            "resolution": settings.sampling.resolution,
            "class_images": digest(class_images) if class_images else None,
            "inputs": digests(inputs),
            "draw": draw,
            **unusual,
        }


def seed_of(request: Request) -> int:
    """The seed that a request's model learns with."""
    assert request.model is not None
    return int(digest(request.model)[:12], 16)


@torch.no_grad()
def encode_images(
    pipeline: Pipeline, images: Sequence[np.ndarray], resolution: int
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of 8-bit RGB images, resized to a square."""
    squares = [
        np.asarray(
            Image.fromarray(image).resize((resolution, resolution), Image.Resampling.BILINEAR)
        )
        for image in images
    ]
    levels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    pixels = levels.float() / 127.5 - 1
    means, deviations = [], []
    for part in pixels.split(ENCODED_AT_ONCE):
        latents = pipeline.vae.encode(part.to(pipeline.device, pipeline.dtype)).latent_dist
        means.append(latents.mean.float())
        deviations.append(latents.std.float())
    return torch.cat(means), torch.cat(deviations)


class NoisyLatents:
    """Draws training examples for the U-Net from a few encoded images, from a seed of its own."""

    def __init__(
        self,
        latents: tuple[Tensor, Tensor],
        scheduler: Any,
        scale: float,
        seed: int,
    ) -> None:
        self.mean, self.std = latents
        self.scheduler, self.scale = scheduler, scale
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and the target of the model's prediction."""

        def normal() -> Tensor:
            shape = (batch_size, *self.mean.shape[1:])
            return torch.randn(shape, generator=self.generator).to(self.mean.device)

        rows = torch.randint(len(self.mean), (batch_size,), generator=self.generator)
        rows = rows.to(self.mean.device)
        latents = self.scale * (self.mean[rows] + self.std[rows] * normal())
        noise = normal()
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (batch_size,), generator=self.generator
        ).to(self.mean.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            return noisy, timesteps, self.scheduler.get_velocity(latents, noise, timesteps)
        return noisy, timesteps, noise


def token_ids(tokenizer: Any, prompts: Sequence[str], device: torch.device) -> Tensor:
    """Prompts as (n, length) tokens, padded to the tokenizer's length."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.to(device)


class MixedPrecision:
    """Passes in half precision where it is asked for; weights stay in single precision."""

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.half = half_precision(device) if enabled else None
        self.device, self.enabled = device.type, enabled
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.half == torch.float16)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device, self.half, enabled=self.enabled)
