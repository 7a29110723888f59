"""Textual inversion: learn a word for a subject (Gal et al., ICLR 2023)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sdaug_utils.compute import Batch
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import Pipeline, scale_condition, vocabulary
from sdaug_utils.generation.personalisation import NoisyLatents, Personalised, Precision, token_ids
from sdaug_utils.generation.technique import Request, Section, with_shared_components
from sdaug_utils.lazy import torch
from sdaug_utils.params import Parameters, Settings
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


class TextualInversion(Personalised):
    """One embedding for a placeholder token; many subjects learn in one batch."""

    name, label, colour, marker = "textual-inversion", "Textual inversion", "#3a6fb0", "P"
    section: ClassVar[Section] = ("textual_inversion", TextualInversionSettings)
    learning_section = "textual_inversion"

    def subject_word(self, settings: Settings, class_name: str) -> str:
        return self.recipe(settings).placeholder_token

    def at_once(self, settings: Settings) -> int:
        return self.recipe(settings).subjects_at_once

    def learn(
        self, study: Study, pipeline: Pipeline, requests: Sequence[Request], folders: Sequence[Path]
    ) -> None:
        from safetensors.torch import save_file

        token = self.recipe(study.settings).placeholder_token
        batch = Batch(self.at_once(study.settings), "textual_inversion.subjects_at_once")

        def invert(part: Sequence[tuple[Request, Path]]) -> Sequence[Path]:
            chosen, places = zip(*part, strict=True)
            filled = [*chosen, *chosen[-1:] * (batch.size - len(chosen))]  # rounding depends on it
            learnt = self.embeddings(study, pipeline, filled)
            for embedding, folder in zip(learnt, places, strict=False):
                save_file({token: embedding.clone()}, folder / FILE)
            return places

        batch.run(invert, list(zip(requests, folders, strict=True)))

    def embeddings(
        self,
        study: Study,
        pipeline: Pipeline,
        requests: Sequence[Request],
        stepped: Callable = lambda: None,
    ) -> torch.Tensor:
        """An embedding for the subject of each request, all in one batch: (requests, width).

        Subjects share the forward passes (and the loss scale of float16), but each has its own
        token, examples and seed, so what is learnt of one does not depend on the others.
        ``stepped`` is called after each update. Raises InputError if ``initializer_token`` is not
        one token of the vocabulary.
        """
        settings, resolution = self.recipe(study.settings), study.settings.sampling.resolution
        seeds = [self.seed(request) for request in requests]
        examples = [
            NoisyLatents(pipeline, request.inputs, resolution, seed)
            for request, seed in zip(requests, seeds, strict=True)
        ]
        generators = [np.random.default_rng(seed) for seed in seeds]
        placeholders = [f"<subject-{number}>" for number in range(len(requests))]
        tokenizer, text_encoder, first = self._with_tokens(pipeline, settings, placeholders)
        table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
        original = table.detach()[:first].clone()
        unet = copy.deepcopy(pipeline.unet).float().requires_grad_(False)
        size, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
        optimizer = torch.optim.AdamW([table], lr=settings.learning_rate, weight_decay=1e-2)
        precision = Precision(study.settings)
        scale = scale_condition(pipeline, size * len(requests))
        for _ in range(settings.max_train_steps):
            for _ in range(accumulation):
                batches = zip(*(example(size) for example in examples), strict=True)
                noisy, timesteps, target = (torch.cat(parts) for parts in batches)
                prompts = [
                    template.format(placeholder)
                    for placeholder, rng in zip(placeholders, generators, strict=True)
                    for template in rng.choice(TEMPLATES, size)
                ]
                tokens = token_ids(tokenizer, prompts, pipeline.device)
                with precision.autocast:
                    words = text_encoder(tokens)[0]
                    prediction = unet(noisy, timesteps, words, timestep_cond=scale).sample.float()
                error = torch.nn.functional.mse_loss(prediction, target)
                # Each subject has the gradient that it would have alone.
                loss = error * len(requests) / accumulation
                precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            optimizer.zero_grad()
            with torch.no_grad():
                table[:first] = original
            stepped()
        return table.detach()[first:].cpu()

    def _with_tokens(
        self, pipeline: Pipeline, settings: Any, tokens: list[str]
    ) -> tuple[Any, Any, int]:
        """Copies of tokenizer and text encoder with new tokens, and the id of the first of them."""
        tokenizer = copy.deepcopy(pipeline.tokenizer)
        text_encoder = copy.deepcopy(pipeline.text_encoder).float()
        initial = tokenizer.encode(settings.initializer_token, add_special_tokens=False)
        if len(initial) != 1:
            raise _several_tokens(settings.initializer_token)
        first = len(tokenizer)
        tokenizer.add_tokens(tokens)
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        text_encoder.requires_grad_(False)
        with torch.no_grad():
            table = text_encoder.get_input_embeddings().weight
            table[first:] = table[initial[0]]
        return tokenizer, text_encoder, first

    def apply(self, pipeline: Pipeline, folder: Path) -> Pipeline:
        tokenizer, encoder = copy.deepcopy(pipeline.tokenizer), copy.deepcopy(pipeline.text_encoder)
        made = with_shared_components(pipeline, tokenizer=tokenizer, text_encoder=encoder)
        made.load_textual_inversion(folder, weight_name=FILE)
        return made

    def check(self, settings: Settings) -> None:
        own, known = self.recipe(settings), vocabulary(settings.foundation)
        word = own.initializer_token.strip().lower()
        if f"{word}</w>" not in known and word not in known:
            raise _several_tokens(own.initializer_token)
        if {own.placeholder_token, f"{own.placeholder_token}</w>"} & known:
            raise InputError(
                f"textual_inversion.placeholder_token: '{own.placeholder_token}' is a word "
                "already; choose one that is not, such as <funny-ret>"
            )

    def model_cost(self, settings: Settings) -> tuple[str, int]:
        own = self.recipe(settings)
        size = own.train_batch_size * own.gradient_accumulation_steps
        return "latent, textual inversion", own.max_train_steps * size


def _several_tokens(word: str) -> InputError:
    return InputError(
        f"textual_inversion.initializer_token: '{word}' is not a single token of the text "
        "encoder's vocabulary; choose one that is, such as a common noun"
    )
