"""Synthetic images: a pool per technique, class and draw.

A pool is a sequence: image i depends only on the pool's specification and i. Asking for 50 after
10 adds 40. A draw is one random subset of the real images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdaug_utils.compute import Batch, device_of, one_thread
from sdaug_utils.generation.foundation import Pipeline, compiled, is_distilled
from sdaug_utils.generation.pool_files import (
    ATTEMPTS,
    Pool,
    Row,
    file_name,
    image_seed,
    read_listing,
    read_pool,
    write_listing,
)
from sdaug_utils.generation.technique import Request, technique_requests
from sdaug_utils.lazy import torch
from sdaug_utils.params import Sampling, Settings
from sdaug_utils.store import Spec, Store, digest, write_atomically, write_spec
from sdaug_utils.study import Study

BLOCK = 50  # images of a pool that are locked together: others may make the next at the same time
BLACK_LEVEL = 8  # of 255: an image that is nowhere brighter is black, hence rejected

Item = tuple[int, int]  # the number of a pool and the index of one of its images
Sampler = Callable[[Sequence[Item], Sequence[int]], list[Image.Image | None]]
"""Makes an image from each (item, seed); None where the image is rejected."""
Arguments = Callable[[Sequence[int]], dict[str, Any]]


def grow(
    store: Store,
    requests: Sequence[Request],
    make_sampler: Callable[[], Sampler],
    batch: Batch,
    max_attempts: int,
    batch_key: Callable[[int], Any] = lambda index: None,
) -> list[Pool]:
    """Make the missing images of some pools; all pools share one sampler, and may share a batch.

    Every batch has the full size, because rounding depends on a batch's shape: the last one is
    padded with copies of its last image.

    Args:
        requests: of each pool what determines its images (``class`` and ``prompt`` go into the
            metadata) and which images are asked for, ``range(50)`` for the first fifty.
        make_sampler: called only if an image is missing.
        batch_key: a key by an image's index; only images with equal keys share a batch.

    Raises:
        RuntimeError: an image was rejected ``max_attempts`` times.
    """
    sampler, specs = cache(make_sampler), [request.spec for request in requests]
    folders = [store.folder("pools", request.spec) for request in requests]

    def absent(known: Sequence[Collection[int]]) -> list[Item]:
        wanted = [set(request.indices) for request in requests]
        return [(n, i) for n, some in enumerate(known) for i in sorted(wanted[n].difference(some))]

    while True:
        rows = [read_pool(*one) for one in zip(folders, specs, strict=True)]
        if not (missing := absent(rows)):
            break
        blocks = {f"pools-{folders[number].name}-{index // BLOCK}" for number, index in missing}
        with store.lock(*blocks):
            rows = [read_pool(*one) for one in zip(folders, specs, strict=True)]
            missing = absent(rows)  # others may have made some
            _make(store, specs, folders, missing, sampler, batch, max_attempts, batch_key)
    for folder, known in zip(folders, rows, strict=True):
        if known != read_listing(folder):
            write_listing(known, folder)
    return [_pool(*one) for one in zip(requests, folders, rows, strict=True)]


def _pool(request: Request, folder: Path, rows: dict[int, Row]) -> Pool:
    wanted = [rows[index] for index in request.indices]
    return Pool(
        request.spec["class"],
        tuple(folder / row["file_name"] for row in wanted),
        tuple(row["digest"] for row in wanted),
        tuple(int(row["seed"]) for row in wanted),
        tuple(int(row["attempts"]) for row in wanted),
        request.source_rows(request.indices),
    )


def _make(
    store: Store,
    specs: Sequence[Spec],
    folders: Sequence[Path],
    items: Sequence[Item],
    sampler: Callable[[], Sampler],
    batch: Batch,
    max_attempts: int,
    batch_key: Callable[[int], Any],
) -> None:
    """Make images; first delete rows of damaged files, and temporary files of killed processes."""
    missing = set(items)
    for number in {number for number, _ in items}:
        folders[number].mkdir(parents=True, exist_ok=True)
        listed = read_listing(folders[number])
        sound = {i: row for i, row in listed.items() if (number, i) not in missing}
        if sound != listed:  # the others were damaged
            write_listing(sound, folders[number])
        with store.lock(f"pools-{folders[number].name}-spec"):
            write_spec(folders[number], {**specs[number], "batch_size": batch.size})
    for number, index in items:
        for leftover in folders[number].glob(f".{file_name(index)}.*"):
            leftover.unlink()
        if (damaged := folders[number] / file_name(index)).exists():
            store.report_damaged(damaged)

    def make(part: Sequence[Item]) -> Sequence[Item]:
        _make_batch(specs, part, sampler(), folders, max_attempts, batch.size)
        return part

    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(batch_key(item[1]), []).append(item)
    for group in groups.values():
        batch.run(make, group)


def _make_batch(
    specs: Sequence[Spec],
    items: Sequence[Item],
    sampler: Sampler,
    folders: Sequence[Path],
    max_attempts: int,
    batch_size: int,
) -> None:
    """Make one batch; try rejected images again with new seeds, up to ``max_attempts`` times."""
    waiting = list(items)
    for attempt in range(max_attempts):
        filled = waiting + [waiting[-1]] * (batch_size - len(waiting))
        seeds = [image_seed(specs[number], index, attempt) for number, index in filled]
        rejected = []
        for item, image in zip(waiting, sampler(filled, seeds), strict=False):
            if image is None:
                rejected.append(item)
                continue
            folder, name = folders[item[0]], file_name(item[1])
            count_file = (folder / name).with_suffix(ATTEMPTS)
            count_file.unlink(missing_ok=True)
            if attempt:
                count_file.write_text(str(attempt + 1))
            write_atomically(folder / name, partial(image.save, format="PNG"))
        waiting = rejected
        if not waiting:
            return
    number, index = waiting[0]
    raise RuntimeError(
        f"pool of '{specs[number]['class']}': image {index} was rejected {max_attempts} times; "
        "choose another prompt or raise sampling.max_attempts"
    )


def pipeline_sampler(
    pipeline: Pipeline, sampling: Sampling, prompts: Sequence[str], arguments: Sequence[Arguments]
) -> Sampler:
    """A sampler over a pipeline: each image has a generator of its own.

    Images that the pipeline's safety checker flags and black ones are rejected.

    Args:
        prompts: of each pool.
        arguments: of each pool what else the pipeline is called with, given the indices of some
            images: a list has a value for each of them, anything else is for all.
    """
    twice = sampling.guidance_scale > 1 and not is_distilled(pipeline)

    @cache
    def read(prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            return pipeline.encode_prompt(prompt, pipeline.device, 1, twice)

    def sample(items: Sequence[Item], seeds: Sequence[int]) -> list[Image.Image | None]:
        words, negative = zip(*(read(prompts[number]) for number, _ in items), strict=True)
        more: dict[str, Any] = {}
        for number, some in itertools.groupby(items, key=lambda item: item[0]):
            for name, value in arguments[number]([index for _, index in some]).items():
                more[name] = more.get(name, []) + value if isinstance(value, list) else value
        result = pipeline(
            prompt_embeds=torch.cat(words),
            negative_prompt_embeds=torch.cat(negative) if twice else None,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **more,
        )
        flags = result.nsfw_content_detected or [False] * len(seeds)
        return [
            None if flag or np.asarray(image).max() < BLACK_LEVEL else image
            for image, flag in zip(result.images, flags, strict=True)
        ]

    return sample


def found_sampler(images: Sequence[Sequence[np.ndarray]]) -> Sampler:
    """A sampler that returns given images, by pool and index: nothing is generated."""

    def sample(items: Sequence[Item], seeds: Sequence[int]) -> list[Image.Image | None]:
        return [Image.fromarray(images[number][index]) for number, index in items]

    return sample


def technique_pools(
    study: Study,
    technique: str,
    draw: int,
    count: int,
    real_percent: float = 100,
) -> list[Pool]:
    """A pool per class of what :func:`technique_requests` asks for, made where it is missing."""
    requests = technique_requests(study, technique, draw, count, real_percent)
    return fill(study, requests)


def fill(study: Study, requests: Sequence[Request]) -> list[Pool]:
    """Make the images that the requested pools lack, personalised models first.

    All requests are of one technique. If the settings say not to keep personalised models, each is
    learnt, used and deleted before the next one is learnt.
    """
    settings, store, technique = study.settings, study.store, requests[0].technique
    sampling = technique.sampling(settings)
    kept = not technique.learns or technique.keeps_models(settings)
    assert {request.technique.name for request in requests} == {technique.name}
    pipeline = partial(loaded, technique, settings)
    groups: dict[str, list[int]] = {}  # requests of one model share its pipeline
    missing: dict[str, Request] = {}  # of models whose pools are not complete
    for position, request in enumerate(requests):
        key = digest(request.model or request.spec)
        groups.setdefault(key, []).append(position)
        if number_missing(study, request):
            missing[key] = request
    if technique.learns and kept:
        learn_models(study, list(missing.values()))
    batch = Batch(sampling.batch_size, "sampling.batch_size")
    pools: dict[int, Pool] = {}

    def personalised(request: Request) -> Pipeline:
        if request.model:
            learn_models(study, [request])  # unless it is there
        made = technique.apply(pipeline(), store.folder(technique.model_folder, request.model))
        compiled(settings, made.unet)  # of a copy
        return made

    def fill_group(key: str) -> None:
        group = [requests[position] for position in groups[key]]
        ready = cache(partial(personalised, group[0]))

        def sampler() -> Sampler:
            found = [technique.found(study, request) for request in group]
            if found[0] is not None:
                return found_sampler(found)
            prompts = [request.spec["prompt"] for request in group]
            arguments = [technique.arguments(study, request) for request in group]
            return pipeline_sampler(ready(), sampling, prompts, arguments)

        is_temporary = not kept and key in missing
        with _temporary(store, group[0]) if is_temporary else nullcontext():
            batch_key = partial(technique.batch_key, settings)
            grown = grow(store, group, sampler, batch, sampling.max_attempts, batch_key)
        pools.update(zip(groups[key], grown, strict=True))

    with one_thread(settings):
        for key in groups:
            fill_group(key)
    return [pools[position] for position in range(len(requests))]


def number_missing(study: Study, request: Request) -> int:
    """How many of the requested images the store lacks."""
    there = read_pool(study.store.folder("pools", request.spec), request.spec)
    return len(set(request.indices) - there.keys())


def learn_models(study: Study, requests: Sequence[Request]) -> None:
    """Make the personalised models that requests need, if the store has not got them."""
    store = study.store
    missing = [
        request
        for request in requests
        if not store.is_whole(
            store.folder(request.technique.model_folder, request.model), to_read=True
        )
    ]
    if not missing:
        return
    technique = missing[0].technique
    size = technique.at_once(study.settings)
    for start in range(0, len(missing), size):
        some = missing[start : start + size]

        def make(missing: list[int], folders: list[Path], some: Sequence[Request] = some) -> None:
            pipeline = loaded(technique, study.settings)
            technique.learn(study, pipeline, [some[i] for i in missing], folders)

        with one_thread(study.settings):
            store.get_all(technique.model_folder, [request.model for request in some], make)


def denoising(study: Study, request: Request) -> np.ndarray:
    """The decoded latents of a pool's first image after each sampling step.

    Only for techniques that learn no model. The image is sampled alone, so it may differ from the
    pool's own by rounding.

    Returns:
        (steps, height, width, 3) 8-bit RGB.
    """
    technique, settings = request.technique, study.settings

    def make(folder: Path) -> None:
        pipeline, frames = loaded(technique, settings), []

        def keep(pipeline: Pipeline, step: int, timestep: int, values: dict) -> dict:
            latents = values["latents"] / pipeline.vae.config.scaling_factor
            decoded = pipeline.vae.decode(latents, return_dict=False)[0]
            frames.append(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])
            return values

        arguments = technique.arguments(study, request)
        sample = pipeline_sampler(
            pipeline,
            technique.sampling(settings),
            [request.spec["prompt"]],
            [lambda some: {**arguments(some), "callback_on_step_end": keep}],
        )
        sample([(0, 0)], [image_seed(request.spec, 0, 0)])
        np.save(folder / "frames.npy", np.stack([np.asarray(frame) for frame in frames]))

    return np.load(study.store.get("denoising", request.spec, make) / "frames.npy")


@contextmanager
def _temporary(store: Store, request: Request) -> Iterator[None]:
    """Lock a temporary model against other processes while it is used, then delete it."""
    with store.lock(f"temporary-models-{digest(request.model)}"):
        yield
        store.drop(request.technique.model_folder, request.model)


loaded_pipelines: dict[str, Pipeline] = {}
MOST_LOADED = {
    "cpu": 2
}  # pipelines in memory, by device; one on all others: a GPU may not hold two
LOADED_BY = {"foundation", "device", "precision", "attention", "compile"}  # of the settings


def loaded(technique: Any, settings: Settings) -> Pipeline:
    """The pipeline that a technique starts from; the most recently loaded ones stay in memory."""
    sampling, common = technique.sampling(settings), settings.model_dump(include=LOADED_BY)
    own = [technique.kind, technique.models(settings), sampling.scheduler]
    key = digest({"technique": own, **common, "safety checker": settings.sampling.safety_checker})
    if key not in loaded_pipelines:
        while len(loaded_pipelines) >= MOST_LOADED.get(device_of(settings).type, 1):
            del loaded_pipelines[next(iter(loaded_pipelines))]
        loaded_pipelines[key] = technique.load(settings)
    return loaded_pipelines[key]
