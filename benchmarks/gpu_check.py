"""Ten minutes on a GPU: what every part of the study costs there, by models of random weights.

    python benchmarks/gpu_check.py --into FOLDER        writes FOLDER/gpu.json
    python benchmarks/gpu_check.py --device cpu --tiny --into FOLDER      tries the check itself
    python benchmarks/gpu_check.py --device cpu         writes full-size-cpu.json; needs no GPU

The models have the size of Stable Diffusion 1.5 and XL; there is nothing to download. The
measurements that matter most come first. The file is written anew after each figure; a measurement
that fails says why and does not stop the others; after ``--minutes`` the check ends by itself.
``run_all.py --dry-run --profile thesis`` plans with what it finds in ``benchmarks/results``.

The last command takes every technique once: one image in one step, personalised in one step if it
learns, in a process of its own, so that every call, shape and peak of memory is the real one.
"""

import argparse
import copy
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the module need not be installed

import diffusers
import numpy as np
import torch
from full_size import (
    FULL,
    TINY,
    Sizes,
    build,
    build_xl,
    changed,
    folder_for_models,
    open_check,
    photographs,
    random_backbones,
)
from machine import describe

from sdaug_utils.compute import device_of, dtype_of, peak_memory
from sdaug_utils.evidence.claims import TABLES
from sdaug_utils.generation import foundation, pools
from sdaug_utils.generation.technique import technique_requests
from sdaug_utils.rates import COMPILATION
from sdaug_utils.registry import techniques
from sdaug_utils.store import Store, file_digest, write_atomically
from sdaug_utils.study import Study
from sdaug_utils.training import features, segmenter
from sdaug_utils.training.classifier import TrainingSet, train_head, train_published

RESULTS = Path(__file__).parent / "results"
PROMPT = "stable-diffusion-prompt"
BATCH = 25
BATCHES = (8, 16, 25, 50)
SUBJECTS = (4, 16)  # that textual inversion learns at once
UPDATES = 4  # of a model that learns; the first is a warm-up
PROCESSES, PASSES = 3, 3
XL_BATCH = 4
PRODUCT = 8192  # rows and columns of the matrices whose product stands for an unknown card's peak
COMPILED = ", compiled"
Found = Iterator[tuple[str, Any]]  # the name of each figure, and the figure


