"""Run every technique at the size of Stable Diffusion 1.5; there is nothing to download.

    python benchmarks/gpu_check.py                 writes benchmarks/results/gpu.json
    python benchmarks/gpu_check.py --device cpu    writes benchmarks/results/full-size-cpu.json

The architecture is Stable Diffusion 1.5's, the weights are random: the images show noise, and take
as long as others. On a GPU, steps are fewer than the thesis's. Measured are time, memory, and how
much of the card's peak is used, eager and compiled; checked are shapes, the U-Net's type, that the
seeds of a pool do not depend on the batch and its images hardly do, and that a fine-tuned U-Net
that is not to be kept goes. ``run_all.py --dry-run --profile thesis`` plans with what is measured.

On a CPU every technique makes one image in one step, personalised in one step if it learns, in a
process of its own, so that every call, shape and peak of memory is that of the real size.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from machine import describe
from torchvision.models import resnet34
from torchvision.models.segmentation import deeplabv3_resnet101
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from sdaug_utils import params, plan
from sdaug_utils.compute import device_of, dtype_of, peak_memory
from sdaug_utils.data import augment, datasets
from sdaug_utils.generation import foundation, pools
from sdaug_utils.generation.pools import Pool
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.params import Settings
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store
from sdaug_utils.study import Study
from sdaug_utils.training.classifier import TrainingSet, train_head
from sdaug_utils.training.features import to_pixels

RESULTS = Path(__file__).parent / "results"
FULL: dict[str, Any] = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "heads": 12,
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "resolution": 512,
}
TINY: dict[str, Any] = {
    "unet": {"sample_size": 16, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "text": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    "heads": 4,
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 56,
    },
    "resolution": 128,
}
STEPS = {"sampling": 20, "training": 10}
BATCH = 4
BATCHES = (1, 4, 8, 16)  # tried, eager and compiled
PHOTOGRAPHS = 64
COMPILED = ", compiled"
PRODUCT = 8192  # rows and columns of the matrices whose product stands for an unknown card's peak
CLASSES = ("dress", "bag")


def build(folder: Path, sizes: dict[str, Any]) -> None:
    """A pipeline with a safety checker, and a ControlNet, of random weights in half precision."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **sizes["unet"], cross_attention_dim=sizes["text"]["hidden_size"], attention_head_dim=8
    )
    levels = len(sizes["vae"]["block_out_channels"])
    vae = diffusers.AutoencoderKL(
        **sizes["vae"],
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=sizes["resolution"],
    )
    vision = {**sizes["vision"], "image_size": 224}
    checker = CLIPConfig(vision_config=vision, projection_dim=sizes["text"]["hidden_size"])
    tokenizer = CLIPTokenizer.from_pretrained(foundation.MINIATURE_WEIGHTS / "tokenizer")
    tokenizer.model_max_length = 77
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                **sizes["text"],
                num_attention_heads=sizes["heads"],
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=StableDiffusionSafetyChecker(checker),
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}
        ),
    )
    diffusers.ControlNetModel.from_unet(unet).half().save_pretrained(folder / "controlnet")
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.safety_checker):
        model.half()
    pipeline.save_pretrained(folder / "pipeline")


def open_check(folder: Path, sizes: dict[str, Any], device: str) -> Study:
    """The thesis profile on the built models and two classes of the shipped photographs."""
    thesis = params.load_settings("thesis")
    controlnet = str(folder / "controlnet")
    steps = {"num_inference_steps": STEPS["sampling"]}
    sampling = {**steps, "resolution": sizes["resolution"], "batch_size": BATCH}
    steps_of_training = {"max_train_steps": STEPS["training"]}
    settings = thesis.model_copy(
        update={
            "foundation": str(folder / "pipeline"),
            "device": device,
            "sampling": thesis.sampling.model_copy(update=sampling),
            "controlnet": thesis.controlnet.model_copy(
                update={**steps, "canny": controlnet, "segmentation": controlnet}
            ),
            "dreambooth": thesis.dreambooth.model_copy(
                update={**steps_of_training, "keep_models": True}
            ),
            "retrieval": thesis.retrieval.model_copy(update={"corpus": "miniature"}),
            "dreambooth_lora": thesis.dreambooth_lora.model_copy(update=steps_of_training),
            "datadream": thesis.datadream.model_copy(update=steps_of_training),
            "textual_inversion": thesis.textual_inversion.model_copy(
                update={**steps_of_training, "initializer_token": "product"}
            ),
        }
    )
    data = datasets.load("fashion-mnist", CLASSES, {"train": 5, "validation": 1, "test": 1})
    return Study("thesis", settings, data, Store(folder / "store"))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a piece of work takes, and its result."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def fill(study: Study, technique: str, draw: int, count: int) -> tuple[float, list[Pool]]:
    """Seconds that it takes to have so many images of each class, and the pools."""
    return timed(lambda: pools.technique_pools(study, technique, draw, count, progress=False))


