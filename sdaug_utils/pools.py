"""Synthetic images: a pool per technique, class and draw.

A pool is a sequence: image i depends only on the pool's specification and i. Asking for 50 after
10 adds 40. On disk it is an ordinary image folder with ``metadata.csv``.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sdaug_utils import personalise
from sdaug_utils.datasets import digests, personalisation_inputs
from sdaug_utils.foundation import dtype_of, in_parallel, load_pipeline, revision
from sdaug_utils.params import Sampling, Settings, Technique
from sdaug_utils.store import Spec, Store, digest, write_atomically
from sdaug_utils.study import Study

if TYPE_CHECKING:
    import diffusers

CODE_VERSION = 1
COLUMNS = ("file_name", "class", "prompt", "seed", "attempts")
BLACK_LEVEL = 8  # of 255: an image that is nowhere brighter is black, hence rejected

Sampler = Callable[[Sequence[int], Sequence[int]], list[Image.Image | None]]
"""Makes an image from each (index, seed); None where the image is rejected."""


@dataclass(frozen=True)
class Pool:
    """The first images of a pool on disk, in order."""

    class_name: str
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    attempts: tuple[int, ...]

    def images(self) -> list[np.ndarray]:
        """8-bit RGB arrays of shape (height, width, 3)."""
        return [np.asarray(Image.open(file).convert("RGB")) for file in self.files]


def image_seed(spec: Spec, index: int, attempt: int) -> int:
    """The seed of one attempt at one image of a pool, in 0 to 2**63 - 1."""
    text = f"{digest(spec)}/{index}/{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_pool(folder: Path, count: int) -> dict[int, dict[str, str]]:
    """The rows of ``metadata.csv`` whose images are whole, by index, below ``count``."""
    listing = folder / "metadata.csv"
    if not listing.exists():
        return {}
    with listing.open(newline="") as file:
        rows = {int(row["file_name"].removesuffix(".png")): row for row in csv.DictReader(file)}
    return {i: rows[i] for i in sorted(rows) if i < count and _decodes(folder / _file_name(i))}


def grow(
    store: Store,
    spec: Spec,
    count: int,
    make_sampler: Callable[[], Sampler],
    batch_size: int,
    max_attempts: int,
    progress: tqdm | None = None,
) -> Pool:
    """Make the missing ones of a pool's first ``count`` images.

    Args:
        spec: what determines the images; ``class`` and ``prompt`` go into the metadata.
        make_sampler: called only if an image is missing.
        max_attempts: after so many rejections of one image the pool fails.

    Raises:
        RuntimeError: an image was rejected ``max_attempts`` times.
    """
    folder = store.folder("pools", spec)
    rows = read_pool(folder, count)
    if len(rows) < count:
        with store.lock("pools", spec):
            folder.mkdir(parents=True, exist_ok=True)
            rows = read_pool(folder, count)
            missing = [index for index in range(count) if index not in rows]
            others = read_pool(folder, 10**9)  # rows beyond count stay listed
            for leftover in folder.glob(".*"):
                leftover.unlink()  # of a process that was killed while it wrote
            record = json.dumps({**spec, "batch_size": batch_size}, indent=2)
            write_atomically(folder / "spec.json", lambda path: path.write_text(record))
            sampler = make_sampler()
            for start in range(0, len(missing), batch_size):
                made = _make_batch(
                    spec, missing[start : start + batch_size], sampler, folder, max_attempts
                )
                rows.update(made)
                others.update(made)
                _write_metadata(folder, others)
                if progress:
                    progress.update(len(made))
    ordered = [rows[index] for index in range(count)]
    return Pool(
        spec["class"],
        tuple(folder / row["file_name"] for row in ordered),
        tuple(int(row["seed"]) for row in ordered),
        tuple(int(row["attempts"]) for row in ordered),
    )


def _make_batch(
    spec: Spec, indices: Sequence[int], sampler: Sampler, folder: Path, max_attempts: int
) -> dict[int, dict[str, str]]:
    rows, waiting = {}, list(indices)
    for attempt in range(max_attempts):
        seeds = [image_seed(spec, index, attempt) for index in waiting]
        images = sampler(waiting, seeds)
        for index, seed, image in zip(waiting, seeds, images, strict=True):
            if image is not None:
                write_atomically(folder / _file_name(index), _png_writer(image))
                values = (_file_name(index), spec["class"], spec["prompt"], seed, attempt + 1)
                rows[index] = dict(zip(COLUMNS, map(str, values), strict=True))
        waiting = [index for index in waiting if index not in rows]
        if not waiting:
            return rows
    raise RuntimeError(
        f"pool of '{spec['class']}': image {waiting[0]} was rejected {max_attempts} times; "
        "choose another prompt or raise sampling.max_attempts"
    )


def _png_writer(image: Image.Image) -> Callable[[Path], None]:
    return lambda path: image.save(path, format="PNG")


def _write_metadata(folder: Path, rows: dict[int, dict[str, str]]) -> None:
    def write(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows[index] for index in sorted(rows))

    write_atomically(folder / "metadata.csv", write)


def _file_name(index: int) -> str:
    return f"{index:05d}.png"


def _decodes(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):  # what Pillow raises for truncated and for broken files
        return False
    return True


def pipeline_sampler(
    pipeline: "diffusers.StableDiffusionPipeline", prompt: str, sampling: Sampling
) -> Sampler:
    """A sampler over a pipeline: each image has a generator of its own.

    Images that the pipeline's safety checker flags and black ones are rejected.
    """

    def sample(indices: Sequence[int], seeds: Sequence[int]) -> list[Image.Image | None]:
        result = pipeline(
            prompt,
            num_images_per_prompt=len(seeds),
            height=sampling.resolution,
            width=sampling.resolution,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        flags = result.nsfw_content_detected or [False] * len(seeds)
        return [
            None if flag or np.asarray(image).max() < BLACK_LEVEL else image
            for image, flag in zip(result.images, flags, strict=True)
        ]

    return sample


def pool_spec(
    settings: Settings,
    technique: str,
    class_name: str,
    prompt: str,
    draw: int,
    personalisation: Spec | None = None,
) -> dict[str, Any]:
    """Everything that determines a pool's images; batch size and number of workers do not."""
    sampling = settings.sampling.model_dump(exclude={"prompt", "batch_size", "max_attempts"})
    return {
        "version": CODE_VERSION,
        "technique": technique,
        "class": class_name,
        "prompt": prompt,
        "draw": draw,
        "foundation": revision(settings.foundation),
        "dtype": str(dtype_of(settings)),
        "sampling": sampling,
        "personalisation": personalisation and digest(personalisation),
    }


