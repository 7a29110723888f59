"""DreamBooth: fine-tune the U-Net on a few images of a subject (Ruiz et al., CVPR 2023)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from sdaug_utils.compute import Batch
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import Pipeline, compile_if_asked, scale_condition
from sdaug_utils.generation.personalisation import NoisyLatents, Personalised, Precision, token_ids
from sdaug_utils.generation.pools import Sampler, grow, pipeline_sampler
from sdaug_utils.generation.technique import Request, Section, pool_spec, with_shared_components
from sdaug_utils.lazy import torch
from sdaug_utils.params import Parameters, Settings
from sdaug_utils.store import Spec, digest
from sdaug_utils.study import Study


class DreamBoothSettings(Parameters):
    """Fine-tuning of the U-Net (thesis, table 4.2)."""

    instance_prompt: str = Field(pattern=r"^[^{}]*$")  # a rare word: it stands for {} in prompts
    class_prompt: str
    prior_loss_weight: float = Field(ge=0)
    num_class_images: int = Field(ge=0)
    num_input_images: int = Field(ge=1, le=5)
    train_batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_train_steps: int = Field(ge=1)
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"  # 8 bit: less memory, another model
    gradient_checkpointing: bool = False  # less memory, more time, the same model
    keep_models: bool = True  # else a fine-tuned U-Net is deleted when its images are made

    @model_validator(mode="after")
    def _prior_has_images(self) -> DreamBoothSettings:
        if self.prior_loss_weight > 0 and self.num_class_images == 0:
            raise ValueError("num_class_images must be positive when prior_loss_weight is")
        return self


class DreamBooth(Personalised):
    """All weights of the U-Net, with prior preservation as an option."""

    name, label, colour, marker = "dreambooth", "DreamBooth", "#c44e52", "v"
    section: ClassVar[Section] = ("dreambooth", DreamBoothSettings)
    learning_section = "dreambooth"
    model_bytes = 1.72e9  # in half precision
    latent_cost: ClassVar[str] = "latent, fine-tuning of the U-Net"

    def subject_word(self, settings: Settings, class_name: str) -> str:
        return settings.dreambooth.instance_prompt

    def keeps_models(self, settings: Settings) -> bool:
        return settings.dreambooth.keep_models

    def extra_model_spec(self, settings: Settings, draw: int) -> dict[str, Any]:
        prior, optimizer = self.class_images_spec(settings, draw), settings.dreambooth.optimizer
        return {
            "class_images": digest(prior) if prior else None,
            **({} if optimizer == "adamw" else {"optimizer": optimizer}),
        }

    def class_images_spec(self, settings: Settings, draw: int) -> Spec | None:
        """For prior preservation, if it is on: the pool of images by the class prompt."""
        own = self.recipe(settings)
        if own.prior_loss_weight == 0:
            return None
        return pool_spec(settings, "class-images", "prior", own.class_prompt, draw)

    def class_images(self, study: Study, pipeline: Pipeline, spec: Spec) -> Sequence[np.ndarray]:
        """The images of that pool, 8-bit RGB, made if they are not there."""
        sampling, number = study.settings.sampling, study.settings.dreambooth.num_class_images
        request = Request(study, dict(spec), range(number), self, {}, (), None)

        def sampler() -> Sampler:
            own, arguments = with_shared_components(pipeline), self.arguments(study, request)
            return pipeline_sampler(own, sampling, [spec["prompt"]], [arguments])

        batch = Batch(sampling.batch_size, "sampling.batch_size")
        [pool] = grow(study.store, [request], sampler, batch, sampling.max_attempts)
        return pool.images()

    def learn(
        self, study: Study, pipeline: Pipeline, requests: Sequence[Request], folders: Sequence[Path]
    ) -> None:
        for request, folder in zip(requests, folders, strict=True):
            self.save(pipeline, self.tuned(study, pipeline, request), folder)

    def tuned(
        self, study: Study, pipeline: Pipeline, request: Request, stepped: Callable = lambda: None
    ) -> torch.nn.Module:
        """A copy of the U-Net, fine-tuned on the request's inputs (Ruiz et al., 2023).

        ``stepped`` is called after each update. Raises InputError if the 8-bit optimiser is asked
        for and bitsandbytes does not work here.
        """
        settings, resolution = self.recipe(study.settings), study.settings.sampling.resolution
        seed, size = self.seed(request), settings.train_batch_size
        instances = NoisyLatents(pipeline, request.inputs, resolution, seed)
        prior = self.class_images_spec(study.settings, request.spec["draw"])
        if prior:
            images = self.class_images(study, pipeline, prior)
            class_examples = NoisyLatents(pipeline, images, resolution, seed + 1)
        with torch.no_grad():
            # DataDream's has a {}; DreamBooth's has none.
            named = settings.instance_prompt.replace("{}", request.spec["class"])
            prompts = [named, settings.class_prompt]
            tokens = token_ids(pipeline.tokenizer, prompts, pipeline.device)
            embeddings = pipeline.text_encoder(tokens)[0]

        unet = copy.deepcopy(pipeline.unet).float().train().requires_grad_(False)
        self.unfreeze(study.settings, unet, seed)
        if settings.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        compile_if_asked(study.settings, unet)
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        optimizer = _optimizer(settings, weights)
        precision = Precision(study.settings)
        scale = scale_condition(pipeline, size * (1 + bool(prior)))
        for _ in range(settings.max_train_steps):
            noisy, timesteps, target = instances(size)
            condition = embeddings[:1].expand(size, -1, -1)
            if prior:
                examples = zip((noisy, timesteps, target), class_examples(size), strict=True)
                noisy, timesteps, target = (torch.cat(pair) for pair in examples)
                condition = embeddings.repeat_interleave(size, dim=0)
            with precision.autocast:
                prediction = unet(noisy, timesteps, condition.float(), timestep_cond=scale)
            prediction = prediction.sample.float()
            loss = torch.nn.functional.mse_loss(prediction[:size], target[:size])
            if prior:
                prior_loss = torch.nn.functional.mse_loss(prediction[size:], target[size:])
                loss = loss + settings.prior_loss_weight * prior_loss
            precision.scaler.scale(loss).backward()
            precision.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()
            stepped()
        return unet

    def unfreeze(self, settings: Settings, unet: torch.nn.Module, seed: int) -> None:
        """Choose the weights that learn, or add them."""
        unet.requires_grad_(True)

    def save(self, pipeline: Pipeline, unet: Any, folder: Path) -> None:
        """Write to ``folder`` what :meth:`apply` reads, in half precision to save space."""
        unet.eval().half().save_pretrained(folder / "unet")

    def apply(self, pipeline: Pipeline, folder: Path) -> Pipeline:
        from safetensors.torch import load_file

        unet = copy.deepcopy(pipeline.unet)
        unet.load_state_dict(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
        return with_shared_components(pipeline, unet=unet)

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        recipe = self.recipe(settings)
        size = recipe.train_batch_size * (1 + (recipe.prior_loss_weight > 0))
        return self.latent_cost, recipe.max_train_steps * size


def _optimizer(settings: DreamBoothSettings, weights: list[torch.Tensor]) -> Any:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, settings.learning_rate, weight_decay=1e-2, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "dreambooth.optimizer: adamw-8bit needs bitsandbytes and a GPU that it knows "
            "('pip install bitsandbytes'); or choose adamw"
        ) from error
    return AdamW8bit(weights, settings.learning_rate, weight_decay=1e-2)
