"""DreamBooth: fine-tune the U-Net on a few images of a subject (Ruiz et al., CVPR 2023)."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file

from sdaug_utils.compute import Batch
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import Pipeline
from sdaug_utils.generation.personalisation import (
    MixedPrecision,
    NoisyLatents,
    Personalised,
    encode_images,
    seed_of,
    token_ids,
)
from sdaug_utils.generation.pools import grow, pipeline_sampler
from sdaug_utils.generation.technique import Request, pool_spec, twin
from sdaug_utils.params import Parameters, Settings
from sdaug_utils.registry import register
from sdaug_utils.store import Spec
from sdaug_utils.study import Study


class DreamBoothSettings(Parameters):
    """Fine-tuning of the U-Net (thesis, table 4.2)."""

    instance_prompt: str
    class_prompt: str
    prior_loss_weight: float = Field(ge=0)
    num_class_images: int = Field(ge=0)
    num_input_images: int = Field(ge=1, le=5)
    train_batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_train_steps: int = Field(ge=1)
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"  # 8 bit: another treatment, less memory
    gradient_checkpointing: bool = False  # less memory, more time, the same model
    keep_models: bool = True  # else a fine-tuned U-Net goes once the images asked for are made

    @model_validator(mode="after")
    def _prior_has_images(self) -> "DreamBoothSettings":
        if self.prior_loss_weight > 0 and self.num_class_images == 0:
            raise ValueError("num_class_images must be positive when prior_loss_weight is")
        return self


@register
class DreamBooth(Personalised):
    """All weights of the U-Net, with prior preservation as an option."""

    name, label, colour, marker = "dreambooth", "DreamBooth", "#c44e52", "v"
    section: ClassVar[tuple[str, type[Parameters]]] = ("dreambooth", DreamBoothSettings)
    model_bytes: ClassVar = 1.72e9  # in half precision

    def recipe(self, settings: Settings) -> DreamBoothSettings:
        """The hyper-parameters of table 4.2."""
        return settings.dreambooth

    def num_inputs(self, settings: Settings) -> tuple[str, int]:
        """As DreamBooth's section says, for adapters, too."""
        return "dreambooth.num_input_images", self.recipe(settings).num_input_images

    def noun(self, settings: Settings, class_name: str) -> str:
        """The token that the model was taught."""
        return self.recipe(settings).instance_prompt

    def unusual(self, settings: Settings) -> dict[str, Any]:
        """Another optimiser makes another model."""
        optimizer = self.recipe(settings).optimizer
        return {} if optimizer == "adamw" else {"optimizer": optimizer}

    def model(
        self,
        settings: Settings,
        inputs: Sequence[np.ndarray],
        draw: int,
        class_images: Spec | None = None,
    ) -> Spec:
        """With prior preservation, the class images count."""
        if self.recipe(settings).prior_loss_weight > 0:
            class_images = class_images_spec(settings, self.recipe(settings), draw)
        return super().model(settings, inputs, draw, class_images)

    def keeps_models(self, settings: Settings) -> bool:
        """As the settings say: a fine-tuned U-Net of full size takes 1.7 GB."""
        return self.recipe(settings).keep_models

    def learn(
        self,
        study: Study,
        pipeline: Pipeline,
        requests: Sequence[Request],
        folders: Sequence[Path],
        label: str | None,
    ) -> None:
        """One model after the other."""
        recipe = self.recipe(study.settings)
        for request, folder in zip(requests, folders, strict=True):
            unet = dreambooth(
                pipeline,
                request.inputs,
                class_images(study, recipe, request.spec["draw"], pipeline),
                recipe,
                study.settings.sampling.resolution,
                seed_of(request),
                partial(self.unfreeze, study.settings),
                study.settings.training_precision == "mixed",
            )
            self.save(pipeline, unet, folder)

    def unfreeze(self, settings: Settings, unet: torch.nn.Module, seed: int) -> None:
        """Choose the weights that learn, or add them."""
        unet.requires_grad_(True)

    def save(self, pipeline: Pipeline, unet: torch.nn.Module, folder: Path) -> None:
        """What :meth:`apply` needs."""
        unet.eval().half().save_pretrained(folder / "unet")  # type: ignore[operator]

    def apply(self, pipeline: Pipeline, folder: Path | None) -> Pipeline:
        """With the fine-tuned U-Net."""
        assert folder is not None
        unet = copy.deepcopy(pipeline.unet)
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        unet.load_state_dict(weights)
        return twin(pipeline, unet=unet)

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        """Latents that the U-Net sees."""
        recipe = self.recipe(settings)
        size = recipe.train_batch_size * (1 + (recipe.prior_loss_weight > 0))
        return "latent, fine-tuning of the U-Net", recipe.max_train_steps * size


