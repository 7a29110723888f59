"""Synthetic images: a pool per technique, class and draw.

A pool is a sequence: image i depends only on the pool's specification and i. Asking for 50 after
10 adds 40. On disk it is an ordinary image folder with ``metadata.csv``.

A pool made with control images goes round them: of n controls, image i follows control i mod n. A
cell takes only images whose controls lie inside its own real subset.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sdaug_utils import control, personalise
from sdaug_utils.datasets import (
    Images,
    decoded,
    digests,
    personalisation_inputs,
    read_images,
    subset,
    subset_size,
)
from sdaug_utils.errors import InputError
from sdaug_utils.foundation import (
    Batch,
    controlnet_name,
    controlnet_revision,
    device_of,
    dtype_of,
    in_parallel,
    load_pipeline,
    revision,
)
from sdaug_utils.params import (
    Control,
    DreamBooth,
    Personalisation,
    Sampling,
    Settings,
    Technique,
    TextualInversion,
)
from sdaug_utils.store import Spec, Store, digest, write_atomically
from sdaug_utils.study import Study

if TYPE_CHECKING:
    import diffusers

CODE_VERSION = 2
COLUMNS = ("file_name", "class", "prompt", "seed", "attempts")
NOT_OF_THE_IMAGES = {"prompt", "batch_size", "max_attempts", "safety_checker"}
NOT_OF_THE_MODEL = {
    "num_input_images",  # the inputs themselves are
    "subjects_at_once",
    "gradient_checkpointing",
    "keep_models",
    "optimizer",  # only where it is not the usual one
}
BLACK_LEVEL = 8  # of 255: an image that is nowhere brighter is black, hence rejected

Sampler = Callable[[Sequence[int], Sequence[int]], list[Image.Image | None]]
"""Makes an image from each (index, seed); None where the image is rejected."""


@dataclass(frozen=True)
class Pool:
    """Images of a pool on disk, in order."""

    class_name: str
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    attempts: tuple[int, ...]
    control_rows: tuple[int, ...] = ()  # of the train split, whose control image each follows

    def images(self) -> Images:
        """8-bit RGB arrays of shape (height, width, 3)."""
        return read_images(self.files)


@dataclass(frozen=True, eq=False)
class Request:
    """A pool as it is asked for: what determines it, and what it is made from."""

    spec: dict[str, Any]
    indices: Sequence[int]
    technique: Technique
    personalisation: Spec | None = None
    inputs: Sequence[np.ndarray] = ()  # real images that the model is personalised on
    control_rows: np.ndarray | None = None  # of the train split, in the draw's order


def image_seed(spec: Spec, index: int, attempt: int) -> int:
    """The seed of one attempt at one image of a pool, in 0 to 2**63 - 1."""
    text = f"{digest(spec)}/{index}/{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_pool(
    folder: Path, indices: Sequence[int] | None = None, decode: bool = True
) -> dict[int, dict[str, str]]:
    """The rows of ``metadata.csv`` whose images are whole, by index; all of them by default.

    Without ``decode`` an image need only be there: enough for a plan.
    """
    listing = folder / "metadata.csv"
    if not listing.exists():
        return {}
    with listing.open(newline="") as file:
        rows = {int(row["file_name"].removesuffix(".png")): row for row in csv.DictReader(file)}
    wanted = rows if indices is None else indices
    is_whole = _decodes if decode else Path.exists
    return {i: rows[i] for i in wanted if i in rows and is_whole(folder / _file_name(i))}


def grow(
    store: Store,
    spec: Spec,
    indices: Sequence[int],
    make_sampler: Callable[[], Sampler],
    batch_size: int,
    max_attempts: int,
    progress: tqdm | None = None,
) -> Pool:
    """Make those of a pool's images that are missing.

    Args:
        spec: what determines the images; ``class`` and ``prompt`` go into the metadata.
        indices: which images are asked for, ``range(50)`` for the first fifty.
        make_sampler: called only if an image is missing.
        max_attempts: after so many rejections of one image the pool fails.

    Raises:
        RuntimeError: an image was rejected ``max_attempts`` times.
    """
    folder = store.folder("pools", spec)
    rows, missing = read_pool(folder, indices), []
    if len(rows) < len(indices):
        with store.lock("pools", spec):
            folder.mkdir(parents=True, exist_ok=True)
            everything = read_pool(folder)  # images that were not asked for stay listed
            missing = [index for index in indices if index not in everything]
            for leftover in folder.glob(".*"):
                leftover.unlink()  # of a process that was killed while it wrote
            record = json.dumps({**spec, "batch_size": batch_size}, indent=2)
            write_atomically(folder / "spec.json", lambda path: path.write_text(record))
            sampler = cache(make_sampler)  # another process may have made what was missing
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                everything |= _make_batch(spec, batch, sampler(), folder, max_attempts)
                _write_metadata(folder, everything)
                if progress:
                    progress.update(len(batch))
            rows = everything
    store.record("images", spec, indices, missing)
    return _as_pool(folder, spec, [rows[index] for index in indices])


def _as_pool(folder: Path, spec: Spec, ordered: Sequence[Mapping[str, str]]) -> Pool:
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
        decoded(path)
    except InputError:
        return False
    return True


def pipeline_sampler(
    pipeline: "diffusers.StableDiffusionPipeline",
    prompt: str,
    sampling: Sampling,
    controls: Sequence[np.ndarray] = (),
    conditioning_scale: float = 1.0,
) -> Sampler:
    """A sampler over a pipeline: each image has a generator of its own.

    Images that the pipeline's safety checker flags and black ones are rejected. With control
    images (a pipeline with a ControlNet), image i follows the (i mod n)-th of them.
    """

    def sample(indices: Sequence[int], seeds: Sequence[int]) -> list[Image.Image | None]:
        condition: dict[str, Any] = {}
        if controls:
            chosen = [controls[index % len(controls)] for index in indices]
            condition = {
                "image": [Image.fromarray(image) for image in chosen],
                "controlnet_conditioning_scale": conditioning_scale,
            }
        with torch.no_grad():  # once for all images: they share the prompt
            embeddings = pipeline.encode_prompt(
                prompt, pipeline.device, len(seeds), sampling.guidance_scale > 1
            )
        result = pipeline(
            prompt_embeds=embeddings[0],
            negative_prompt_embeds=embeddings[1],
            height=sampling.resolution,
            width=sampling.resolution,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **condition,
        )
        flags = result.nsfw_content_detected or [False] * len(seeds)
        return [
            None if flag or np.asarray(image).max() < BLACK_LEVEL else image
            for image, flag in zip(result.images, flags, strict=True)
        ]

    return sample


def pool_spec(
    settings: Settings, technique: str, class_name: str, prompt: str, draw: int, **more: Any
) -> dict[str, Any]:
    """Everything that determines a pool's images; batch size and number of workers do not."""
    sampling = _sampling(settings, technique)
    return {
        "version": CODE_VERSION,
        "technique": technique,
        "class": class_name,
        "prompt": prompt,
        "draw": draw,
        "foundation": revision(settings.foundation),
        "dtype": str(dtype_of(settings)),
        "sampling": sampling.model_dump(exclude=NOT_OF_THE_IMAGES),
        **({} if sampling.safety_checker else {"safety_checker": False}),
        **more,
    }