def with_steps(study: Study, steps: int) -> Study:
    """The same study with so many steps of whatever fine-tuning."""
    methods = ("dreambooth", "dreambooth_lora", "datadream", "textual_inversion")
    update = {
        name: getattr(study.settings, name).model_copy(update={"max_train_steps": steps})
        for name in methods
    }
    return replace(study, settings=study.settings.model_copy(update=update))


def check_technique(study: Study, technique: str) -> dict[str, Any]:
    """Make images of each class, in batches, and look at what came out.

    Rates are from differences, so that what is loaded, copied or saved once does not count: of
    twice as many images, and of models that are fine-tuned for twice as many steps.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fill(study, technique, 0, BATCH)  # the first call warms up
    once, _ = fill(study, technique, 0, 2 * BATCH)
    twice, made = fill(study, technique, 0, 4 * BATCH)
    size = study.settings.sampling.resolution
    if techniques()[technique].kind:  # else images are found, not made
        assert all(image.shape == (size, size, 3) for pool in made for image in pool.images())
    assert len({seed for pool in made for seed in pool.seeds}) == 4 * BATCH * len(CLASSES)
    assert max(attempt for pool in made for attempt in pool.attempts) == 1
    images = BATCH * len(CLASSES)
    found: dict[str, Any] = {"seconds per image": positive(twice - once) / images}
    if techniques()[technique].learns:
        short, _ = fill(with_steps(study, STEPS["training"]), technique, 1, 1)
        long, _ = fill(with_steps(study, 2 * STEPS["training"]), technique, 1, 1)
        at_once = techniques()[technique].at_once(study.settings)  # of a pass that is filled up
        per_class = positive(long - short) / max(at_once, len(CLASSES))
        found["seconds per training step"] = per_class / STEPS["training"]
    found = {name: float(f"{value:.3g}") for name, value in found.items()}
    if torch.cuda.is_available():
        found["peak memory GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def positive(seconds: float) -> float:
    """A difference of times; noise may bring a small one below zero."""
    return max(seconds, 1e-3)


def check_passing_model(study: Study) -> None:
    """The thesis profile's own way: a fine-tuned U-Net goes once its images are made."""
    saving = {"keep_models": False, "gradient_checkpointing": True, "max_train_steps": 1}
    dreambooth = study.settings.dreambooth.model_copy(update=saving)
    passing = replace(study, settings=study.settings.model_copy(update={"dreambooth": dreambooth}))
    before = set((study.store.root / "dreambooth").glob("*/unet"))
    fill(passing, "dreambooth", 2, 1)
    assert set((study.store.root / "dreambooth").glob("*/unet")) == before


def difference_between_batches(study: Study) -> float:
    """Mean distance (grey levels) of the same images made in a batch and one by one."""
    alone = study.settings.sampling.model_copy(update={"batch_size": 1})
    settings = study.settings.model_copy(update={"sampling": alone})
    elsewhere = replace(study, settings=settings, store=Store(study.store.root / "one by one"))
    batch = pools.technique_pools(study, "stable-diffusion-prompt", 0, 4, progress=False)[0]
    single = pools.technique_pools(elsewhere, "stable-diffusion-prompt", 0, 4, progress=False)[0]
    assert batch.seeds == single.seeds, "seeds depend on the size of the batch"
    pairs = zip(batch.images(), single.images(), strict=True)
    return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in pairs]))