def class_images_spec(settings: Settings, recipe: DreamBoothSettings, draw: int) -> dict[str, Any]:
    """The pool of what the model itself makes of the class prompt."""
    return pool_spec(settings, "class-images", "prior", recipe.class_prompt, draw)


def class_images(
    study: Study, recipe: DreamBoothSettings, draw: int, pipeline: Pipeline
) -> Sequence[np.ndarray]:
    """What the model itself makes of DreamBooth's class prompt, for prior preservation."""
    if recipe.prior_loss_weight == 0:
        return []
    sampling = study.settings.sampling
    side = {"height": sampling.resolution, "width": sampling.resolution}
    pool = grow(
        study.store,
        class_images_spec(study.settings, recipe, draw),
        range(recipe.num_class_images),
        lambda: pipeline_sampler(pipeline, recipe.class_prompt, sampling, lambda indices: side),
        Batch(sampling.batch_size, "sampling.batch_size"),
        sampling.max_attempts,
    )
    return pool.images()


def dreambooth(
    pipeline: Pipeline,
    images: Sequence[np.ndarray],
    class_images: Sequence[np.ndarray],
    settings: DreamBoothSettings,
    resolution: int,
    seed: int,
    unfreeze: Callable[[torch.nn.Module, int], None],
    mixed_precision: bool = False,
) -> torch.nn.Module:
    """Fine-tune a copy of the U-Net on images of a subject and return it.

    Args:
        pipeline: left as it was.
        images: 8-bit RGB arrays (height, width, 3) of the subject.
        class_images: what the model made of ``class_prompt``, for prior preservation; may be
            empty when ``prior_loss_weight`` is 0.
        resolution: side of the square training images, in pixels.
        unfreeze: chooses the weights that learn, or adds them, given the U-Net and the seed.
        mixed_precision: passes in half precision, weights in single precision.

    Raises:
        InputError: the 8-bit optimiser is asked for and bitsandbytes does not work here.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scale = pipeline.vae.config.scaling_factor
    prior = settings.prior_loss_weight > 0
    instances = NoisyLatents(encode_images(pipeline, images, resolution), scheduler, scale, seed)
    if prior:
        encoded = encode_images(pipeline, class_images, resolution)
        class_examples = NoisyLatents(encoded, scheduler, scale, seed + 1)
    with torch.no_grad():
        prompts = [settings.instance_prompt, settings.class_prompt]
        tokens = token_ids(pipeline.tokenizer, prompts, pipeline.device)
        embeddings = pipeline.text_encoder(tokens)[0]

    unet = copy.deepcopy(pipeline.unet).float().train().requires_grad_(False)
    unfreeze(unet, seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = _adamw(settings.optimizer)(weights, lr=settings.learning_rate, weight_decay=1e-2)
    precision = MixedPrecision(pipeline.device, mixed_precision)
    size = settings.train_batch_size
    for _ in range(settings.max_train_steps):
        noisy, timesteps, target = instances(size)
        condition = embeddings[:1].expand(size, -1, -1)
        if prior:
            examples = zip((noisy, timesteps, target), class_examples(size), strict=True)
            noisy, timesteps, target = (torch.cat(pair) for pair in examples)
            condition = embeddings.repeat_interleave(size, dim=0)
        with precision.autocast():
            prediction = unet(noisy, timesteps, condition.float()).sample.float()
        loss = F.mse_loss(prediction[:size], target[:size])
        if prior:
            prior_loss = F.mse_loss(prediction[size:], target[size:])
            loss = loss + settings.prior_loss_weight * prior_loss
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
    return unet


def _adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "dreambooth.optimizer: adamw-8bit needs bitsandbytes and a GPU that it knows "
            "('pip install bitsandbytes'); or choose adamw"
        ) from error
    return AdamW8bit
