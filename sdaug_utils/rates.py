"""How long each kind of work takes: measured here, on a GPU, or by the thesis's logs."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sdaug_utils.data import photos
from sdaug_utils.evidence.claims import TABLES
from sdaug_utils.params import Settings
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training import runs
from sdaug_utils.training.runs import Run

MEASURED = Path(__file__).parents[1] / "benchmarks" / "results"
COMPILATION = "compilation of a network"  # as rates have it


def seconds_by_kind(settings: Settings) -> dict[str, float]:
    """The seconds that each kind of work takes.

    An image takes ``once`` + steps * ``step`` where these were measured; else its rate is scaled by
    the number of steps.
    """
    content, steps = measured(settings), steps_of_images(settings)
    seconds = {}
    for kind, rate in content["seconds"].items():
        if isinstance(rate, dict):
            rate = rate["once"] + steps[kind] * rate["step"]
        elif kind in steps:
            rate = rate * (steps[kind] / content["steps"])
        seconds[kind] = rate
    return seconds


def measured(settings: Settings) -> dict[str, Any]:
    """A table of rates: ``source``, ``seconds``, ``steps`` of an image, ``peak FLOP/s``.

    Those of ``benchmarks/rates.py`` for small models; for models of full size those that
    ``benchmarks/gpu_check.py`` has measured, and the thesis's for the rest.
    """
    at_scale = is_at_scale(settings)
    file = MEASURED / ("gpu.json" if at_scale else "rates.json")
    logged = json.loads((TABLES / "rates-a100.json").read_text()) if at_scale else {"seconds": {}}
    if not file.exists():
        return logged
    content = json.loads(file.read_text())
    machine, missing = content["machine"], logged["seconds"].keys() - content["seconds"].keys()
    name = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores"
    rest = f"; {', '.join(sorted(missing))}: {logged['source']}" if missing else ""
    seconds = logged["seconds"] | content["seconds"]
    return {**logged, **content, "source": f"{name}, measured{rest}", "seconds": seconds}


def steps_of_images(settings: Settings) -> dict[str, int]:
    """How many steps an image takes, by the kind of work that it is."""
    generative = [one for one in techniques().values() if one.is_generative]
    return {one.image_cost: one.sampling(settings).num_inference_steps for one in generative}


def is_at_scale(settings: Settings) -> bool:
    """Whether models are of Stable Diffusion's size, not the miniature's."""
    return settings.sampling.resolution >= 256


def run_seconds(study: Study, run: Run, rates: Mapping[str, float]) -> float:
    """Seconds that training a run takes, without computing its features."""
    settings, classes = runs.study_of(study, run).settings, len(study.data.class_names)
    real = len(study.data.splits["train"]) * run.real_percent / 100
    images = real + classes * run.synthetic_per_class
    if run.task == "segmentation":
        segmenter = settings.segmenter
        seen = segmenter.max_train_steps * segmenter.batch_size
        if run.protocol == "published":
            seen = int(segmenter.max_epochs * images)
        return seen * rates["image, training of a segmenter"]
    if run.protocol != "published":
        controlled = settings.classifier.controlled
        updates = controlled.max_train_steps
        if run.updates_as:
            updates = settings.classifier.published.max_updates(int(images))
        seen = updates * controlled.batch_size
        return seen * rates["image, training of a head"]
    published = settings.classifier.published
    tested = published.max_epochs * len(study.data.splits["validation"])
    tested += len(study.data.splits["test"])
    trained = published.max_updates(int(images)) * published.batch_size
    scale = (published.image_size / settings.classifier.image_size) ** 2  # of pixels
    whole = trained * rates["image, training of the whole network"]
    return scale * (whole + tested * rates["feature"])


def features_to_compute(
    study: Study, asked: Iterable[Run], views: dict[tuple[Any, ...], int]
) -> int:
    """How many features must be computed for the heads of runs, unaugmented real images aside.

    CutMix is estimated as other augmentations are.

    ``views`` are numbers of views that are counted already: by pool (its images as they are) or by
    augmentation and image, which is a row of the train split, or a pool and a place in it. It is
    updated in place, so that what groups of runs share is counted once.
    """
    classes = len(study.data.class_names)
    before = sum(views.values())
    for run in asked:
        own = runs.study_of(study, run)
        settings, percent = own.settings.classifier, runs.pool_percent(own, run)
        seen_by = runs.features_by(own)
        # The first class's pool stands for those of all classes.
        pool = (*runs.pool_keys(study, run)[:1], percent, *seen_by)
        if run.augmentation in ("none", "mixup"):  # which mixes features
            here = classes * run.num_made
            views[pool] = max(views.get(pool, 0), here)  # one view of each image
            continue
        made = itertools.product(range(classes), range(run.synthetic_per_class))
        rows = runs.real_rows(study, run).tolist()
        number = len(rows) + classes * run.synthetic_per_class
        for image in (*rows, *((*pool, *one) for one in made)):
            key = (run.augmentation, *seen_by, image)
            is_synthetic = isinstance(image, tuple)
            wanted_views = settings.controlled.num_views(number, synthetic=is_synthetic)
            views[key] = max(views.get(key, 0), wanted_views)
    return sum(views.values()) - before


def thesis_hours(experiment: str) -> float:
    """GPU hours in the thesis's run logs: training, and what they tell of generation."""
    logged = pd.read_csv(TABLES / "published_results.csv")
    logged = logged[logged["experiment"] == experiment].drop_duplicates("run")
    per_class = logged[["generation_seconds_per_class_median", "finetune_seconds_per_class_mean"]]
    sizes = {name: count for name, (count, _) in photos.SIZES.items()}
    num_classes = logged["dataset"].map(sizes).astype(float)  # an empty column would hold objects
    generation = per_class.fillna(0).sum(axis=1) * num_classes
    return float(logged["elapsed_train_seconds"].fillna(0).sum() + generation.sum()) / 3600