def training_rates(settings: Settings, size: int, device: torch.device) -> dict[str, float]:
    """Seconds per image of the classifier's and the segmenter's work, by random weights."""
    photographs = np.random.default_rng(0).integers(0, 255, (PHOTOGRAPHS, 375, 500, 3), np.uint8)
    resize = augment.build("none", size)

    def pixels() -> torch.Tensor:
        views = [augment.view(image, resize, 0) for image in photographs]
        return to_pixels(views).to(device)

    backbone = resnet34(num_classes=37).to(device).eval()
    head = torch.randn(1000, 1, 512)
    labels = torch.arange(1000) % 37
    controlled = settings.classifier.controlled.model_copy(update={"max_train_steps": 500})
    segmenter = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=3).to(device)
    segmenter.backbone.requires_grad_(False)

    @torch.no_grad()
    def features() -> None:
        backbone(pixels()).cpu()

    def epoch() -> None:
        for part in pixels().split(16):
            with torch.no_grad():
                backbone.train()(part)

    def segment() -> None:
        for part in pixels().split(16):
            segmenter.train()(part)["out"].mean().backward()

    rates = {}
    for name, work in (
        ("feature", features),
        ("image, training of the whole network", epoch),
        ("image, training of a segmenter", segment),
    ):
        work()
        rates[name] = timed(work)[0] / len(photographs)
    seconds, _ = timed(
        lambda: train_head(TrainingSet(head, labels, 0), controlled, 37, 500, lambda *_: None)
    )
    return rates | {"image, training of a head": seconds / (500 * controlled.batch_size)}


def image_rates(study: Study) -> tuple[dict[str, dict[str, float | None]], float]:
    """Seconds per image of a prompt by batch, eager and compiled; seconds that compilation takes.

    None where a batch is too large for the memory.
    """
    technique = techniques()["stable-diffusion-prompt"]
    found: dict[str, dict[str, float | None]] = {}
    compilation = 0.0
    for way in ("eager", "compiled"):
        settings = study.settings.model_copy(update={"compile": way == "compiled"})
        chosen = replace(study, settings=settings)
        [request, *_] = technique_requests(chosen, technique.name, 0, 1)
        sample = pools.pipeline_sampler(
            pools.loaded(technique, settings),
            technique.sampling(settings),
            [request.spec["prompt"]],
            [technique.arguments(chosen, request)],
        )
        found[way] = {}
        for size in BATCHES:
            items, seeds = [(0, index) for index in range(size)], range(size)
            try:
                first, _ = timed(lambda: sample(items, seeds))  # noqa: B023
                again, _ = timed(lambda: sample(items, seeds))  # noqa: B023
            except torch.OutOfMemoryError:
                found[way][str(size)] = None
                continue
            found[way][str(size)] = float(f"{again / size:.3g}")
            compilation = max(compilation, first - again)
    return found, compilation


def peak(device: torch.device) -> float:
    """FLOP/s of a GPU by its data sheet; by a large matrix product where it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    sheets = json.loads((plan.TABLES / "peaks.json").read_text())["FLOP/s"]
    listed = [card for card in sheets if f" {card} " in f" {name} ".replace("-", " ")]
    if listed:
        return sheets[max(listed, key=len)]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = PRODUCT if device.type == "cuda" else PRODUCT // 8
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    seconds = min(timed(lambda: matrix @ matrix)[0] for _ in range(5))
    return float(f"{2 * size**3 / seconds:.3g}")


def at_once(folder: Path, sizes: dict[str, Any], technique: str, compiled: bool) -> dict[str, Any]:
    """One image of one step, personalised in one step: seconds, and this process's peak memory."""
    study = open_check(folder, sizes, "cpu")
    least: dict[str, Any] = {"num_inference_steps": 1, "batch_size": 1}
    learning = {"max_train_steps": 1}
    saving = {"gradient_checkpointing": True, "keep_models": True}  # of memory, of the model
    sections = {
        "sampling": least,
        "controlnet": {"num_inference_steps": 1},
        "dreambooth": learning | saving,
        "dreambooth_lora": learning,
        "datadream": learning | {"train_batch_size": 1},
        "textual_inversion": learning | {"subjects_at_once": 1},
        "da_fusion": {"strengths": [1.0]},  # less would leave none of one step
        "diff_mix": {"strength": 1.0},
        "real_guidance": {"strength": 1.0},
    }
    update = {
        name: getattr(study.settings, name).model_copy(update=values)
        for name, values in sections.items()
    }
    settings = study.settings.model_copy(
        update={**update, "compile": compiled, "training_precision": "float32"}
    )
    study = replace(study, settings=settings, store=Store(folder / f"store, {compiled=}"))
    [request, *_] = technique_requests(study, technique, 0, 1)
    seconds, [pool] = timed(lambda: pools.fill(study, [request]))
    side = settings.sampling.resolution
    assert len(pool.files) == 1
    if techniques()[technique].kind:
        assert pool.images()[0].shape == (side, side, 3)
    return {"seconds": round(seconds, 1), "peak memory GiB": round(peak_memory(), 2)}


