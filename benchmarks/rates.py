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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import describe

from sdaug_utils.data.images import Split
from sdaug_utils.generation import pools
from sdaug_utils.generation.foundation import compile_if_asked, load_pipeline, scale_condition
from sdaug_utils.generation.personalisation import NoisyLatents
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.params import load_settings
from sdaug_utils.rates import COMPILATION
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.study import open_study
from sdaug_utils.training import classifier, segmenter
from sdaug_utils.training.features import folded_backbone, load_backbone
from sdaug_utils.training.trainer import STACK

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


def seconds(measured: dict[str, Any]) -> dict[str, float]:
    """Seconds per item of each kind of work, at the study's own sizes: what plans reckon with."""
    latents = measured["U-Net training, latents per second"]
    backbone = measured["backbone at 96 px, images per second"]
    settings = load_settings("miniature")
    batch = f"batch of {settings.sampling.batch_size}"
    rates = {
        "image by a prompt": measured["images per second"][batch],
        "image of a personalised model": measured["images per second"][batch],
        "image with a ControlNet": measured["images with a ControlNet per second"][batch],
        "image, retrieved": measured["retrieved images per second"],
        "latent, fine-tuning of the U-Net": latents[
            f"batch of {settings.dreambooth.train_batch_size}"
        ],
        "latent, fine-tuning by LoRA": latents[  # at most
            f"batch of {settings.dreambooth.train_batch_size}"
        ],
        "latent, textual inversion": latents["batch of 10"],  # of five subjects
        "feature": backbone["evaluation"],
        "image, training of the whole network": backbone["training"],
        "image, training of a head": 16
        * measured["linear head, updates per second"][f"{STACK} side by side"],
        "image, training of a segmenter": measured["segmenter training, images per second"][
            f"batch of {settings.segmenter.batch_size}"
        ],
    }
    return {kind: float(f"{1 / rate:.3g}") for kind, rate in rates.items()}


def main() -> None:
    settings = load_settings("miniature")
    pipeline = load_pipeline(settings)
    result: dict[str, Any] = {"machine": describe(), "threads": torch.get_num_threads()}

    sampling = {}
    for batch_size in (1, settings.sampling.batch_size, 100):
        sample = pools.pipeline_sampler(
            pipeline, settings.sampling, ["a photo of a dress"], [lambda some: {}]
        )
        items = [(0, index) for index in range(batch_size)]
        work = partial(sample, items, range(batch_size))
        sampling[f"batch of {batch_size}"] = (batch_size, work)
    result["images per second"] = rates(sampling)

    study, canny = (
        open_study("miniature", Store(tempfile.mkdtemp())),
        techniques()["controlnet-canny"],
    )
    request = technique_requests(study, canny.name, 0, 100)[0]
    follows = canny.arguments(study, request)
    sample = pools.pipeline_sampler(
        canny.load(settings), canny.sampling(settings), ["a dress"], [follows]
    )
    size = settings.sampling.batch_size
    items = [(0, index) for index in range(size)]
    result["images with a ControlNet per second"] = rates(
        {f"batch of {size}": (size, partial(sample, items, range(size)))}
    )

    began = time.perf_counter()
    pools.technique_pools(study, "retrieval", 0, 100)
    result["retrieved images per second"] = round(1000 / (time.perf_counter() - began), 1)

    example = NoisyLatents(pipeline, study.data.splits["train"].images(range(64)), 32, seed=0)
    embeddings = torch.zeros(1, 1, pipeline.unet.config.cross_attention_dim)

    def unet_step(size: int) -> None:
        noisy, timesteps, target = example(size)
        words, told = embeddings.expand(size, 32, -1), scale_condition(pipeline, size)
        prediction = pipeline.unet(noisy, timesteps, words, timestep_cond=told).sample
        torch.nn.functional.mse_loss(prediction, target).backward()

    result["U-Net training, latents per second"] = rates(
        {
            f"batch of {size}": (size, partial(unet_step, size))
            for size in sorted({8, 10, settings.dreambooth.train_batch_size, 128})
        }
    )

    backbone, folded = load_backbone("efficientnet-lite0"), folded_backbone("efficientnet-lite0")
    pixels = torch.rand(64, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    training_mode = copy.deepcopy(backbone).train()
    with torch.inference_mode():
        result["backbone at 96 px, images per second"] = rates(
            {
                "evaluation": (64, lambda: [folded(part) for part in pixels.split(16)]),
                "training": (64, lambda: [training_mode(part) for part in pixels.split(16)]),
            }
        )

    data = classifier.TrainingSet(torch.randn(550, 1, 1280), torch.arange(550) % 10, seed=0)
    head = settings.classifier.controlled.model_copy(update={"max_train_steps": 500})
    workers = torch.get_num_threads()  # small networks are trained on a core each
    on_cores = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def on_each_core(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: list(on_cores.map(lambda _: work(), range(workers)))

    result["linear head, updates per second"] = rates(
        {
            f"{size} side by side": (
                500 * size * workers,
                on_each_core(
                    partial(classifier.train_heads, [data] * size, head, 10, 500, lambda *_: None)
                ),
            )
            for size in (1, STACK)
        }
    )
    segmenting = settings.segmenter.model_copy(update={"max_train_steps": 50})
    maps = segmenter.FeatureMaps(study)
    maps.settings = segmenting
    train = study.data.splits["train"]
    rows = range(0, len(train), 10)
    trimaps = [train.trimap(row) for row in rows]
    held_out = {name: Split(train.load, train.labels[:50], train.trimap) for name in SPLITS}
    result["segmenter training, images per second"] = rates(
        {
            f"batch of {segmenting.batch_size}": (
                50 * segmenting.batch_size * workers,
                on_each_core(
                    lambda: segmenter.train(
                        maps, train.images(rows), trimaps, held_out, "controlled", 0
                    )
                ),
            )
        }
    )
    result["steps"] = settings.sampling.num_inference_steps
    matrix = torch.randn(1024, 1024)
    products = rates({"product": (2 * 1024**3, lambda: matrix @ matrix)})
    result["peak FLOP/s"] = float(f"{products['product']:.3g}")
    began = time.perf_counter()
    compile_if_asked(settings.model_copy(update={"compile": True}), pipeline.unet)
    latents = torch.zeros(1, *example.mean.shape[1:])
    with torch.no_grad():
        pipeline.unet(latents, 0, embeddings, timestep_cond=scale_condition(pipeline, 1))
    result["seconds"] = seconds(result) | {
        COMPILATION: round(time.perf_counter() - began, 1),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