def _sampling(settings: Settings, technique: str) -> Sampling:
    """How a technique's images are drawn: with a ControlNet in steps of its own."""
    if technique not in get_args(Control):
        return settings.sampling
    keys = {"num_inference_steps", "guidance_scale", "scheduler"}
    return settings.sampling.model_copy(update=settings.controlnet.model_dump(include=keys))


def technique_pools(
    study: Study,
    technique: Technique,
    draw: int,
    count: int,
    real_percent: float = 100,
    progress: bool = True,
) -> list[Pool]:
    """``count`` images of each class by one technique, for one draw of the real subset.

    DreamBooth and textual inversion learn from the first images of the draw's subset of
    ``real_percent``, and control images are those of it: nothing from outside a cell's subset leaks
    in. Where every subset holds all their inputs, DreamBooth and textual inversion learn the same
    at every percentage; for plain prompts it changes nothing.
    """
    requests = technique_requests(study, technique, draw, count, real_percent)
    return fill(study, requests, f"{technique}, draw {draw}" if progress else None)


def technique_requests(
    study: Study, technique: Technique, draw: int, count: int, real_percent: float = 100
) -> list[Request]:
    """What :func:`technique_pools` asks for, a request per class."""
    if technique in get_args(Personalisation):
        method = _method(study.settings, technique)
        train = study.data.splits["train"]
        number = method.num_input_images
        rows = personalisation_inputs(train.labels, number, draw, real_percent)
        prompt = study.settings.sampling.prompt
        return [
            personalised_request(study, technique, name, train.images(some), prompt, count, draw)
            for name, some in zip(study.data.class_names, rows, strict=True)
        ]
    if technique in get_args(Control):
        return _controlled_requests(study, technique, draw, count, real_percent)
    return [
        Request(_prompted_spec(study, technique, class_name, draw), range(count), technique)
        for class_name in study.data.class_names
    ]


