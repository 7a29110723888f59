"""Textual inversion: learn a word for a subject (Gal et al., ICLR 2023)."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

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
from sdaug_utils.generation.technique import Request, twin
from sdaug_utils.params import Parameters, Settings
from sdaug_utils.registry import register
from sdaug_utils.study import Study

FILE = "learned_embeds.safetensors"
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a close-up photo of a {}",
    "a realistic picture of a {}",
    "a {}",
)


class TextualInversionSettings(Parameters):
    """Learning one embedding (thesis, table 4.3)."""

    placeholder_token: str
    initializer_token: str
    learnable_property: Literal["object"]
    num_input_images: int = Field(ge=1, le=5)
    train_batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    max_train_steps: int = Field(ge=1)
    subjects_at_once: int = Field(ge=1)  # learnt in one batch; what is learnt is the same


@register
class TextualInversion(Personalised):
    """One embedding for a placeholder token; many subjects learn in one batch."""

    name, label = "textual-inversion", "Textual inversion"
    colour, marker = "#3a6fb0", "P"
    section: ClassVar = ("textual_inversion", TextualInversionSettings)

    def noun(self, settings: Settings, class_name: str) -> str:
        """The word that was learnt."""
        return self.of(settings).placeholder_token

    def at_once(self, settings: Settings) -> int:
        """As many as share a batch."""
        return self.of(settings).subjects_at_once

    def learn(
        self,
        study: Study,
        pipeline: Pipeline,
        requests: Sequence[Request],
        folders: Sequence[Path],
        label: str | None,
    ) -> None:
        """All subjects in one batch, or in halves where the memory is short."""
        own = self.of(study.settings)

        def invert(part: Sequence[tuple[Request, Path]]) -> Sequence[Path]:
            embeddings = textual_inversion(
                pipeline,
                [request.inputs for request, _ in part],
                own,
                study.settings.sampling.resolution,
                [seed_of(request) for request, _ in part],
                label,
                study.settings.training_precision == "mixed",
            )
            for embedding, (_, folder) in zip(embeddings, part, strict=True):
                save_file({own.placeholder_token: embedding.clone()}, folder / FILE)
            return [folder for _, folder in part]

        batch = Batch(len(requests), "textual_inversion.subjects_at_once")
        batch.run(invert, list(zip(requests, folders, strict=True)))

    def apply(self, pipeline: Pipeline, folder: Path | None) -> Pipeline:
        """With the word in copies of tokenizer and text encoder."""
        names = ("tokenizer", "text_encoder")
        made = twin(pipeline, **{name: copy.deepcopy(getattr(pipeline, name)) for name in names})
        made.load_textual_inversion(folder, weight_name=FILE)
        return made

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        """Latents that the U-Net sees."""
        own = self.of(settings)
        size = own.train_batch_size * own.gradient_accumulation_steps
        return "latent, textual inversion", own.max_train_steps * size


def textual_inversion(
    pipeline: Pipeline,
    subjects: Sequence[Sequence[np.ndarray]],
    settings: TextualInversionSettings,
    resolution: int,
    seeds: Sequence[int],
    label: str | None = None,
    mixed_precision: bool = False,
) -> Tensor:
    """Learn an embedding for each of several subjects, all in one batch: (subjects, width).

    Subjects share the forward passes and nothing else: each has its own token, examples and
    seed, so what is learnt of one does not depend on the others.

    Args:
        pipeline: left as it was.
        subjects: for each subject its 8-bit RGB images (height, width, 3).
        resolution: side of the square training images, in pixels.
        label: of a progress bar over the steps, if one is wanted.
        mixed_precision: passes in half precision, the embeddings in single precision.

    Raises:
        InputError: ``initializer_token`` is not one token of the model's vocabulary.
    """
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scale = pipeline.vae.config.scaling_factor
    examples = [
        NoisyLatents(encode_images(pipeline, images, resolution), scheduler, scale, seed)
        for images, seed in zip(subjects, seeds, strict=True)
    ]
    tokenizer = copy.deepcopy(pipeline.tokenizer)
    text_encoder = copy.deepcopy(pipeline.text_encoder).float()
    initial = tokenizer.encode(settings.initializer_token, add_special_tokens=False)
    if len(initial) != 1:
        raise InputError(
            f"textual_inversion.initializer_token: '{settings.initializer_token}' is not a single "
            "token of the text encoder's vocabulary; choose one that is, such as a common noun"
        )
    placeholders = [f"<subject-{number}>" for number in range(len(subjects))]
    tokenizer.add_tokens(placeholders)
    first = len(tokenizer) - len(placeholders)
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_encoder.requires_grad_(False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[first:] = table[initial[0]]
    table.requires_grad_(True)
    original = table.detach()[:first].clone()

    unet = copy.deepcopy(pipeline.unet).float().requires_grad_(False)
    size, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
    optimizer = torch.optim.AdamW([table], lr=settings.learning_rate, weight_decay=1e-2)
    precision = MixedPrecision(pipeline.device, mixed_precision)
    templates = [np.random.default_rng(seed) for seed in seeds]
    for _ in trange(settings.max_train_steps, desc=label, disable=label is None):
        for _ in range(accumulation):
            batches = [example(size) for example in examples]
            noisy, timesteps, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
            prompts = [
                template.format(placeholder)
                for placeholder, rng in zip(placeholders, templates, strict=True)
                for template in rng.choice(TEMPLATES, size)
            ]
            tokens = token_ids(tokenizer, prompts, pipeline.device)
            with precision.autocast():
                prediction = unet(noisy, timesteps, text_encoder(tokens)[0]).sample.float()
            loss = F.mse_loss(prediction, target) * len(subjects) / accumulation
            precision.scaler.scale(loss).backward()
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:first] = original
    return table.detach()[first:].cpu()