def technique_pools(
    study: Study, technique: Technique, draw: int, count: int, progress: bool = True
) -> list[Pool]:
    """The first ``count`` images of each class by one technique, for one draw of the real subset.

    DreamBooth and textual inversion learn from the first images of the draw's shuffle, which
    every real percentage of that draw contains: nothing from outside a cell's subset leaks in.
    """
    settings, store = study.settings, study.store
    personalisations = personalisation_specs(study, technique, draw)
    specs = technique_specs(study, technique, draw)
    pipeline = _lazy_pipeline(settings)
    incomplete = [
        label
        for label, spec in enumerate(specs)
        if len(read_pool(store.folder("pools", spec), count)) < count
    ]
    if technique != "stable-diffusion-prompt" and incomplete:
        _personalise(study, technique, draw, incomplete, pipeline, progress)

    def make_sampler(label: int) -> Sampler:
        personalisation = personalisations[label]
        folder = None if personalisation is None else store.folder(technique, personalisation)
        ready = personalise.apply(pipeline(), folder)
        return pipeline_sampler(ready, specs[label]["prompt"], settings.sampling)

    sampling = settings.sampling
    total, description = count * len(incomplete), f"images: {technique}, draw {draw}"
    with tqdm(total=total, desc=description, disable=not (progress and incomplete)) as bar:

        def fill(label: int) -> Pool:
            return grow(
                store,
                specs[label],
                count,
                partial(make_sampler, label),
                sampling.batch_size,
                sampling.max_attempts,
                bar,
            )

        return in_parallel(settings, fill, range(len(specs)))


def _lazy_pipeline(settings: Settings) -> Callable[[], "diffusers.StableDiffusionPipeline"]:
    """Loads the pipeline when first asked for, once, whichever thread asks."""
    lock, load = Lock(), cache(lambda: load_pipeline(settings))

    def pipeline() -> "diffusers.StableDiffusionPipeline":
        with lock:
            return load()

    return pipeline


