"""What is fast on this machine: rates of the study's four kinds of work, side by side.

    python benchmarks/rates.py            writes benchmarks/results/rates.json

Variants of one kind of work take turns, three rounds, and the best round of each counts: machines
that are shared slow down now and then, and never speed up.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from machine import describe
from sdaug_utils.foundation import load_pipeline

from sdaug_utils import datasets, personalise, pools, segmentation, training
from sdaug_utils.params import load_settings
from sdaug_utils.store import Store
from sdaug_utils.study import open_study

RESULT = Path(__file__).parent / "results" / "rates.json"
ROUNDS = 3
SPLITS = ("validation", "test")


def rates(variants: Mapping[str, tuple[int, Callable[[], object]]]) -> dict[str, float]:
    """Items per second of each variant, given as (items per call, call)."""
    best = dict.fromkeys(variants, 0.0)
    for _ in range(ROUNDS):
        for name, (items, call) in variants.items():
            began = time.perf_counter()
            call()
            best[name] = max(best[name], items / (time.perf_counter() - began))
    return {name: round(rate, 1) for name, rate in best.items()}


def main() -> None:
    settings = load_settings("miniature")
    pipeline = load_pipeline(settings)
    result: dict[str, object] = {"machine": describe(), "threads": torch.get_num_threads()}

    sampling = {}
    for batch_size in (1, 10, 50, 100):
        sample = pools.pipeline_sampler(pipeline, "a photo of a dress", settings.sampling)
        seeds = list(range(batch_size))
        sampling[f"batch of {batch_size}"] = (batch_size, partial(sample, seeds, seeds))
    result["images per second"] = rates(sampling)

    control = [np.zeros((32, 32, 3), np.uint8)]
    controlled = load_pipeline(settings, "controlnet-canny")
    sample = pools.pipeline_sampler(controlled, "a dress", settings.sampling, control)
    seeds = list(range(100))
    result["images with a ControlNet per second"] = rates(
        {"batch of 100": (100, partial(sample, seeds, seeds))}
    )

    latents = torch.randn(64, 4, 8, 8)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    example = personalise.NoisyLatents((latents, 0 * latents), scheduler, 1.0, seed=0)
    embeddings = torch.zeros(1, 1, pipeline.unet.config.cross_attention_dim)

    def unet_step(size: int) -> None:
        noisy, timesteps, target = example(size)
        prediction = pipeline.unet(noisy, timesteps, embeddings.expand(size, 32, -1)).sample
        torch.nn.functional.mse_loss(prediction, target).backward()

    result["U-Net training, latents per second"] = rates(
        {f"batch of {size}": (size, partial(unet_step, size)) for size in (8, 32, 128)}
    )

    backbone = training.load_backbone("efficientnet-lite0")
    pixels = torch.rand(64, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    training_mode = copy.deepcopy(backbone).train()
    with torch.inference_mode():
        result["backbone at 96 px, images per second"] = rates(
            {
                "evaluation": (64, partial(backbone, pixels)),
                "training": (64, lambda: [training_mode(part) for part in pixels.split(16)]),
            }
        )

    features, labels = torch.randn(550, 1, 1280), torch.from_numpy(np.arange(550) % 10)
    head = settings.classifier.controlled.model_copy(update={"max_train_steps": 500})
    result["linear head, updates per second"] = rates(
        {
            "batch of 16": (
                500,
                lambda: training.train_head(
                    features, labels, head, 0, 10, 500, lambda step, trained: None
                ),
            )
        }
    )
    study = open_study("miniature", Store(tempfile.mkdtemp()))
    segmenter = settings.segmenter.model_copy(update={"max_train_steps": 50})
    maps = segmentation.FeatureMaps(study)
    maps.settings = segmenter
    train = study.data.splits["train"]
    rows = range(0, len(train), 10)
    trimaps = [train.trimap(row) for row in rows]
    held_out = {
        name: datasets.Split(train.load, train.labels[:50], train.trimap) for name in SPLITS
    }
    result["segmenter training, images per second"] = rates(
        {
            "batch of 16": (
                50 * 16,
                lambda: segmentation.train(
                    maps, train.images(rows), trimaps, held_out, "controlled", 0
                ),
            )
        }
    )
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
