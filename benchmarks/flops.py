"""Count the floating-point operations of each kind of work: what plans hold to be the least time.

    python benchmarks/flops.py            writes benchmarks/results/flops.json

By torch's own counter, on the meta device, which has shapes and no numbers: neither weights nor a
GPU are needed. Products count (convolutions, linear layers, attention); the rest is little beside
them. An image takes ``step`` times its steps (twice the U-Net, if guidance has two passes) and
``once`` (the VAE's decoder); anything else takes ``once``, per latent or image.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import timm
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet34
from torchvision.models.segmentation import deeplabv3_resnet101

from sdaug_utils.generation.foundation import MINIATURE_WEIGHTS
from sdaug_utils.generation.techniques.dreambooth_lora import LAYERS
from sdaug_utils.params import Settings, load_settings
from sdaug_utils.rates import is_at_scale, measured, steps_of_images
from sdaug_utils.training.segmenter import new_head

RESULT = Path(__file__).parent / "results" / "flops.json"
TOKENS = 77  # that a text encoder of CLIP reads
STABLE_DIFFUSION: dict[str, Any] = {  # 1.5, as in its folder on the hub
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "controlnet": {"conditioning_embedding_out_channels": (16, 32, 96, 256)},
}


def miniature() -> dict[str, Any]:
    """What the shipped model is built from."""
    folders = {"unet": "unet", "vae": "vae", "controlnet": "controlnet-canny"}
    return {
        part: json.loads((MINIATURE_WEIGHTS / folder / "config.json").read_text())
        for part, folder in folders.items()
    }


def count(work: Callable[[], object]) -> int:
    """Floating-point operations of a piece of work; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def generation(parts: Mapping[str, Any], passes: int) -> dict[str, dict[str, float]]:
    """Of images and of learning, by a pipeline of such parts; ``passes`` of the U-Net a step."""
    unet = diffusers.UNet2DConditionModel.from_config(parts["unet"])
    vae = diffusers.AutoencoderKL.from_config(parts["vae"])
    embedding = parts["controlnet"]["conditioning_embedding_out_channels"]
    controlnet = diffusers.ControlNetModel.from_unet(unet, "rgb", embedding, False)
    config, factor = unet.config, 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    control = torch.zeros(1, 3, config.sample_size * factor, config.sample_size * factor)
    words = torch.zeros(1, TOKENS, config.cross_attention_dim)
    scale = config.time_cond_proj_dim and torch.zeros(1, config.time_cond_proj_dim)
    time = torch.zeros(1)

    def step(words: torch.Tensor = words) -> torch.Tensor:
        return unet(latents, time, words, timestep_cond=scale).sample

    with torch.no_grad():
        plain = passes * count(step)
        followed = plain + passes * count(lambda: controlnet(latents, time, words, control))
        decoded = count(lambda: vae.decode(latents))
    everything = count(lambda: step().sum().backward())
    unet.requires_grad_(False)
    word = count(lambda: step(words.clone().requires_grad_()).sum().backward())
    rank = load_settings("thesis").dreambooth_lora.rank
    unet.add_adapter(LoraConfig(r=rank, target_modules=list(LAYERS)))
    adapters = count(lambda: step().sum().backward())
    return {
        "image by a prompt": {"step": plain, "once": decoded},
        "image of a personalised model": {"step": plain, "once": decoded},
        "image with a ControlNet": {"step": followed, "once": decoded},
        "image, retrieved": {"once": 0},
        "latent, fine-tuning of the U-Net": {"once": everything},
        "latent, fine-tuning by LoRA": {"once": adapters},
        "latent, textual inversion": {"once": word},
    }


def training(profile: str) -> dict[str, dict[str, float]]:
    """Of features, heads and segmenters, per image, at a profile's sizes."""
    settings = load_settings(profile)
    side, segmenter = settings.classifier.image_size, settings.segmenter
    image = torch.zeros(1, 3, side, side)
    if settings.classifier.backbone == "resnet34":
        backbone: Any = resnet34(weights=None)
        width, whole = 512, deeplabv3_resnet101(weights=None, weights_backbone=None)
        smaller, num_features = whole.backbone, 2048
        maps = lambda image: smaller(image)["out"]  # noqa: E731
    else:
        backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
        width, smaller = 1280, backbone
        maps = lambda image: smaller.forward_intermediates(  # noqa: E731
            image, indices=[segmenter.stage], intermediates_only=True, stop_early=True
        )[0]
        num_features = maps(image).shape[1]
    with torch.no_grad():
        feature = count(lambda: backbone.eval()(image))
        mapped = count(lambda: maps(torch.zeros(1, 3, *[segmenter.image_size] * 2)))
    head = new_head(num_features, segmenter)
    each = segmenter.image_size // segmenter.output_stride
    learning = count(lambda: head.eval()(torch.zeros(1, num_features, each, each)).sum().backward())
    classes = len(settings.data["main"].classes or range(37))
    return {
        "feature": {"once": feature},
        "image, training of the whole network": {"once": feature},  # whose backbone is frozen
        "image, training of a head": {"once": 2 * 2 * width * classes},  # there and back
        "image, training of a segmenter": {
            "once": learning + (0 if segmenter.keep_features else mapped)
        },
    }


def limits(settings: Settings) -> dict[str, float]:
    """The seconds below which no code brings each kind of work on the hardware of the plan's rates.

    They are floating-point operations divided by the peak: of a card by its data sheet, of a
    processor by a large matrix product.
    """
    size = "stable-diffusion-1.5" if is_at_scale(settings) else "miniature"
    peak, steps = measured(settings)["peak FLOP/s"], steps_of_images(settings)
    return {
        kind: (steps.get(kind, 0) * each.get("step", 0.0) + each["once"]) / peak
        for kind, each in json.loads(RESULT.read_text())[size].items()
    }


def main() -> None:
    with torch.device("meta"):
        result = {
            "stable-diffusion-1.5": generation(STABLE_DIFFUSION, 2) | training("thesis"),
            "miniature": generation(miniature(), 1) | training("miniature"),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
