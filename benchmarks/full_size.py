"""Pipelines of real size with random weights: there is nothing to download.

An image of theirs is noise, and takes as long as any other.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models import ResNet34_Weights, resnet34
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights, deeplabv3_resnet101
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sdaug_utils import params
from sdaug_utils.data import datasets
from sdaug_utils.data.images import Split, read_rgb
from sdaug_utils.generation.foundation import MINIATURE_WEIGHTS
from sdaug_utils.store import Store, file_digest
from sdaug_utils.study import Study

CLASSES = ("dress", "bag")
TOKENS = 77  # that CLIP's text encoder reads


@dataclass(frozen=True)
class Sizes:
    """What a pipeline is built from, in the words of diffusers and transformers."""

    unet: dict[str, Any]
    vae: tuple[int, ...]  # channels of its levels
    text: dict[str, Any]
    second_text: dict[str, Any]  # of SDXL
    vision: dict[str, Any]  # of the safety checker
    xl: dict[str, Any]  # SDXL's U-Net
    resolution: int  # of Stable Diffusion 1.5's images; SDXL's are twice as wide
    photograph: tuple[int, int]  # height and width
    side: int  # of what classifier and segmenter see
    num_photographs: int
    num_images: int  # of a pool
    steps: tuple[int, int]  # of sampling: few, many


FULL = Sizes(
    unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae=(128, 256, 512, 512),
    text={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    second_text={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    xl={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    resolution=512,
    photograph=(375, 500),
    side=224,
    num_photographs=256,
    num_images=100,
    steps=(10, 20),
)
TINY = Sizes(
    unet={
        "sample_size": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    vae=(32, 32, 32, 32),
    text={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
    second_text={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "projection_dim": 32,
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
    xl={
        "sample_size": 16,
        "block_out_channels": (32, 32, 32),
        "attention_head_dim": (2, 2, 2),
        "transformer_layers_per_block": (1, 1, 1),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    resolution=64,
    photograph=(48, 64),
    side=32,
    num_photographs=32,
    num_images=25,
    steps=(2, 4),
)
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def tokenizer() -> CLIPTokenizer:
    """The shipped one, whose vocabulary is small, for texts of CLIP's usual length."""
    shipped = CLIPTokenizer.from_pretrained(MINIATURE_WEIGHTS / "tokenizer")
    shipped.model_max_length = TOKENS
    return shipped


def text_config(sizes: dict[str, Any]) -> CLIPTextConfig:
    words = tokenizer()
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    return CLIPTextConfig(**sizes, **ends, max_position_embeddings=TOKENS)


def autoencoder(channels: tuple[int, ...], **more: Any) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=channels,
        layers_per_block=1 if len(set(channels)) == 1 else 2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        **more,
    )


def save(pipeline: Any, folder: Path) -> None:
    """Half precision, safetensors: as models come from the hub."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.half()
    pipeline.save_pretrained(folder)


def build(folder: Path, sizes: Sizes, device: str) -> None:
    """Stable Diffusion 1.5 with its safety checker, and a ControlNet, initialised on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel(**sizes.unet)
        width, seen = sizes.text["hidden_size"], sizes.vision["image_size"]
        checker = CLIPConfig(vision_config=sizes.vision, projection_dim=width)
        pipeline = diffusers.StableDiffusionPipeline(
            vae=autoencoder(sizes.vae, sample_size=sizes.resolution),
            text_encoder=CLIPTextModel(text_config(sizes.text)),
            tokenizer=tokenizer(),
            unet=unet,
            scheduler=diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True),
            safety_checker=StableDiffusionSafetyChecker(checker),
            feature_extractor=CLIPImageProcessor(
                size={"shortest_edge": seen}, crop_size={"height": seen, "width": seen}
            ),
        )
        diffusers.ControlNetModel.from_unet(unet).half().save_pretrained(folder / "controlnet")
    save(pipeline, folder / "pipeline")


def build_xl(folder: Path, sizes: Sizes, device: str) -> None:
    """Stable Diffusion XL, initialised on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=autoencoder(sizes.vae, sample_size=2 * sizes.resolution, scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config(sizes.text)),
            tokenizer=tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(sizes.second_text)),
            tokenizer_2=tokenizer(),
            unet=diffusers.UNet2DConditionModel(
                **sizes.xl,
                layers_per_block=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                use_linear_projection=True,
                addition_embed_type="text_time",
            ),
            scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        )
    save(pipeline, folder)


def open_check(folder: Path, sizes: Sizes, device: str, **changes: Any) -> Study:
    """The thesis profile on built models and two classes of the shipped photographs.

    ``changes`` are of its settings: a section's values, or a value.
    """
    thesis = params.load_settings("thesis")
    controlnet = str(folder / "controlnet")
    sections: dict[str, Any] = {
        "foundation": str(folder / "pipeline"),
        "device": device,
        "sampling": {"resolution": sizes.resolution},
        "controlnet": {"canny": controlnet, "segmentation": controlnet},
        "retrieval": {"corpus": "miniature"},
        "textual_inversion": {"initializer_token": "product"},
        "classifier": {"image_size": sizes.side},
        "segmenter": {"image_size": sizes.side, "label_size": sizes.side},
    }
    data = datasets.load("fashion-mnist", CLASSES, {"train": 5, "validation": 1, "test": 1})
    study = Study("thesis", thesis, data, Store(folder / "store"))
    return changed(changed(study, **sections), **changes)


def changed(study: Study, **sections: Any) -> Study:
    """A study with other settings: some values of a section, or a value of none."""
    settings = study.settings
    updates = {
        name: getattr(settings, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return Study(study.profile, settings.model_copy(update=updates), study.data, study.store)


def photographs(folder: Path, sizes: Sizes, number: int, suffix: str) -> Split:
    """Files cut from the two photographs that scikit-learn ships, as a split with trimaps."""
    folder.mkdir()
    height, width = sizes.photograph
    pictures, rng = load_sample_images().images, np.random.default_rng(0)
    files = [folder / f"{index:04d}.{suffix}" for index in range(number)]
    for index, file in enumerate(files):
        picture = pictures[index % len(pictures)]
        top, left = (
            rng.integers(a - b + 1) for a, b in zip(picture.shape, (height, width), strict=False)
        )
        Image.fromarray(picture[top : top + height, left : left + width]).save(file)
    trimap = np.repeat(np.arange(3, dtype=np.uint8) + 1, height // 3)[:, None]
    labels = np.arange(number) % len(pictures)
    return Split(
        lambda row: read_rgb(files[row]),
        labels,
        lambda row: np.broadcast_to(trimap, (len(trimap), width)).copy(),
        lambda row: file_digest(files[row]),
    )


def random_backbones() -> None:
    """ResNet34 and DeepLabV3 get random weights wherever theirs would be downloaded."""

    def weights_of(build: Callable[..., torch.nn.Module], **options: Any) -> Any:
        return lambda self, **_: build(**options).state_dict()

    ResNet34_Weights.get_state_dict = weights_of(resnet34)
    DeepLabV3_ResNet101_Weights.get_state_dict = weights_of(
        deeplabv3_resnet101, weights_backbone=None, num_classes=21, aux_loss=True
    )


@contextmanager
def folder_for_models(scratch: Path, sizes: Sizes) -> Iterator[Path]:
    """A folder in memory for large models, where this machine has room; else one in ``scratch``."""
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 16 * 2**30
    with tempfile.TemporaryDirectory(dir=shared if sizes is FULL and has_room else scratch) as name:
        yield Path(name)