def has_fewer_inputs(study: Study, technique: Technique, real_percent: float) -> bool:
    """Whether a class's real subset is smaller than what a personalised model is to learn from."""
    if technique not in get_args(Personalisation):
        return False
    counts = np.bincount(study.data.splits["train"].labels)
    wanted = _method(study.settings, technique).num_input_images
    return subset_size(int(counts.min()), real_percent) < wanted


def _prompted_spec(
    study: Study, technique: Technique, class_name: str, draw: int, **more: Any
) -> dict[str, Any]:
    prompt = study.settings.sampling.prompt.format(class_name)
    return pool_spec(study.settings, technique, class_name, prompt, draw, **more)


def personalised_request(
    study: Study,
    technique: Technique,
    name: str,
    inputs: Sequence[np.ndarray],
    prompt: str,
    count: int,
    draw: int = 0,
) -> Request:
    """``count`` images of a subject that a model learns from ``inputs``, 8-bit RGB arrays.

    ``prompt`` has a ``{}`` for the placeholder; ``name`` goes into the metadata as the class.
    """
    settings = study.settings
    method = _method(settings, technique)
    prior = technique != "textual-inversion" and settings.dreambooth.prior_loss_weight > 0
    personalisation = {
        "version": personalise.CODE_VERSION,
        "technique": technique,
        "foundation": revision(settings.foundation),
        "dtype": str(dtype_of(settings)),
        "settings": method.model_dump(exclude=NOT_OF_THE_MODEL),
        "resolution": settings.sampling.resolution,
        "class_images": digest(_class_images_spec(settings, draw)) if prior else None,
        "inputs": digests(inputs),
        "draw": draw,
        **_unusual(settings, technique),
    }
    placeholder = (
        settings.textual_inversion.placeholder_token
        if technique == "textual-inversion"
        else settings.dreambooth.instance_prompt
    )
    spec = pool_spec(
        settings,
        technique,
        name,
        prompt.replace("{}", placeholder),
        draw,
        personalisation=digest(personalisation),
    )
    return Request(spec, range(count), technique, personalisation, inputs)


def _method(settings: Settings, technique: str) -> DreamBooth | TextualInversion:
    if technique == "textual-inversion":
        return settings.textual_inversion
    if technique == "dreambooth-lora":
        return settings.dreambooth.model_copy(
            update=settings.dreambooth_lora.model_dump(exclude={"rank"})
        )
    return settings.dreambooth


def _unusual(settings: Settings, technique: str) -> dict[str, Any]:
    """What makes a personalised model another treatment than the papers' own."""
    unusual: dict[str, Any] = {}
    if settings.training_precision == "mixed":
        unusual["precision"] = str(personalise.half_precision(device_of(settings)))
    if technique == "dreambooth-lora":
        unusual["rank"] = settings.dreambooth_lora.rank
    if technique != "textual-inversion" and settings.dreambooth.optimizer != "adamw":
        unusual["optimizer"] = settings.dreambooth.optimizer
    return unusual


