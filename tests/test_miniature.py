"""What is shipped: small, whole, and loaded by the libraries' own classes."""

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from sdaug_utils.data.datasets import DIGIT_CLASSES, FASHION_CLASSES, MINIATURE_DATA
from sdaug_utils.generation.foundation import MINIATURE_WEIGHTS


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(MINIATURE_WEIGHTS, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_data_and_weights_are_small_and_safe():
    assert size(MINIATURE_DATA) < 2.5e6
    assert size(MINIATURE_WEIGHTS) < 25e6
    endings = {path.suffix for path in MINIATURE_WEIGHTS.rglob("*") if path.is_file()}
    assert endings <= {".json", ".safetensors", ""}


def test_prompts_fit_and_every_word_of_a_caption_is_known(pipeline):
    tokenizer = pipeline.tokenizer
    prompt = (
        "A cute photo of a dark patterned {}, high quality, highly detailed, elegant, sharp focus"
    )
    for name in (*FASHION_CLASSES, *DIGIT_CLASSES, "product"):
        tokens = tokenizer.tokenize(prompt.format(name))
        assert len(tokens) + 2 <= tokenizer.model_max_length
        assert "<|endoftext|>" not in tokens
        assert all(token.endswith("</w>") for token in tokens)
    assert "<|endoftext|>" not in tokenizer.tokenize("Gandalf, wizard & xylophone; 42")


def test_classes_look_like_themselves(pipeline):
    """The prompt decides what is made: bags are wider than trousers, at every seed."""

    def width(name):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        images = pipeline(
            f"A photo of a {name}",
            num_images_per_prompt=4,
            num_inference_steps=8,
            guidance_scale=2.0,
            height=32,
            width=32,
            generator=generators,
        ).images
        return [(np.asarray(image).max(axis=(0, 2)) > 60).sum() for image in images]

    assert max(width("trouser")) < min(width("bag"))


@pytest.mark.parametrize("kind", ["canny", "segmentation"])
def test_controlnets_load_and_change_the_image(pipeline, kind):
    controlnet = ControlNetModel.from_pretrained(
        MINIATURE_WEIGHTS / f"controlnet-{kind}", dtype=torch.float32
    )
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    controlled.set_progress_bar_config(disable=True)
    control = Image.fromarray(np.eye(32, dtype=np.uint8)[..., None].repeat(3, axis=2) * 255)
    images = [
        controlled(
            "A photo of a bag",
            image=control,
            num_inference_steps=4,
            controlnet_conditioning_scale=scale,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
        for scale in (0.0, 1.0)
    ]
    assert np.abs(np.subtract(*(np.asarray(image, int) for image in images))).mean() > 1