def technique_specs(study: Study, technique: Technique, draw: int) -> list[dict[str, Any]]:
    """The pool specification of each class for one technique and draw."""
    settings, specs = study.settings, []
    personalisations = personalisation_specs(study, technique, draw)
    for class_name, personalisation in zip(study.data.class_names, personalisations, strict=True):
        subject = class_name if personalisation is None else _placeholder(settings, technique)
        prompt = settings.sampling.prompt.format(subject)
        specs.append(pool_spec(settings, technique, class_name, prompt, draw, personalisation))
    return specs


def _placeholder(settings: Settings, technique: Technique) -> str:
    if technique == "dreambooth":
        return settings.dreambooth.instance_prompt
    return settings.textual_inversion.placeholder_token


def personalisation_specs(
    study: Study, technique: Technique, draw: int
) -> list[dict[str, Any] | None]:
    """For each class what determines its personalised model; None for plain prompts."""
    settings, train = study.settings, study.data.splits["train"]
    if technique == "stable-diffusion-prompt":
        return [None] * len(study.data.class_names)
    method = settings.dreambooth if technique == "dreambooth" else settings.textual_inversion
    class_images = None
    if technique == "dreambooth" and settings.dreambooth.prior_loss_weight > 0:
        class_images = digest(_class_images_spec(settings, draw))
    return [
        {
            "version": personalise.CODE_VERSION,
            "technique": technique,
            "foundation": revision(settings.foundation),
            "dtype": str(dtype_of(settings)),
            "settings": method.model_dump(),
            "resolution": settings.sampling.resolution,
            "class_images": class_images,
            "inputs": digests(train.images(rows)),
            "draw": draw,
        }
        for rows in personalisation_inputs(train.labels, method.num_input_images, draw)
    ]


def _personalise(
    study: Study,
    technique: Technique,
    draw: int,
    labels: Sequence[int],
    pipeline: Callable[[], "diffusers.StableDiffusionPipeline"],
    progress: bool,
) -> None:
    """Make the personalised models of some classes, if the store has not got them."""
    settings, store, train = study.settings, study.store, study.data.splits["train"]
    every_spec = personalisation_specs(study, technique, draw)
    specs = [spec for label in labels if (spec := every_spec[label]) is not None]
    num_images = specs[0]["settings"]["num_input_images"]
    inputs = personalisation_inputs(train.labels, num_images, draw)
    subjects = [train.images(inputs[label]) for label in labels]
    resolution = settings.sampling.resolution
    seeds = [int(digest(spec)[:12], 16) for spec in specs]

    if technique == "textual-inversion":

        def invert(missing: list[int], folders: list[Path]) -> None:
            personalise.textual_inversion(
                pipeline(),
                [subjects[i] for i in missing],
                settings.textual_inversion,
                resolution,
                [seeds[i] for i in missing],
                folders,
                progress=progress and f"training: {technique}, draw {draw}",
            )

        store.get_all(technique, specs, invert)
        return

    class_images = _class_images(study, draw, pipeline)
    description = f"training: {technique}, draw {draw}"
    with tqdm(total=len(specs), desc=description, disable=not progress) as bar:

        def fine_tune(position: int) -> None:
            def make(folder: Path) -> None:
                personalise.dreambooth(
                    pipeline(),
                    subjects[position],
                    class_images,
                    settings.dreambooth,
                    resolution,
                    seeds[position],
                    folder,
                )

            store.get(technique, specs[position], make)
            bar.update()

        in_parallel(settings, fine_tune, range(len(specs)))


def _class_images_spec(settings: Settings, draw: int) -> dict[str, Any]:
    return pool_spec(settings, "class-images", "prior", settings.dreambooth.class_prompt, draw)


def _class_images(
    study: Study, draw: int, pipeline: Callable[[], "diffusers.StableDiffusionPipeline"]
) -> list[np.ndarray]:
    """What the model itself makes of DreamBooth's class prompt, for prior preservation."""
    settings = study.settings
    prompt = settings.dreambooth.class_prompt
    if settings.dreambooth.prior_loss_weight == 0:
        return []
    pool = grow(
        study.store,
        _class_images_spec(settings, draw),
        settings.dreambooth.num_class_images,
        lambda: pipeline_sampler(pipeline(), prompt, settings.sampling),
        settings.sampling.batch_size,
        settings.sampling.max_attempts,
    )
    return pool.images()
