"""DreamBooth and textual inversion: teach the foundation model a subject from a few images."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import trange

from sdaug_utils.errors import InputError
from sdaug_utils.params import DreamBooth, TextualInversion

if TYPE_CHECKING:
    import diffusers

CODE_VERSION = 1
EMBEDDING_FILE = "learned_embeds.safetensors"
ENCODED_AT_ONCE = 8  # images: class images are many
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # of the U-Net's attention, as in diffusers
TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a close-up photo of a {}",
    "a realistic picture of a {}",
    "a {}",
)


@torch.no_grad()
def encode_images(
    pipeline: "diffusers.StableDiffusionPipeline", images: Sequence[np.ndarray], resolution: int
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
        scheduler: "diffusers.DDPMScheduler",
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


def _token_ids(pipeline: "diffusers.StableDiffusionPipeline", prompts: Sequence[str]) -> Tensor:
    tokens = pipeline.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(pipeline.device)


def dreambooth(
    pipeline: "diffusers.StableDiffusionPipeline",
    images: Sequence[np.ndarray],
    class_images: Sequence[np.ndarray],
    settings: DreamBooth,
    resolution: int,
    seed: int,
    folder: Path,
    lora_rank: int | None = None,
    mixed_precision: bool = False,
) -> None:
    """Fine-tune the U-Net on images of a subject (Ruiz et al., 2023) and save it in ``folder``.

    All of its weights; with a ``lora_rank``, low-rank adapters of its attention (Hu et al., 2022).

    Args:
        pipeline: left as it was.
        images: 8-bit RGB arrays (height, width, 3) of the subject.
        class_images: what the model made of ``class_prompt``, for prior preservation; may be
            empty when ``prior_loss_weight`` is 0.
        resolution: side of the square training images, in pixels.
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
        embeddings = pipeline.text_encoder(_token_ids(pipeline, prompts))[0]

    unet = copy.deepcopy(pipeline.unet).float().train().requires_grad_(lora_rank is None)
    if lora_rank:
        _add_adapters(unet, lora_rank, seed)
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = _adamw(settings.optimizer)(weights, lr=settings.learning_rate, weight_decay=1e-2)
    half = half_precision(pipeline.device) if mixed_precision else None
    scaler = torch.amp.GradScaler(pipeline.device.type, enabled=half == torch.float16)
    size = settings.train_batch_size
    for _ in range(settings.max_train_steps):
        noisy, timesteps, target = instances(size)
        condition = embeddings[:1].expand(size, -1, -1)
        if prior:
            examples = zip((noisy, timesteps, target), class_examples(size), strict=True)
            noisy, timesteps, target = (torch.cat(pair) for pair in examples)
            condition = embeddings.repeat_interleave(size, dim=0)
        with torch.autocast(pipeline.device.type, half, enabled=mixed_precision):
            prediction = unet(noisy, timesteps, condition.float()).sample.float()
        loss = F.mse_loss(prediction[:size], target[:size])
        if prior:
            prior_loss = F.mse_loss(prediction[size:], target[size:])
            loss = loss + settings.prior_loss_weight * prior_loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if lora_rank:
        _save_adapters(pipeline, unet, folder)
    else:
        unet.eval().half().save_pretrained(folder / "unet")


def half_precision(device: torch.device) -> torch.dtype:
    """bfloat16, which needs no scaling of the loss, where there is hardware for it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


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


def _add_adapters(unet: torch.nn.Module, rank: int, seed: int) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_LAYERS))
    unet.add_adapter(config)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as peft does by "gaussian", but from a generator of our own
        for name, weight in unet.named_parameters():
            if "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / rank)


def _save_adapters(
    pipeline: "diffusers.StableDiffusionPipeline", unet: torch.nn.Module, folder: Path
) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)


def textual_inversion(
    pipeline: "diffusers.StableDiffusionPipeline",
    subjects: Sequence[Sequence[np.ndarray]],
    settings: TextualInversion,
    resolution: int,
    seeds: Sequence[int],
    folders: Sequence[Path],
    progress: str | bool = False,
    mixed_precision: bool = False,
) -> None:
    """Learn an embedding for each of several subjects (Gal et al., 2023), all in one batch.

    Subjects share the forward passes and nothing else: each has its own token, examples and
    seed, so what is learnt of one does not depend on the others. Each folder gets a file that
    ``pipeline.load_textual_inversion`` reads.

    Args:
        pipeline: left as it was.
        subjects: for each subject its 8-bit RGB images (height, width, 3).
        resolution: side of the square training images, in pixels.
        progress: the label of a progress bar over the steps, if one is wanted.
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
    half = half_precision(pipeline.device) if mixed_precision else None
    scaler = torch.amp.GradScaler(pipeline.device.type, enabled=half == torch.float16)
    templates = [np.random.default_rng(seed) for seed in seeds]
    for _ in trange(settings.max_train_steps, desc=str(progress), disable=not progress):
        for _ in range(accumulation):
            batches = [example(size) for example in examples]
            noisy, timesteps, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
            prompts = [
                template.format(placeholder)
                for placeholder, rng in zip(placeholders, templates, strict=True)
                for template in rng.choice(TEMPLATES, size)
            ]
            tokens = tokenizer(
                prompts, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids.to(pipeline.device)
            with torch.autocast(pipeline.device.type, half, enabled=mixed_precision):
                prediction = unet(noisy, timesteps, text_encoder(tokens)[0]).sample.float()
            loss = F.mse_loss(prediction, target) * len(subjects) / accumulation
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:first] = original
    for number, folder in enumerate(folders):
        embedding = table.detach()[first + number].clone().cpu()
        save_file({settings.placeholder_token: embedding}, folder / EMBEDDING_FILE)


def apply(
    pipeline: "diffusers.StableDiffusionPipeline", folder: Path | None
) -> "diffusers.StableDiffusionPipeline":
    """A pipeline with what :func:`dreambooth` or :func:`textual_inversion` left in ``folder``.

    It shares with ``pipeline``, which stays as it was, the parts that personalisation left alone,
    but for the scheduler, which has a state: so several may work at the same time.
    """
    parts = dict(pipeline.components)
    parts["scheduler"] = copy.deepcopy(pipeline.scheduler)
    inverted = folder is not None and (folder / EMBEDDING_FILE).exists()
    adapted = folder is not None and (folder / LORA_FILE).exists()
    if inverted:
        for name in ("tokenizer", "text_encoder"):
            parts[name] = copy.deepcopy(parts[name])
    elif folder is not None:
        parts["unet"] = copy.deepcopy(pipeline.unet)
        if not adapted:
            weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
            parts["unet"].load_state_dict(weights)
    personalised = type(pipeline)(**parts, requires_safety_checker=False)
    if inverted:
        personalised.load_textual_inversion(folder, weight_name=EMBEDDING_FILE)
    elif adapted:
        # low_cpu_mem_usage patches all of torch for a moment: not where other threads are at work
        personalised.unet.load_lora_adapter(
            folder, prefix="unet", weight_name=LORA_FILE, low_cpu_mem_usage=False
        )
    personalised.set_progress_bar_config(disable=True)
    return personalised
