"""What a technique is, and what a pool of its images is made from."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from sdaug_utils.compute import dtype_name
from sdaug_utils.data.datasets import personalisation_inputs, subset, subset_size
from sdaug_utils.data.images import shuffled
from sdaug_utils.errors import InputError
from sdaug_utils.generation.foundation import Pipeline, load_pipeline, revision
from sdaug_utils.params import Parameters, Sampling, Settings
from sdaug_utils.registry import TECHNIQUES, techniques
from sdaug_utils.store import Spec, digest
from sdaug_utils.study import Study

CODE_VERSION = 2
Section = tuple[str, type[Parameters]]  # of the settings, and what checks it
# The section's fields that pool_spec adds by itself, or that change no image:
NOT_OF_THE_IMAGES = {"prompt", "batch_size", "max_attempts", "safety_checker"}


@dataclass(frozen=True, eq=False)
class Request:
    """A pool as it is asked for: what determines it, and what it is made from."""

    study: Study  # with the settings that its images are made by
    spec: dict[str, Any]
    indices: Sequence[int]
    technique: Any  # an instance of Technique
    model: Spec  # what determines the personalised model; empty if there is none
    inputs: Sequence[np.ndarray]  # real images that it learns from
    rows: np.ndarray | None  # (N,) of the train split: image i is made from rows[i % N]

    def source_rows(self, indices: Sequence[int]) -> tuple[int, ...]:
        """The row of the train split that each image is made from; empty if made from none."""
        if self.rows is None:
            return ()
        return tuple(int(self.rows[index % len(self.rows)]) for index in indices)


class Technique:
    """All that the study knows of one way to make images; as it stands, from plain prompts.

    A subclass in a file of ``generation/techniques`` says what is different. One that has a name of
    its own is registered, and nothing else needs to know it.
    """

    name: ClassVar[str]
    label: ClassVar[str]  # in figures
    colour: ClassVar[str]
    marker: ClassVar[str]
    section: ClassVar[Section | None] = None
    inputs: ClassVar[Literal["none", "first", "all"]] = "none"
    """The images of a run's real subset that it may see: none; the first, which a model learns
    from; or all, of which image i follows one, in turn."""
    learns: ClassVar[bool] = False  # a model for each set of inputs: see personalisation.py
    kind: ClassVar[str] = "StableDiffusionPipeline"  # diffusers' class that makes its images, or ""
    image_cost: ClassVar[str] = "image by a prompt"  # a key of the plan's rates

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            TECHNIQUES[cls.name] = cls()

    @property
    def is_generative(self) -> bool:
        """Whether its images are made from seeds, not found."""
        return bool(self.kind)

    @property
    def model_folder(self) -> str:
        """The technique whose models it uses, by default its own; also their store's folder."""
        return self.name

    def of(self, settings: Settings) -> Any:
        """Its own section of the settings."""
        return getattr(settings, self.section[0]) if self.section else None

    def sampling(self, settings: Settings) -> Sampling:
        """The settings by which its images are sampled."""
        return settings.sampling

    def subject_word(self, settings: Settings, class_name: str) -> str:
        """What stands for ``{}`` in a prompt."""
        return class_name

    def models(self, settings: Settings) -> dict[str, tuple[str, str]]:
        """The models that it needs beside the foundation: name and part, by label."""
        return {}

    def missing_setting(self, settings: Settings) -> str:
        """The setting without which no image can be made, in a message; "" if there is none."""
        return ""

    def check(self, settings: Settings) -> None:
        """Raise InputError for a setting that does not go with the foundation model."""

    def source_order(self, orders: Sequence[np.ndarray], label: int) -> np.ndarray:
        """The rows of the train split that a class's images follow: by default its own.

        ``orders`` are the rows of every class, in the draw's order.
        """
        return orders[label]

    def label_weight(self, settings: Settings) -> float:
        """How much of an image's label is its class, in 0 to 1; the rest is of what it follows."""
        return 1.0

    def batch_key(self, settings: Settings, index: int) -> Any:
        """What an image must have in common with others to share a batch; by default nothing."""
        return None

    def require(self, study: Study, count: int) -> None:
        """Raise InputError if there cannot be so many images of each class."""

    def found(self, study: Study, request: Request) -> Sequence[np.ndarray] | None:
        """The images themselves, 8-bit RGB, where they are found and not made."""
        return None

    def extra_spec(self, study: Study, rows: Any) -> dict[str, Any]:
        """What else determines its images, which may follow ``rows`` of the train split."""
        return {}

    def load(self, settings: Settings) -> Pipeline:
        """The pipeline that makes its images."""
        return load_pipeline(settings, self.sampling(settings), self.kind)

    def arguments(self, study: Study, request: Request) -> Callable[[Sequence[int]], dict]:
        """What the pipeline is called with for images of given indices, beside prompt and seeds."""
        resolution = study.settings.sampling.resolution
        return lambda indices: {"height": resolution, "width": resolution}

    def apply(self, pipeline: Pipeline, folder: Path) -> Pipeline:
        """A pipeline that samples with the model in ``folder``; ``pipeline`` is not changed."""
        return with_shared_components(pipeline)