@dataclass
class Check:
    """What the measurements share."""

    sizes: Sizes
    folder: Path  # of models
    scratch: Path  # of anything else
    study: Study
    followed: dict[str, Any] = field(default_factory=dict)  # ControlNet and scheduler, once loaded

    @property
    def device(self) -> torch.device:
        return device_of(self.study.settings)

    @property
    def pipeline(self) -> Any:
        """The one of plain prompts, which personalised models share; it is loaded once."""
        return pools.loaded(techniques()[PROMPT], self.study.settings)

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds that a piece of work takes, and its result."""
        self.wait()
        began = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - began, result

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def with_memory(self, work: Callable[[], Any]) -> tuple[float | None, Any]:
        """The most memory of the GPU in use meanwhile, in GiB, and the result."""
        if self.device.type != "cuda":
            return None, work()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        return torch.cuda.max_memory_allocated() / 2**30, result

    def sampler(
        self,
        pipeline: Any,
        steps: int,
        technique: str = PROMPT,
        noise: torch.Tensor | None = None,
    ) -> Callable[[int], Any]:
        """What makes the first so many images of a class in one pass: 8-bit RGB, stacked.

        They begin as ``noise``, if it is given, in the pipeline's precision.
        """
        chosen, study = techniques()[technique], self.study
        [request, *_] = technique_requests(study, technique, 0, max(BATCHES))
        sampling = chosen.sampling(study.settings).model_copy(update={"num_inference_steps": steps})
        arguments = chosen.arguments(study, request)

        def with_noise(indices: Sequence[int]) -> dict[str, Any]:
            given = (
                {}
                if noise is None
                else {"latents": noise[indices].to(pipeline.unet.conv_in.weight)}
            )
            return {**arguments(indices), **given}

        prompts = [request.spec["prompt"]]
        sample = pools.pipeline_sampler(pipeline, sampling, prompts, [with_noise])

        def images(count: int) -> np.ndarray:
            made = sample([(0, index) for index in range(count)], range(count))
            return np.stack([np.asarray(image) for image in made])

        return images

    def per_image(self, sampler: Callable[[int], Callable], batch: int = BATCH) -> dict[str, float]:
        """Seconds of an image: a fixed part and a part per step, from two numbers of steps."""
        took = {}
        for steps in self.sizes.steps:
            sample = sampler(steps)
            sample(batch)
            took[steps] = self.timed(partial(sample, batch))[0] / batch
        few, many = self.sizes.steps
        step = max(took[many] - took[few], 0) / (many - few)
        return {"once": max(took[few] - few * step, 0), "step": step}

    def per_update(self, learn: Callable[[Callable[[], None]], Any]) -> dict[str, float | None]:
        """Seconds of an update, and how much longer the first takes, which compiles.

        ``learn`` calls what it is given after each update.
        """
        moments = []

        def stepped() -> None:
            self.wait()
            moments.append(time.perf_counter())

        stepped()
        memory, _ = self.with_memory(partial(learn, stepped))
        first, *others = np.diff(moments)
        update = statistics.median(others)
        return {"update": update, "first, beyond": first - update, "peak memory GiB": memory}


def every_technique(check: Check) -> Found:
    """Two classes, two images each, in two steps: finite, not black, of the right shape.

    Techniques that share a pipeline follow each other; the one that goes on to be used comes last.
    """
    few, learning = {"num_inference_steps": 2}, {"max_train_steps": 2}
    learners = ("dreambooth", "dreambooth_lora", "datadream", "textual_inversion")
    study = changed(
        check.study,
        sampling={**few, "batch_size": 2, "max_attempts": 2},
        controlnet=few,
        da_fusion={"strengths": [0.5, 1.0]},  # less would leave none of two steps
        **dict.fromkeys(learners, learning),
    )
    kinds = {t: (t.kind, str(t.models(study.settings))) for t in techniques().values()}
    last = kinds[techniques()[PROMPT]]
    for technique in sorted(kinds, key=lambda t: (kinds[t] == last, kinds[t], t.name)):
        yield technique.name, attempted(partial(_few_images, check, study, technique))


def _few_images(check: Check, study: Study, technique: Any) -> dict[str, Any]:
    requests = technique_requests(study, technique.name, 0, 2)
    loading, finite = 0.0, list[bool]()
    fill = partial(check.timed, partial(pools.fill, study, requests))
    if technique.kind:
        loading, pipeline = check.timed(partial(pools.loaded, technique, study.settings))
        watched = pipeline.vae.decoder.register_forward_pre_hook(
            lambda _, given: finite.append(bool(torch.isfinite(given[0]).all()))
        )
        memory, (seconds, made) = check.with_memory(fill)
        watched.remove()
    else:
        memory, (seconds, made) = check.with_memory(fill)
    if technique.name == "controlnet-canny":
        check.followed = {name: getattr(pipeline, name) for name in ("controlnet", "scheduler")}
    images = [image for pool in made for image in pool.images()]
    attempts = [attempt for pool in made for attempt in pool.attempts]
    return {
        "images": len(images),
        "shapes": sorted({image.shape for image in images}),
        "finite": all(finite),
        "black or flagged": sum(attempts) - len(attempts),
        "mean brightness": float(np.mean([image.mean() for image in images])),
        "loading": loading,
        "seconds": seconds,
        "peak memory GiB": memory,
    }


def prompts(check: Check) -> Found:
    yield "seconds per image", check.per_image(partial(check.sampler, check.pipeline))


def filling(check: Check) -> Found:
    """A pool, files included; how long the GPU was at work for another; the pipeline alone."""
    number, steps = check.sizes.num_images, max(check.sizes.steps)
    sampling = {"batch_size": BATCH, "num_inference_steps": steps}
    study = changed(check.study, sampling=sampling)
    one, other = technique_requests(study, PROMPT, 0, number)
    alone, _ = check.timed(partial(check.sampler(check.pipeline, steps), BATCH))
    seconds, _ = check.timed(partial(pools.fill, study, [one]))
    yield "seconds per image", seconds / number
    yield "seconds per image of the pipeline alone", alone / BATCH
    if check.device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            pools.fill(study, [other])
        busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
        yield "of which the GPU is at work", busy / number


def compiled(check: Check) -> Found:
    """The U-Net compiled as a whole, against itself as it is."""
    pipeline, sample = check.pipeline, check.sampler(check.pipeline, check.sizes.steps[0])
    plain = sample(BATCH)
    with compiling(check, pipeline.unet):
        first, _ = check.timed(partial(sample, BATCH))
        again, images = check.timed(partial(sample, BATCH))
        yield "seconds to compile", first - again
        yield "difference", difference(plain, images)
        yield "seconds per image", check.per_image(partial(check.sampler, pipeline))


@contextmanager
def compiling(check: Check, network: Any) -> Iterator[None]:
    """Compile a network for a while, as the profile's ``compile`` would."""
    foundation.compile_if_asked(changed(check.study, compile=True).settings, network)
    yield
    network._compiled_call_impl = None