def _controlled_requests(
    study: Study, technique: Technique, draw: int, count: int, real_percent: float
) -> list[Request]:
    """Pools that go round the control images of all training images of a class.

    Of p % real images, the first n of N in the draw's order, a cell takes the rounds over the
    first n only: images 0 to n - 1, N to N + n - 1, and so on. So cells of other percentages share
    what they have in common, and none sees a control from outside its own subset.
    """
    settings, train = study.settings, study.data.splits["train"]
    order = subset(train.labels, 100, draw)
    available = subset(train.labels, real_percent, draw)
    requests = []
    for label, class_name in enumerate(study.data.class_names):
        rows = order[train.labels[order] == label]
        inside = int((train.labels[available] == label).sum())
        spec = _prompted_spec(
            study,
            technique,
            class_name,
            draw,
            controls=digests(train.images(rows))
            if technique == "controlnet-canny"
            else digests([train.trimap(int(row)) for row in rows]),
            controlnet=[
                controlnet_revision(controlnet_name(settings, technique), technique),
                settings.controlnet.conditioning_scale,
                control.CODE_VERSION,
                *({settings.controlnet.palette} - {"miniature"}),
            ],
        )
        indices = [i % inside + len(rows) * (i // inside) for i in range(count)]
        requests.append(Request(spec, indices, technique, control_rows=rows))
    return requests


def fill(study: Study, requests: Sequence[Request], label: str | None = None) -> list[Pool]:
    """Make what is missing of the requested pools, personalised models first.

    All requests are of one technique. ``label`` names the progress bars; None shows none. Where
    fine-tuned models are not to be kept, each is made, used and deleted before the next.
    """
    settings, store = study.settings, study.store
    pipeline = _lazy_pipeline(settings, requests[0].technique)
    passing = requests[0].technique == "dreambooth" and not settings.dreambooth.keep_models
    pools: dict[int, Pool] = {}
    groups: dict[str, list[int]] = {}  # requests of one model share its pipeline
    total = 0
    for position, request in enumerate(requests):
        folder = store.folder("pools", request.spec)
        found = read_pool(folder, request.indices)
        total += len(request.indices) - len(found)
        if len(found) == len(request.indices):
            store.record("images", request.spec, request.indices, [])
            ordered = [found[index] for index in request.indices]
            pools[position] = _as_pool(folder, request.spec, ordered)
        else:
            model = request.personalisation
            groups.setdefault(digest(model) if model else str(position), []).append(position)
    incomplete = [requests[position] for group in groups.values() for position in group]
    if not passing:
        _personalise(study, incomplete, pipeline, label)
    for request in requests:
        if request.personalisation:
            store.record("models", request.personalisation, [0], [])

    def ready_pipeline(request: Request) -> "diffusers.StableDiffusionPipeline":
        model = request.personalisation
        if passing:
            _personalise(study, [request], pipeline, None)
        return personalise.apply(
            pipeline(), store.folder(request.technique, model) if model else None
        )

    def make_sampler(request: Request, ready: Callable[[], Any]) -> Sampler:
        sampler = pipeline_sampler(
            ready(),
            request.spec["prompt"],
            _sampling(settings, request.technique),
            _control_images(study, request),
            settings.controlnet.conditioning_scale,
        )
        return _within(batch, sampler)

    bar = tqdm(total=total, desc=f"images: {label}", disable=not (label and incomplete))
    batch = Batch(settings.sampling.batch_size, "sampling.batch_size")

    def fill_group(number: int) -> None:
        group = list(groups.values())[number]
        first = requests[group[0]]
        ready = cache(partial(ready_pipeline, first))
        with _passing(store, first) if passing else nullcontext():
            for position in group:
                request, sampling = requests[position], settings.sampling
                pools[position] = grow(
                    store,
                    request.spec,
                    request.indices,
                    partial(make_sampler, request, ready),
                    sampling.batch_size,
                    sampling.max_attempts,
                    bar,
                )

    with bar:
        in_parallel(settings, fill_group, range(len(groups)))
    return [_with_controls(pools[i], request) for i, request in enumerate(requests)]


def _within(batch: Batch, sampler: Sampler) -> Sampler:
    """A sampler that halves its batches where memory is short."""
    return lambda indices, seeds: batch.run(
        lambda part: sampler(*zip(*part, strict=True)), list(zip(indices, seeds, strict=True))
    )


@contextmanager
def _passing(store: Store, request: Request) -> Iterator[None]:
    """Keep a request's model for as long as one process uses it, then delete it."""
    assert request.personalisation is not None
    with store.lock("passing-models", request.personalisation):
        yield
        store.drop(request.technique, request.personalisation)


def _with_controls(pool: Pool, request: Request) -> Pool:
    if request.control_rows is None:
        return pool
    rows = request.control_rows
    followed = tuple(int(rows[index % len(rows)]) for index in request.indices)
    return replace(pool, control_rows=followed)


def _control_images(study: Study, request: Request) -> list[np.ndarray]:
    """The control image of each of a request's training images, at the sampling resolution."""
    if request.control_rows is None:
        return []
    train, resolution = study.data.splits["train"], study.settings.sampling.resolution
    if request.technique == "controlnet-canny":
        return [control.canny(train.load(int(row)), resolution) for row in request.control_rows]
    return [
        control.segmentation_map(
            train.trimap(int(row)), resolution, study.settings.controlnet.palette
        )
        for row in request.control_rows
    ]


def _lazy_pipeline(
    settings: Settings, technique: Technique
) -> Callable[[], "diffusers.StableDiffusionPipeline"]:
    """Loads the pipeline when first asked for, once, whichever thread asks."""
    lock, load = Lock(), cache(lambda: load_pipeline(settings, technique))

    def pipeline() -> "diffusers.StableDiffusionPipeline":
        with lock:
            return load()

    return pipeline


def _personalise(
    study: Study,
    requests: Sequence[Request],
    pipeline: Callable[[], "diffusers.StableDiffusionPipeline"],
    label: str | None,
) -> None:
    """Make the personalised models that requests need, if the store has not got them."""
    settings, store = study.settings, study.store
    by_digest = {digest(r.personalisation): r for r in requests if r.personalisation}
    if not by_digest:
        return
    wanted = list(by_digest.values())
    specs = [request.personalisation for request in wanted if request.personalisation]
    seeds = [int(key[:12], 16) for key in by_digest]
    resolution, technique = settings.sampling.resolution, wanted[0].technique
    description, mixed = f"training: {label}", settings.training_precision == "mixed"

    if technique == "textual-inversion":
        at_once = settings.textual_inversion.subjects_at_once
        batch = Batch(at_once, "textual_inversion.subjects_at_once")
        for first in range(0, len(specs), at_once):

            def learn(chosen: Sequence[tuple[int, Path]]) -> Sequence[tuple[int, Path]]:
                personalise.textual_inversion(
                    pipeline(),
                    [wanted[i].inputs for i, _ in chosen],
                    settings.textual_inversion,
                    resolution,
                    [seeds[i] for i, _ in chosen],
                    [folder for _, folder in chosen],
                    progress=label is not None and description,
                    mixed_precision=mixed,
                )
                return chosen

            def invert(missing: list[int], folders: list[Path], first: int = first) -> None:
                chosen = [first + position for position in missing]
                batch.run(learn, list(zip(chosen, folders, strict=True)))
                for i in chosen:
                    store.record("models", specs[i], [0], [0])

            store.get_all(technique, specs[first : first + at_once], invert)
        return

    method = _method(settings, technique)
    assert isinstance(method, DreamBooth)
    rank = settings.dreambooth_lora.rank if technique == "dreambooth-lora" else None
    class_images = _class_images(study, wanted[0].spec["draw"], pipeline)
    with tqdm(total=len(specs), desc=description, disable=label is None) as bar:

        def fine_tune(position: int) -> None:
            def make(folder: Path) -> None:
                personalise.dreambooth(
                    pipeline(),
                    wanted[position].inputs,
                    class_images,
                    method,
                    resolution,
                    seeds[position],
                    folder,
                    rank,
                    mixed,
                )
                store.record("models", specs[position], [0], [0])

            store.get(technique, specs[position], make)
            bar.update()

        in_parallel(settings, fine_tune, range(len(specs)))


def _class_images_spec(settings: Settings, draw: int) -> dict[str, Any]:
    return pool_spec(settings, "class-images", "prior", settings.dreambooth.class_prompt, draw)


def _class_images(
    study: Study, draw: int, pipeline: Callable[[], "diffusers.StableDiffusionPipeline"]
) -> Sequence[np.ndarray]:
    """What the model itself makes of DreamBooth's class prompt, for prior preservation."""
    settings = study.settings
    prompt = settings.dreambooth.class_prompt
    if settings.dreambooth.prior_loss_weight == 0:
        return []
    batch = Batch(settings.sampling.batch_size, "sampling.batch_size")
    pool = grow(
        study.store,
        _class_images_spec(settings, draw),
        range(settings.dreambooth.num_class_images),
        lambda: _within(batch, pipeline_sampler(pipeline(), prompt, settings.sampling)),
        settings.sampling.batch_size,
        settings.sampling.max_attempts,
    )
    return pool.images()