def require_a_step(section: str, strength: float, settings: Settings) -> None:
    """Raise InputError if there is too little noise for one step: images would not change."""
    steps = settings.sampling.num_inference_steps
    if strength * steps < 1:
        raise InputError(
            f"{section}: a strength of {strength:g} leaves none of {steps} steps: choose at least "
            f"{math.ceil(1000 / steps) / 1000:g}, or more steps"
        )


def initial_images(study: Study, request: Request, indices: Sequence[int]) -> list[Image.Image]:
    """The real images that those at ``indices`` begin as, resized to the output resolution."""
    train, side = study.data.splits["train"], study.settings.sampling.resolution
    followed = map(train.load, request.source_rows(indices))
    return [Image.fromarray(image).resize((side, side)) for image in followed]


def with_shared_components(pipeline: Pipeline, **parts: Any) -> Pipeline:
    """A pipeline with some parts of its own, which may work at the same time as the given one.

    It shares the others except the scheduler, which has a state.
    """
    scheduler = copy.deepcopy(pipeline.scheduler)
    every = pipeline.components | {"scheduler": scheduler} | parts
    made = type(pipeline)(**every, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def pool_spec(
    settings: Settings,
    technique: str,
    class_name: str,
    prompt: str,
    draw: int,
    sampling: Sampling | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Everything that determines a pool's images, but for rounding, which depends on batch size."""
    chosen = sampling or settings.sampling
    return {
        "version": CODE_VERSION,
        "technique": technique,
        "class": class_name,
        "prompt": prompt,
        "draw": draw,
        "foundation": revision(settings.foundation),
        "dtype": f"torch.{dtype_name(settings)}",
        "sampling": chosen.model_dump(exclude=NOT_OF_THE_IMAGES),
        **({} if chosen.safety_checker else {"safety_checker": False}),
        **more,
    }


def request(
    study: Study,
    technique: Any,
    name: str,
    prompt: str,
    indices: Sequence[int],
    draw: int = 0,
    inputs: Sequence[np.ndarray] = (),
    rows: np.ndarray | None = None,
) -> Request:
    """Images of one subject, whose ``name`` goes into the metadata as the class, by one prompt.

    In the prompt ``{}`` stands for the subject. A model learns from ``inputs``, 8-bit RGB; images
    follow ``rows`` of the train split, in turn.
    """
    settings = study.settings
    model = technique.model_spec(settings, inputs, draw) if technique.learns else {}
    more = technique.extra_spec(study, rows) | ({"personalisation": digest(model)} if model else {})
    prompt = prompt.replace("{}", technique.subject_word(settings, name))
    sampling = technique.sampling(settings)
    spec = pool_spec(settings, technique.name, name, prompt, draw, sampling, **more)
    return Request(study, spec, indices, technique, model, inputs, rows)


def technique_requests(
    study: Study, technique_name: str, draw: int, count: int, real_percent: float = 100
) -> list[Request]:
    """``count`` images of each class by a technique, for one draw of the real subset.

    Nothing from outside the draw's subset of ``real_percent`` is seen, and only as much of it as
    the technique says. Where every subset holds all the inputs of a model, it learns the same at
    every percentage.

    Where images are made from real ones, image i of a pool follows source row i mod N of the N rows
    that the pool goes through. A run may use those i whose source row is in its subset, in rising
    order, so that runs at other percentages share images.
    """
    technique = techniques()[technique_name]
    # Requests that differ only in their indices share the rest, which takes time to work out.
    requests = _of_classes(study, technique, draw, real_percent if technique.learns else 100)
    if technique.inputs != "all":
        return [replace(one, indices=range(count)) for one in requests]
    allowed = subset(study.data.splits["train"].labels, real_percent, draw)  # or InputError
    made = []
    for one in requests:
        assert one.rows is not None
        inside = np.flatnonzero(np.isin(one.rows, allowed)).tolist()
        turns = range(-(-count // len(inside)))
        indices = [turn * len(one.rows) + index for turn in turns for index in inside]
        made.append(replace(one, indices=indices[:count]))
    return made


@lru_cache(maxsize=256)
def _of_classes(study: Study, technique: Any, draw: int, real_percent: float) -> list[Request]:
    """A request without indices for each class; models learn from ``real_percent``."""
    train, names = study.data.splits["train"], study.data.class_names
    inputs: list[Sequence[np.ndarray]] = [()] * len(names)
    rows: list[np.ndarray | None] = [None] * len(names)
    if technique.learns:
        number = technique.num_inputs(study.settings)
        chosen = personalisation_inputs(train.labels, number, draw, real_percent)
        inputs = [train.images(some) for some in chosen]
    if technique.inputs == "all":
        orders = shuffled(train.labels, draw)
        rows = [technique.source_order(orders, label) for label in range(len(names))]
    prompt = study.settings.sampling.prompt
    return [
        request(study, technique, name, prompt, (), draw, inputs[label], rows[label])
        for label, name in enumerate(names)
    ]


def inputs_percent(study: Study, technique: Any, real_percent: float) -> float:
    """The real percentage that a run's images depend on; 100 where any gives the same.

    At 0 % (synthetic images alone) models learn from the whole class.
    """
    if technique.inputs == "first" and real_percent:
        smallest = int(np.bincount(study.data.splits["train"].labels).min())
        number = technique.num_inputs(study.settings)
        return real_percent if subset_size(smallest, real_percent) < number else 100
    return real_percent if technique.inputs == "all" else 100