def check_on_cpu(sizes: dict[str, Any], chosen: dict[str, bool]) -> dict[str, Any]:
    """Some techniques, one after the other, each in a process of its own, compiled if so said."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as alone,
    ):
        folder = Path(scratch)
        alone.submit(build, folder, sizes).result()
        for name, compiled in chosen.items():
            technique = name.removesuffix(COMPILED)
            found[name] = alone.submit(at_once, folder, sizes, technique, compiled).result()
            print(f"{name:<34} {found[name]}", flush=True)
    return {"machine": describe(), "precision": "torch.float32", "techniques": found}


def check(sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """All techniques on models of the given sizes: what ``gpu.json`` holds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build(folder, sizes)
        study = open_check(folder, sizes, device)
        found = {}
        for technique in techniques():
            found[technique] = check_technique(study, technique)
            print(f"{technique:<24} {found[technique]}", flush=True)
        check_passing_model(study)
        precision = foundation.load_pipeline(study.settings).unet.dtype
        assert precision == dtype_of(study.settings)
        difference = difference_between_batches(study)
        assert difference < 2, f"images depend on the batch: {difference:.1f} grey levels"
        settings = study.settings
        by_batch, compilation = image_rates(study)

    accumulation = settings.textual_inversion.gradient_accumulation_steps
    per_step = {
        name: result.get("seconds per training step", 0.0) for name, result in found.items()
    }
    seconds = {
        "image by a prompt": found["stable-diffusion-prompt"]["seconds per image"],
        "image of a personalised model": found["dreambooth"]["seconds per image"],
        "image with a ControlNet": found["controlnet-canny"]["seconds per image"],
        "image, retrieved": found["retrieval"]["seconds per image"],
        "latent, fine-tuning of the U-Net": per_step["dreambooth"],
        "latent, fine-tuning by LoRA": per_step["dreambooth-lora"],
        "latent, textual inversion": per_step["textual-inversion"] / accumulation,
        **training_rates(
            settings,
            settings.classifier.image_size if sizes is FULL else 32,
            device_of(settings),
        ),
        plan.COMPILATION: compilation,
    }
    most = peak(device_of(settings))
    counted = json.loads((RESULTS / "flops.json").read_text())["stable-diffusion-1.5"]
    work = {
        kind: STEPS["sampling"] * each.get("step", 0) + each["once"]
        for kind, each in counted.items()
    }
    fastest = [x for way in by_batch.values() for x in way.values() if x]
    use = {kind: work[kind] / most / seconds[kind] for kind in work}
    use["image by a prompt, best of those by batch"] = (
        work["image by a prompt"] / most / min(fastest)
    )
    return {
        "machine": describe(),
        "precision": str(precision),
        "techniques": found,
        "grey levels between batches of 4 and of 1": round(difference, 3),
        "seconds per image by a prompt, by batch": by_batch,
        "model FLOPs utilisation": {kind: float(f"{share:.3g}") for kind, share in use.items()},
        "peak FLOP/s": most,
        "steps": STEPS["sampling"],
        "seconds": {name: float(f"{value:.3g}") for name, value in seconds.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py: no CUDA GPU here; --device cpu takes each call once", file=sys.stderr)
        return 2
    began = time.monotonic()
    if device == "cuda":
        report = check(FULL, "cuda")
    else:
        every = dict.fromkeys(techniques(), False)
        report = check_on_cpu(FULL, {**every, f"stable-diffusion-prompt{COMPILED}": True})
    result = RESULTS / ("gpu.json" if device == "cuda" else "full-size-cpu.json")
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
