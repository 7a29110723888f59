"""Synthetic images: a pool per technique, class and draw.

A pool is a sequence: image i depends only on the pool's specification and i. Asking for 50 after
10 adds 40. A draw is one random subset of the real images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdaug_utils.compute import Batch, device_of, one_thread
from sdaug_utils.generation.foundation import Pipeline, compile_if_asked, is_distilled
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
BLACK_LEVEL = 8  # of 255: an image that is darker everywhere is black, hence rejected

Item = tuple[int, int]  # the number of a pool and the index of one of its images
Sampler = Callable[[Sequence[Item], Sequence[int]], list[Image.Image | None]]
"""Makes an image from each (item, seed); None where the image is rejected."""
Arguments = Callable[[Sequence[int]], dict[str, Any]]  # of a pipeline, for images by index


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
    padded with copies of its last image. Only images with equal ``batch_key(index)`` share a batch.
    ``make_sampler`` is called only if an image is missing. ``class`` and ``prompt`` of the
    requests' specifications go into the metadata.
    Raises RuntimeError if an image was rejected ``max_attempts`` times.
    """
    specs = [request.spec for request in requests]
    folders = [store.folder("pools", spec) for spec in specs]
    maker = _Maker(store, specs, folders, cache(make_sampler), batch, max_attempts, batch_key)

    def read() -> list[dict[int, Row]]:
        return [read_pool(*one) for one in zip(folders, specs, strict=True)]

    def absent(known: Sequence[Collection[int]]) -> list[Item]:
        wanted = [set(request.indices) for request in requests]
        return [(n, i) for n, some in enumerate(known) for i in sorted(wanted[n].difference(some))]

    rows = read()
    while missing := absent(rows):
        blocks = {f"pools-{folders[number].name}-{index // BLOCK}" for number, index in missing}
        with store.lock(*blocks):
            maker.make(absent(read()))  # others may have made some
        rows = read()
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


@dataclass(frozen=True)
class _Maker:
    """Makes images of some pools, whose locks are held."""

    store: Store
    specs: Sequence[Spec]
    folders: Sequence[Path]
    sampler: Callable[[], Sampler]
    batch: Batch
    max_attempts: int
    batch_key: Callable[[int], Any]

    def make(self, items: Sequence[Item]) -> None:
        """Forget damaged images, delete temporary files of killed processes, then make images."""
        groups: dict[Any, list[Item]] = {}
        for number in {number for number, _ in items}:
            folder, missing = self.folders[number], {i for n, i in items if n == number}
            folder.mkdir(parents=True, exist_ok=True)
            listed = read_listing(folder)
            if not missing.isdisjoint(listed):  # they are damaged
                write_listing({i: listed[i] for i in listed.keys() - missing}, folder)
            with self.store.lock(f"pools-{folder.name}-spec"):
                write_spec(folder, {**self.specs[number], "batch_size": self.batch.size})
        for number, index in items:
            file = self.folders[number] / file_name(index)
            for leftover in file.parent.glob(f".{file.name}.*"):
                leftover.unlink()
            if file.exists():
                self.store.report_damaged(file)
            groups.setdefault(self.batch_key(index), []).append((number, index))
        for group in groups.values():
            self.batch.run(self.make_batch, group)

    def make_batch(self, items: Sequence[Item]) -> Sequence[Item]:
        """Make one batch; try rejected images again with new seeds."""
        waiting = list(items)
        for attempt in range(self.max_attempts):
            filled = waiting + [waiting[-1]] * (self.batch.size - len(waiting))
            seeds = [image_seed(self.specs[number], index, attempt) for number, index in filled]
            rejected = []
            for item, image in zip(waiting, self.sampler()(filled, seeds), strict=False):
                if image is None:
                    rejected.append(item)
                    continue
                number, index = item
                file = self.folders[number] / file_name(index)
                count_file = file.with_suffix(ATTEMPTS)
                count_file.unlink(missing_ok=True)
                if attempt:
                    count_file.write_text(str(attempt + 1))
                write_atomically(file, partial(image.save, format="PNG"))
            waiting = rejected
            if not waiting:
                return items
        number, index = waiting[0]
        raise RuntimeError(
            f"pool of '{self.specs[number]['class']}': image {index} was rejected "
            f"{self.max_attempts} times; choose another prompt or raise sampling.max_attempts"
        )


