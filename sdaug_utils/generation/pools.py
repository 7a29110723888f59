"""Synthetic images: a pool per technique, class and draw.

A pool is a sequence: image i depends only on the pool's specification and i. Asking for 50 after
10 adds 40. On disk it is an ordinary image folder with ``metadata.csv``.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sdaug_utils.compute import Batch, in_parallel
from sdaug_utils.data.images import Images, decoded, read_images
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import TOKENIZING, Pipeline, takes_scale
from sdaug_utils.generation.technique import Request, technique_requests
from sdaug_utils.lazy import torch
from sdaug_utils.params import Sampling
from sdaug_utils.store import Spec, Store, digest, write_atomically, write_spec
from sdaug_utils.study import Study

COLUMNS = ("file_name", "class", "prompt", "seed", "attempts")
BLACK_LEVEL = 8  # of 255: an image that is nowhere brighter is black, hence rejected

Item = tuple[int, int]  # the number of a pool and the index of one of its images
Sampler = Callable[[Sequence[Item], Sequence[int]], list[Image.Image | None]]
"""Makes an image from each (item, seed); None where the image is rejected."""
Arguments = Callable[[Sequence[int]], dict[str, Any]]
Row = dict[str, str]


@dataclass(frozen=True)
class Pool:
    """Images of a pool on disk, in order."""

    class_name: str
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    attempts: tuple[int, ...]
    followed: tuple[int, ...] = ()  # the row of the train split that each image follows

    def images(self) -> Images:
        """8-bit RGB arrays of shape (height, width, 3)."""
        return read_images(self.files)


def image_seed(spec: Spec, index: int, attempt: int) -> int:
    """The seed of one attempt at one image of a pool, in 0 to 2**63 - 1."""
    text = f"{digest(spec)}/{index}/{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_pool(
    folder: Path, indices: Sequence[int] | None = None, decode: bool = True
) -> dict[int, Row]:
    """The rows of ``metadata.csv`` whose images are whole, by index; all of them by default.

    Without ``decode`` an image need only be there: enough for a plan.
    """
    listing = folder / "metadata.csv"
    if not listing.exists():
        return {}
    with listing.open(newline="") as file:
        rows = {int(row["file_name"].removesuffix(".png")): row for row in csv.DictReader(file)}
    wanted, there = rows if indices is None else indices, set(os.listdir(folder))
    listed = [i for i in wanted if i in rows and _file_name(i) in there]
    return {i: rows[i] for i in listed if not decode or _decodes(folder / _file_name(i))}


def grow(
    store: Store,
    requests: Sequence[Request],
    make_sampler: Callable[[], Sampler],
    batch: Batch,
    max_attempts: int,
    progress: tqdm | None = None,
) -> list[Pool]:
    """Make those images of some pools that are missing; the pools share a sampler and its passes.

    Every pass has the batch's size, since rounding depends on its shape: a last one is filled up.

    Args:
        requests: of each pool what determines its images (``class`` and ``prompt`` go into the
            metadata) and which images are asked for, ``range(50)`` for the first fifty.
        make_sampler: called only if an image is missing.
        max_attempts: after so many rejections of one image its pool fails.

    Raises:
        RuntimeError: an image was rejected ``max_attempts`` times.
    """
    specs = [request.spec for request in requests]
    folders = [store.folder("pools", spec) for spec in specs]
    pairs = list(zip(folders, requests, strict=True))
    rows, missing = [read_pool(folder, request.indices) for folder, request in pairs], []
    if any(len(own) < len(request.indices) for own, request in zip(rows, requests, strict=True)):
        with store.lock("pools", *specs):
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(".*"):
                    leftover.unlink()  # of a process that was killed while it wrote
            rows = [read_pool(folder) for folder in folders]  # what was not asked for stays listed
            missing = [
                (number, index)
                for number, request in enumerate(requests)
                for index in request.indices
                if index not in rows[number]
            ]
            sampler = cache(make_sampler)  # another process may have made what was missing

            def make(part: Sequence[Item]) -> Sequence[Item]:
                made = _make_batch(specs, part, sampler(), folders, max_attempts, batch.size)
                for number in {number for number, _ in part}:
                    rows[number] |= {i: row for (own, i), row in made.items() if own == number}
                    lines = [rows[number][index] for index in sorted(rows[number])]
                    write_atomically(folders[number] / "metadata.csv", partial(_write_rows, lines))
                if progress:
                    progress.update(len(part))
                return part

            for number in {number for number, _ in missing}:
                write_spec(folders[number], {**specs[number], "batch_size": batch.size})
            batch.run(make, missing)
    pools = []
    for number, (folder, request) in enumerate(pairs):
        new = [index for own, index in missing if own == number]
        store.record("images", folder, request.indices, new)
        wanted = [rows[number][index] for index in request.indices]
        pools.append(
            Pool(
                request.spec["class"],
                tuple(folder / row["file_name"] for row in wanted),
                tuple(int(row["seed"]) for row in wanted),
                tuple(int(row["attempts"]) for row in wanted),
                request.followed,
            )
        )
    return pools


def _make_batch(
    specs: Sequence[Spec],
    items: Sequence[Item],
    sampler: Sampler,
    folders: Sequence[Path],
    max_attempts: int,
    batch_size: int,
) -> dict[Item, Row]:
    rows, waiting = {}, list(items)
    for attempt in range(max_attempts):
        filled = [*waiting, *waiting[-1:] * (batch_size - len(waiting))]
        seeds = [image_seed(specs[number], index, attempt) for number, index in filled]
        for item, seed, image in zip(waiting, seeds, sampler(filled, seeds), strict=False):
            if image is not None:
                (number, index), spec = item, specs[item[0]]
                path = folders[number] / _file_name(index)
                write_atomically(path, partial(image.save, format="PNG"))
                values = (path.name, spec["class"], spec["prompt"], seed, attempt + 1)
                rows[item] = dict(zip(COLUMNS, map(str, values), strict=True))
        waiting = [item for item in waiting if item not in rows]
        if not waiting:
            return rows
    number, index = waiting[0]
    raise RuntimeError(
        f"pool of '{specs[number]['class']}': image {index} was rejected {max_attempts} times; "
        "choose another prompt or raise sampling.max_attempts"
    )


def _write_rows(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _decodes(path: Path) -> bool:
    try:
        decoded(path)
    except InputError:
        return False
    return True


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
    twice = sampling.guidance_scale > 1 and not takes_scale(pipeline)

    @cache
    def read(prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        with TOKENIZING, torch.no_grad():
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


def technique_pools(
    study: Study,
    technique: str,
    draw: int,
    count: int,
    real_percent: float = 100,
    progress: bool = True,
) -> list[Pool]:
    """A pool per class of what :func:`technique_requests` asks for, made where it is missing."""
    requests = technique_requests(study, technique, draw, count, real_percent)
    return fill(study, requests, f"{technique}, draw {draw}" if progress else None)


def fill(study: Study, requests: Sequence[Request], label: str | None = None) -> list[Pool]:
    """Make what is missing of the requested pools, personalised models first.

    All requests are of one technique. ``label`` names the progress bars; None shows none. Where
    learnt models are not to be kept, each is made, used and deleted before the next.
    """
    settings, store, technique = study.settings, study.store, requests[0].technique
    sampling = technique.sampling(settings)
    kept = not technique.learns or technique.keeps_models(settings)
    pipeline = _loaded_once(partial(technique.load, settings))
    groups: dict[str, list[int]] = {}  # requests of one model share its pipeline
    lacking: dict[str, Request] = {}  # of models whose pools are not complete
    total = 0
    for position, request in enumerate(requests):
        key, folder = digest(request.model or request.spec), store.folder("pools", request.spec)
        groups.setdefault(key, []).append(position)
        if lacks := len(request.indices) - len(read_pool(folder, request.indices, decode=False)):
            lacking[key], total = request, total + lacks
        if request.model:
            store.record("models", store.folder(technique.name, request.model), [0], [])
    if technique.learns and kept:
        learn_models(study, list(lacking.values()), pipeline, label)
    bar = tqdm(total=total, desc=f"images: {label}", disable=not (label and total))
    batch = Batch(sampling.batch_size, "sampling.batch_size")
    pools: dict[int, Pool] = {}

    def personalised(request: Request) -> Pipeline:
        if request.model:
            learn_models(study, [request], pipeline)  # unless it is there
        return technique.apply(pipeline(), store.folder(technique.name, request.model))

    def fill_group(key: str) -> None:
        group = [requests[position] for position in groups[key]]
        ready = cache(partial(personalised, group[0]))

        def sampler() -> Sampler:
            prompts = [request.spec["prompt"] for request in group]
            arguments = [technique.arguments(study, request) for request in group]
            return pipeline_sampler(ready(), sampling, prompts, arguments)

        with nullcontext() if kept or key not in lacking else _passing(store, group[0]):
            grown = grow(store, group, sampler, batch, sampling.max_attempts, bar)
        pools.update(zip(groups[key], grown, strict=True))

    with bar:
        in_parallel(settings, lambda number: fill_group(list(groups)[number]), range(len(groups)))
    return [pools[position] for position in range(len(requests))]


def learn_models(
    study: Study,
    requests: Sequence[Request],
    pipeline: Callable[[], Pipeline],
    label: str | None = None,
) -> None:
    """Make the personalised models that requests need, if the store has not got them."""
    store = study.store
    lacking = [r for r in requests if not store.folder(r.technique.name, r.model).exists()]
    if not lacking:
        return
    technique = lacking[0].technique
    size = technique.at_once(study.settings)
    steps = technique.recipe(study.settings).max_train_steps
    parts = [lacking[i : i + size] for i in range(0, len(lacking), size)]
    shown = f"training: {label}" if label else None
    with tqdm(total=len(parts) * steps, desc=shown, disable=not shown) as bar:

        def learn(number: int) -> None:
            def make(missing: list[int], folders: list[Path]) -> None:
                chosen = [parts[number][i] for i in missing]
                technique.learn(study, pipeline(), chosen, folders, bar.update)
                for folder in folders:
                    store.record("models", folder.with_suffix(""), [0], [0])

            store.get_all(technique.name, [request.model for request in parts[number]], make)

        in_parallel(study.settings, learn, range(len(parts)))


def denoising(study: Study, request: Request) -> np.ndarray:
    """How the first image of a pool comes about: what the model has in mind after each step.

    For techniques that learn no model. It is sampled alone: from the pool's own image it may differ
    by rounding.

    Returns:
        (steps, height, width, 3) 8-bit RGB.
    """
    technique, settings = request.technique, study.settings

    def make(folder: Path) -> None:
        pipeline, frames = technique.load(settings), []

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
def _passing(store: Store, request: Request) -> Iterator[None]:
    """Keep a request's model for as long as one process uses it, then delete it."""
    with store.lock("passing-models", request.model):
        yield
        store.drop(request.technique.name, request.model)


def _loaded_once(load: Callable[[], Pipeline]) -> Callable[[], Pipeline]:
    """Loads the pipeline when first asked for, once, whichever thread asks."""
    lock, loaded = Lock(), cache(load)

    def pipeline() -> Pipeline:
        with lock:
            return loaded()

    return pipeline