def difference(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Between images of 8 bits."""
    distance = np.abs(one.astype(float) - other)
    return {"mean grey levels": float(distance.mean()), "largest": float(distance.max())}


class InHalf(diffusers.UNet2DConditionModel):
    """A U-Net that stays in half precision where a technique asks for single precision."""

    def float(self) -> "InHalf":
        return self.to(torch.bfloat16)


class InHalfCompiled(InHalf):
    def float(self) -> "InHalf":
        super().float().compile(dynamic=False)
        return self


def textual_inversion(check: Check) -> Found:
    """An update of so many subjects at once, with the frozen U-Net in other precisions."""
    technique, pipeline = techniques()["textual-inversion"], check.pipeline
    study = changed(check.study, textual_inversion={"max_train_steps": UPDATES})
    requests, usual = technique_requests(study, technique.name, 0, 1), type(pipeline.unet)
    for way, kind in (("as it is", usual), ("bfloat16", InHalf), ("compiled", InHalfCompiled)):
        for number in SUBJECTS:
            some = [requests[i % len(requests)] for i in range(number)]
            learn = partial(technique.embeddings, study, pipeline, some)
            pipeline.unet.__class__ = kind
            yield f"{number} subjects, {way}", attempted(partial(check.per_update, learn))
            pipeline.unet.__class__ = usual


def dreambooth(check: Check) -> Found:
    """An update of all weights, and what a fine-tuned U-Net costs to keep."""
    technique, pipeline = techniques()["dreambooth"], check.pipeline
    study = changed(check.study, dreambooth={"max_train_steps": UPDATES})
    [request, *_] = technique_requests(study, technique.name, 0, 1)
    folder = check.scratch / "dreambooth"
    yield "seconds", check.per_update(partial(technique.tuned, study, pipeline, request))
    unet = copy.deepcopy(pipeline.unet)
    yield "save", check.timed(partial(technique.save, pipeline, unet, folder))[0]
    yield "load", check.timed(partial(technique.apply, pipeline, folder))[0]
    files = [path for path in folder.rglob("*") if path.is_file()]
    yield "hash", check.timed(lambda: [file_digest(path) for path in files])[0]
    del unet
    whole = changed(study, compile=True)
    yield "compiled", check.per_update(partial(technique.tuned, whole, pipeline, request))


def batches(check: Check) -> Found:
    """Images per second, and memory, by how many go through the model at once."""
    sample = check.sampler(check.pipeline, check.sizes.steps[0])
    for size in BATCHES:
        sample_some = partial(sample, size)
        attempted(sample_some)  # a warm-up
        found = attempted(partial(check.with_memory, partial(check.timed, sample_some)))
        if isinstance(found, tuple):
            memory, (seconds, _) = found
            found = {"seconds per image": seconds / size, "peak memory GiB": memory}
        yield str(size), found


def several_processes(check: Check) -> Found:
    """Images per second of one process and of several on the same card."""
    sample = check.sampler(check.pipeline, check.sizes.steps[0])
    sample(BATCH)
    seconds, _ = check.timed(lambda: [sample(BATCH) for _ in range(PASSES)])
    yield "images per second of 1", PASSES * BATCH / seconds
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, spawn, _meet_at, (together,)) as executor:
        arguments = (check.folder, check.sizes, check.device.type)
        spans = [executor.submit(_pass, *arguments) for _ in range(PROCESSES)]
        began, ended = zip(*(span.result(timeout=180) for span in spans), strict=True)
    rate = PROCESSES * PASSES * BATCH / (max(ended) - min(began))
    yield f"images per second of {PROCESSES}", rate


def _meet_at(barrier: Any) -> None:
    globals()["BARRIER"] = barrier


def _pass(folder: Path, sizes: Sizes, device: str) -> tuple[float, float]:
    """When the passes of one of several processes began and ended."""
    if device == "cpu":
        torch.set_num_threads(1)
    check = Check(sizes, folder, folder, open_check(folder, sizes, device))
    sample = check.sampler(check.pipeline, check.sizes.steps[0])
    sample(BATCH)
    globals()["BARRIER"].wait(timeout=120)
    began = time.time()
    for _ in range(PASSES):
        sample(BATCH)
    return began, time.time()


def controlnet(check: Check) -> Found:
    parts = {**check.pipeline.components, **check.followed}
    pipeline = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    sampler = partial(check.sampler, pipeline, technique="controlnet-canny")
    yield "seconds per image", check.per_image(sampler)


def lora(check: Check) -> Found:
    """An update of adapters; images with adapters beside the weights, and fused with them."""
    technique = techniques()["dreambooth-lora"]
    study = changed(check.study, dreambooth_lora={"max_train_steps": UPDATES})
    [request, *_] = technique_requests(study, technique.name, 0, 1)
    yield "seconds", check.per_update(partial(technique.tuned, study, check.pipeline, request))
    folder = check.scratch / "lora"
    technique.learn(study, check.pipeline, [request], [folder])
    adapted = technique.apply(check.pipeline, folder)
    sampler = partial(check.sampler, adapted, technique=technique.name)
    yield "seconds per image", check.per_image(sampler)
    adapted.unet.fuse_lora()
    yield "seconds per image, fused", check.per_image(sampler)


def training(check: Check) -> Found:
    """What learns from images, from files of photographs; random weights take as long as others."""
    random_backbones()
    number, splits = check.sizes.num_photographs, {}
    for suffix in ("jpg", "png"):
        splits[suffix] = photographs(check.scratch / suffix, check.sizes, number, suffix)
        few, images = splits[suffix].images(range(2)), splits[suffix].images()
        features.feature_arrays(check.study, few)  # a warm-up
        seconds, _ = check.timed(partial(features.feature_arrays, check.study, images))
        yield f"seconds per feature, {suffix}", seconds / (number - 2)
    split = splits["jpg"]
    few = split.images(range(2))
    settings = check.study.settings
    published = settings.classifier.published.model_copy(
        update={"max_epochs": 1, "image_size": check.sizes.side}
    )
    backbone = settings.classifier.backbone
    epoch = partial(train_published, split.images(), split.labels, (few, split.labels[:2]), few)
    seconds, _ = check.timed(lambda: epoch(backbone, "none", published, 0, 2, check.device))
    yield "seconds per image of a published epoch", seconds / number

    trimaps = [split.trimap(row) for row in range(number)]
    held_out = replace(split, labels=split.labels[:2])
    updates, took = (2, 2 + UPDATES), []
    for steps in updates:
        maps = segmenter.FeatureMaps(changed(check.study, segmenter={"max_train_steps": steps}))
        learn = partial(segmenter.train, maps, split.images(), trimaps, protocol="controlled")
        both = {"validation": held_out, "test": held_out}
        took.append(check.timed(partial(learn, splits=both, seed=0))[0])
    each = max(took[1] - took[0], 0) / UPDATES / settings.segmenter.batch_size
    yield "seconds per image of a segmenter's update", each

    head = TrainingSet(torch.randn(1000, 1, 512), torch.arange(1000) % 37, 0)
    controlled = settings.classifier.controlled.model_copy(update={"max_train_steps": 500})
    seconds, _ = check.timed(partial(train_head, head, controlled, 37, 500, lambda *_: None))
    yield "seconds per image of a head's update", seconds / 500 / controlled.batch_size


def sameness(check: Check) -> Found:
    """How far the same images are from each other, made again or in another way."""
    pipeline, steps = check.pipeline, check.sizes.steps[0]
    sample = check.sampler(pipeline, steps)
    usual = sample(BATCH)
    yield "the same bytes twice", bool((sample(BATCH) == usual).all())
    yield "alone", difference(usual[:1], sample(1))
    # A generator's numbers may depend on the precision that they are drawn in.
    side = check.sizes.resolution // pipeline.vae_scale_factor
    noise = torch.randn(BATCH, 4, side, side, generator=torch.Generator().manual_seed(0))
    usual = check.sampler(pipeline, steps, noise=noise)(BATCH)
    pipeline.to(torch.bfloat16)
    yield "in bfloat16", difference(usual, check.sampler(pipeline, steps, noise=noise)(BATCH))


def stable_diffusion_xl(check: Check) -> Found:
    """Its images, four at a time, by AutoPipeline."""
    pools.loaded_pipelines.clear()
    check.followed.clear()
    free_memory()
    folder = check.folder / "xl"
    build_xl(folder, check.sizes, check.device.type)
    free_memory()
    load = partial(diffusers.AutoPipelineForText2Image.from_pretrained, folder)
    seconds, pipeline = check.timed(
        lambda: load(dtype=dtype_of(check.study.settings)).to(check.device)
    )
    yield "loading", seconds
    pipeline.set_progress_bar_config(disable=True)

    def sampler(steps: int) -> Callable[[int], Any]:
        call = partial(pipeline, "a photo of a dress", num_inference_steps=steps, output_type="np")
        return lambda count: call(num_images_per_prompt=count).images

    memory, images = check.with_memory(partial(sampler(2), XL_BATCH))
    yield "images", {"shape": images.shape, "finite": bool(np.isfinite(images).all())}
    yield "peak memory GiB", memory
    yield "seconds per image", check.per_image(sampler, XL_BATCH)


MEASUREMENTS: dict[str, Callable[[Check], Found]] = {
    "every technique": every_technique,
    "prompts": prompts,
    "filling": filling,
    "compiled": compiled,
    "textual inversion": textual_inversion,
    "dreambooth": dreambooth,
    "batches": batches,
    "several processes": several_processes,
    "controlnet": controlnet,
    "lora": lora,
    "training": training,
    "sameness": sameness,
    "stable diffusion xl": stable_diffusion_xl,
}
"""The most valuable first: there may be no time for the last."""


def rates(found: dict[str, Any], settings: Any) -> dict[str, Any]:
    """What plans reckon with, as far as it has been measured: seconds by kind of work.

    An image's fixed part holds what a pool takes beside the pipeline: files, and waiting for them.
    """
    learner = settings.textual_inversion
    subjects = learner.subjects_at_once
    inverted = subjects * learner.train_batch_size * learner.gradient_accumulation_steps

    def image(measured: str) -> dict[str, float]:
        own, pool = found[measured]["seconds per image"], found["filling"]
        files = pool["seconds per image"] - pool["seconds per image of the pipeline alone"]
        return {"once": own["once"] + max(files, 0), "step": own["step"]}

    def retrieved() -> float:
        measured = found["every technique"]["retrieval"]
        return measured["seconds"] / measured["images"]

    def feature() -> float:
        return max(found["training"][f"seconds per feature, {kind}"] for kind in ("jpg", "png"))

    kinds: dict[str, Callable[[], Any]] = {
        "image by a prompt": lambda: image("prompts"),
        "image of a personalised model": lambda: image("prompts"),
        "image with a ControlNet": lambda: image("controlnet"),
        "image, retrieved": retrieved,
        "latent, fine-tuning of the U-Net": lambda: (
            found["dreambooth"]["seconds"]["update"] / settings.dreambooth.train_batch_size
        ),
        "latent, fine-tuning by LoRA": lambda: (
            found["lora"]["seconds"]["update"] / settings.dreambooth.train_batch_size
        ),
        "latent, textual inversion": lambda: (
            found["textual inversion"][f"{subjects} subjects, as it is"]["update"] / inverted
        ),
        "feature": feature,
        "image, training of the whole network": lambda: found["training"][
            "seconds per image of a published epoch"
        ],
        "image, training of a segmenter": lambda: found["training"][
            "seconds per image of a segmenter's update"
        ],
        "image, training of a head": lambda: found["training"][
            "seconds per image of a head's update"
        ],
        COMPILATION: lambda: max(found["compiled"]["seconds to compile"], 0),
    }
    measured = {}
    for kind, rate in kinds.items():
        with suppress(KeyError, TypeError):  # not reached, failed, or out of memory
            measured[kind] = rate()
    return measured


def peak(device: torch.device) -> float:
    """FLOP/s of a GPU by its data sheet; by a large matrix product where it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    sheets = json.loads((TABLES / "peaks.json").read_text())["FLOP/s"]
    listed = [card for card in sheets if f" {card} " in f" {name} ".replace("-", " ")]
    if listed:
        return sheets[max(listed, key=len)]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = PRODUCT if device.type == "cuda" else PRODUCT // 8
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # which waits for it
        spent.append(time.perf_counter() - began)
    return float(f"{2 * size**3 / min(spent):.3g}")


def short(value: Any) -> Any:
    """Four digits of each number."""
    if isinstance(value, dict):
        return {str(key): short(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [short(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def attempted(work: Callable[[], Any]) -> Any:
    """What comes of a piece of work, or why nothing does."""
    try:
        return work()
    except Exception:  # of any kind: the others go on
        reason = traceback.format_exc(limit=-3)
    free_memory()
    return {"failed": reason}


def free_memory() -> None:
    """Give back what the last measurement used, a failed one's tensors included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Record:
    """The file that a check writes, as far as it has come."""

    def __init__(self, file: Path, device: str) -> None:
        self.file, self.lock, self.began = file, threading.Lock(), time.monotonic()
        self.folders: list[Path] = []  # to be deleted at the end
        self.content: dict[str, Any] = {
            "machine": describe(),
            "peak FLOP/s": peak(torch.device(device)),
            "seconds": {},
            "found": {name: {"state": "not reached"} for name in MEASUREMENTS},
        }
        self.write()

    def write(self) -> None:
        with self.lock:
            self.content["minutes"] = (time.monotonic() - self.began) / 60
            text = json.dumps(short(self.content), indent=1) + "\n"
            write_atomically(self.file, lambda path: path.write_text(text))

    def end(self) -> None:
        """Write what was found and end this process, with all that it has started."""
        self.content["ended"] = "out of time"
        with suppress(RuntimeError):  # what is written changes meanwhile: the last writing holds
            self.write()
        for process in multiprocessing.active_children():
            process.kill()
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def measure(check: Check, record: Record) -> None:
    """Take all measurements, one after the other."""
    for name, work in MEASUREMENTS.items():
        found: dict[str, Any] = {"state": "begun"}
        record.content["found"][name] = found
        record.write()
        began, state = time.monotonic(), "done"
        try:
            for key, value in work(check):
                found[key] = value
                record.content["seconds"] = rates(record.content["found"], check.study.settings)
                record.write()
        except Exception:  # of any kind: the others go on
            state = traceback.format_exc(limit=-3)
        found |= {"state": state, "seconds in all": time.monotonic() - began}
        record.write()
        print(f"{name}: {json.dumps(short(found))}", flush=True)
        free_memory()


def once_on_cpu(folder: Path, sizes: Sizes, technique: str, whole: bool) -> dict[str, Any]:
    """One image in one step, personalised in one step, with a U-Net that is compiled or not."""
    learning = {"max_train_steps": 1}
    study = open_check(
        *(folder, sizes, "cpu"),
        compile=whole,
        training_precision="float32",
        sampling={"num_inference_steps": 1, "batch_size": 1},
        controlnet={"num_inference_steps": 1},
        dreambooth={**learning, "gradient_checkpointing": True, "keep_models": True},
        dreambooth_lora=learning,
        datadream={**learning, "train_batch_size": 1},
        textual_inversion={**learning, "subjects_at_once": 1},
        da_fusion={"strengths": [1.0]},  # less would leave none of one step
        diff_mix={"strength": 1.0},
        real_guidance={"strength": 1.0},
    )
    study = replace(study, store=Store(folder / f"store of {technique}, {whole}"))
    [request, *_] = technique_requests(study, technique, 0, 1)
    began = time.perf_counter()
    [pool] = pools.fill(study, [request])
    side = sizes.resolution
    assert not techniques()[technique].kind or pool.images()[0].shape == (side, side, 3)
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "peak memory GiB": round(peak_memory(), 2)}


def check_on_cpu(sizes: Sizes, chosen: dict[str, bool]) -> dict[str, Any]:
    """Some techniques, one after the other, each in a process of its own, compiled if so said."""
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as alone,
    ):
        folder = Path(scratch)
        alone.submit(build, folder, sizes, "cpu").result()
        for name, whole in chosen.items():
            technique = name.removesuffix(COMPILED)
            found[name] = alone.submit(once_on_cpu, folder, sizes, technique, whole).result()
            print(f"{name:<34} {found[name]}", flush=True)
    return {"machine": describe(), "precision": "torch.float32", "techniques": found}


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=RESULTS, help="the folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=9, help="after which it ends by itself")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models: to try the check itself")
    return parser.parse_args()


def main() -> int:
    asked = command_line()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py: no CUDA GPU here: choose --device cpu", file=sys.stderr)
        return 2
    if asked.tiny and asked.into == RESULTS:
        print("gpu_check.py: --tiny needs --into, since plans read its results", file=sys.stderr)
        return 2
    asked.into.mkdir(parents=True, exist_ok=True)
    if asked.device == "cpu" and not asked.tiny:
        everything = dict.fromkeys(techniques(), False) | {f"{PROMPT}{COMPILED}": True}
        report = check_on_cpu(FULL, everything)
        (asked.into / "full-size-cpu.json").write_text(json.dumps(report, indent=2) + "\n")
        return 0
    record = Record(asked.into / "gpu.json", asked.device)
    faulthandler.dump_traceback_later(60 * asked.minutes + 10, exit=True)  # if even that hangs
    watch = threading.Timer(60 * asked.minutes, record.end)
    watch.daemon = True
    watch.start()
    sizes = TINY if asked.tiny else FULL
    if asked.tiny:  # networks are captured in whole; to generate code for them takes minutes
        whole = torch.nn.Module.compile
        torch.nn.Module.compile = partialmethod(whole, backend="aot_eager")  # type: ignore
    with (
        tempfile.TemporaryDirectory() as scratch,
        folder_for_models(Path(scratch), sizes) as folder,
    ):
        record.folders = [folder, Path(scratch)]
        build(folder, sizes, asked.device)
        free_memory()
        study = open_check(folder, sizes, asked.device)
        study = replace(study, store=Store(Path(scratch) / "store"))
        measure(Check(sizes, folder, Path(scratch), study), record)
        record.content["ended"] = "all measured"
        record.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