def pipeline_sampler(
    pipeline: Pipeline, sampling: Sampling, prompts: Sequence[str], arguments: Sequence[Arguments]
) -> Sampler:
    """A sampler over a pipeline, with a prompt and arguments for each pool.

    Each image has a generator of its own. Black images are rejected, and those that the pipeline's
    safety checker flags. ``arguments`` are what else the pipeline is called with, given the indices
    of some images: a list has a value for each of them, anything else is for all.
    """
    uses_cfg = sampling.guidance_scale > 1 and not is_distilled(pipeline)

    @cache
    def encode(prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        with torch.no_grad():
            return pipeline.encode_prompt(prompt, pipeline.device, 1, uses_cfg)

    def sample(items: Sequence[Item], seeds: Sequence[int]) -> list[Image.Image | None]:
        words, negative = zip(*(encode(prompts[number]) for number, _ in items), strict=True)
        more: dict[str, Any] = {}
        for number, some in itertools.groupby(items, key=lambda item: item[0]):
            for name, value in arguments[number]([index for _, index in some]).items():
                more[name] = more.get(name, []) + value if isinstance(value, list) else value
        result = pipeline(
            prompt_embeds=torch.cat(words),
            negative_prompt_embeds=torch.cat(negative) if uses_cfg else None,
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
    study: Study, technique: str, draw: int, count: int, real_percent: float = 100
) -> list[Pool]:
    """A pool per class of what :func:`technique_requests` asks for, made where it is missing."""
    return fill(study, technique_requests(study, technique, draw, count, real_percent))


def fill(study: Study, requests: Sequence[Request]) -> list[Pool]:
    """Make the images that requests of one technique lack, personalised models first.

    If the settings say not to keep personalised models, each is learnt, used and deleted before the
    next one is learnt.
    """
    settings, technique = study.settings, requests[0].technique
    sampling = technique.sampling(settings)
    groups: dict[str, list[Request]] = {}  # by model; without one, each request alone
    missing: dict[str, Request] = {}  # by the model: one of those that lack images
    for request in requests:
        key = digest(request.model or request.spec)
        groups.setdefault(key, []).append(request)
        if number_missing(study, request):
            missing[key] = request
    is_kept = not technique.learns or technique.keeps_models(settings)
    if technique.learns and is_kept:
        learn_models(study, list(missing.values()))
    batch = Batch(sampling.batch_size, "sampling.batch_size")
    batch_key = partial(technique.batch_key, settings)
    pools: dict[Request, Pool] = {}
    with one_thread(settings):
        for key, group in groups.items():
            sampler = partial(_sampler_of, study, group)
            is_temporary = not is_kept and key in missing
            with _temporary(study.store, group[0]) if is_temporary else nullcontext():
                grown = grow(study.store, group, sampler, batch, sampling.max_attempts, batch_key)
            pools.update(zip(group, grown, strict=True))
    return [pools[request] for request in requests]


def _sampler_of(study: Study, group: Sequence[Request]) -> Sampler:
    """What makes the images of requests that share a model, which is learnt if need be."""
    settings, technique, model = study.settings, group[0].technique, group[0].model
    found = [technique.found(study, request) for request in group]
    if found[0] is not None:
        return found_sampler(found)
    if model:
        learn_models(study, [group[0]])
    folder = study.store.folder(technique.model_folder, model)
    pipeline = technique.apply(loaded(technique, settings), folder)
    compile_if_asked(settings, pipeline.unet)  # it may be a copy
    prompts = [request.spec["prompt"] for request in group]
    arguments = [technique.arguments(study, request) for request in group]
    return pipeline_sampler(pipeline, technique.sampling(settings), prompts, arguments)


def number_missing(study: Study, request: Request) -> int:
    """How many of the requested images the store lacks."""
    there = read_pool(study.store.folder("pools", request.spec), request.spec)
    return len(set(request.indices) - there.keys())


def learn_models(study: Study, requests: Sequence[Request]) -> None:
    """Make the personalised models that requests of one technique need and the store lacks."""
    store, missing = study.store, []
    for request in requests:
        folder = store.folder(request.technique.model_folder, request.model)
        if not store.is_whole(folder, to_read=True):
            missing.append(request)
    if not missing:
        return
    technique = missing[0].technique

    def learn(some: Sequence[Request], positions: list[int], folders: list[Path]) -> None:
        pipeline = loaded(technique, study.settings)
        technique.learn(study, pipeline, [some[i] for i in positions], folders)

    size = technique.at_once(study.settings)
    with one_thread(study.settings):
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            specs = [request.model for request in some]
            store.get_all(technique.model_folder, specs, partial(learn, some))


def denoising(study: Study, request: Request) -> np.ndarray:
    """A pool's first image after each sampling step, (steps, height, width, 3) 8-bit RGB.

    Only for techniques that learn no model. The image is sampled alone, so it may differ from the
    pool's own by rounding.
    """
    technique, settings = request.technique, study.settings

    def make(folder: Path) -> None:
        pipeline, frames = loaded(technique, settings), []

        def keep(pipeline: Pipeline, step: int, timestep: int, values: dict) -> dict:
            latents = values["latents"] / pipeline.vae.config.scaling_factor
            decoded = pipeline.vae.decode(latents, return_dict=False)[0]
            frames.append(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])
            return values

        plain, prompts = technique.arguments(study, request), [request.spec["prompt"]]
        arguments = [lambda some: {**plain(some), "callback_on_step_end": keep}]
        sample = pipeline_sampler(pipeline, technique.sampling(settings), prompts, arguments)
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
LOADED_BY = {"foundation", "device", "precision", "attention", "compile"}  # of the settings


def loaded(technique: Any, settings: Settings) -> Pipeline:
    """The pipeline that a technique starts from; the most recently loaded ones stay in memory.

    A GPU may not hold two.
    """
    sampling, common = technique.sampling(settings), settings.model_dump(include=LOADED_BY)
    own = [technique.kind, technique.models(settings), sampling.scheduler]
    key = digest({"technique": own, **common, "safety checker": settings.sampling.safety_checker})
    if key not in loaded_pipelines:
        most = 2 if device_of(settings).type == "cpu" else 1
        while len(loaded_pipelines) >= most:
            del loaded_pipelines[next(iter(loaded_pipelines))]
        loaded_pipelines[key] = technique.load(settings)
    return loaded_pipelines[key]
