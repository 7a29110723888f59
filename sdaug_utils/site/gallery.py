"""The first images of pools, each with its origin and the real image nearest to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdaug_utils.data.images import read_listed
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import metrics
from sdaug_utils.evidence.figures import label_of, mosaic
from sdaug_utils.generation.pool_files import read_pool
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training.features import feature_arrays

PER_POOL = 6
LARGEST = 192  # pixels of an image's side


def write_gallery(study: Study, pools: Iterable[Path], site: Path) -> list[dict[str, Any]]:
    """A sheet of images for each pool in ``site/pools``, and facts about the pool and its images.

    A sheet has a column for each of the first ``PER_POOL`` images, and below it the training image
    of the class whose features have the highest cosine similarity; there is none where the pool's
    class is none of the study's. Seeds are texts: they exceed JavaScript's largest integer.
    """
    (site / "pools").mkdir(exist_ok=True)
    real, class_names = study.data.splits["train"], study.data.class_names
    known = feature_arrays(study, real.images())[:, 0]
    found = []
    for folder in pools:
        spec = json.loads((folder / "spec.json").read_text())
        rows = dict(sorted(read_pool(folder, spec).items())[:PER_POOL])
        if not rows or spec["technique"] not in techniques():
            continue
        files = [folder / row["file_name"] for row in rows.values()]
        images = read_listed(files, [row["digest"] for row in rows.values()])
        try:
            made = list(images)
        except InputError as error:  # damaged: it is made again when it is next asked for
            print(error, file=sys.stderr)
            continue
        nearest: list[np.ndarray] = []
        similarity: list[float | None] = [None] * len(rows)
        if spec["class"] in class_names:
            own = np.flatnonzero(real.labels == class_names.index(spec["class"]))
            cosines = metrics.similarity(feature_arrays(study, images)[:, 0], known[own])
            nearest = [real.load(int(row)) for row in own[cosines.argmax(axis=1)]]
            similarity = [round(float(value), 3) for value in cosines.max(axis=1)]
        sheet = f"pools/{folder.name}.png"
        side = min(LARGEST, *(image.shape[0] for image in made))
        picture = Image.fromarray(mosaic([made, nearest], gap=0, side=side))
        picture.save(site / sheet, optimize=True)
        is_generative = techniques()[spec["technique"]].is_generative
        of_images = [
            {
                "index": index,
                "seed": row["seed"] if is_generative else "",
                "attempts": int(row["attempts"]),
                "similarity": like,
            }
            for (index, row), like in zip(rows.items(), similarity, strict=True)
        ]
        facts = {key: spec[key] for key in ("class", "draw", "prompt")}
        technique = label_of(spec["technique"])
        found.append({"technique": technique, **facts, "sheet": sheet, "images": of_images})
    return sorted(found, key=lambda pool: (pool["class"], pool["draw"], pool["prompt"]))
