"""The first images of pools, each with what it comes from and the real image nearest to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdaug_utils.data.images import Images, read_listed
from sdaug_utils.errors import InputError
from sdaug_utils.evidence.figures import label_of, mosaic
from sdaug_utils.generation.pool_files import read_pool
from sdaug_utils.registry import techniques
from sdaug_utils.study import Study
from sdaug_utils.training.features import feature_arrays

PER_POOL = 6
LARGEST = 192  # pixels of an image's side


def write_gallery(study: Study, pools: Iterable[Path], site: Path) -> list[dict[str, Any]]:
    """A sheet of images for each pool in ``site/pools``, and what there is to say of them.

    A sheet has a column for each of the first ``PER_POOL`` images, and below it the training image
    of the class whose features have the highest cosine similarity with its own; without one, where
    the pool's class is none of the study's. Seeds are texts: they exceed what JavaScript counts to.
    """
    (site / "pools").mkdir(exist_ok=True)
    real = study.data.splits["train"]
    directions = _directions(study, real.images())
    found = []
    for folder in pools:
        spec = json.loads((folder / "spec.json").read_text())
        rows = sorted(read_pool(folder, spec).items())[:PER_POOL]
        if not rows or spec["technique"] not in techniques():
            continue
        is_generative = techniques()[spec["technique"]].is_generative
        files = [folder / row["file_name"] for _, row in rows]
        images = read_listed(files, [row["digest"] for _, row in rows])
        try:
            made = list(images)
        except InputError as error:  # damaged: it is made again when it is next asked for
            print(error, file=sys.stderr)
            continue
        nearest = list[int]()
        similarity: list[float | None] = [None] * len(rows)
        if spec["class"] in study.data.class_names:
            own = np.flatnonzero(real.labels == study.data.class_names.index(spec["class"]))
            cosines = _directions(study, images) @ directions[own].T
            nearest = [int(row) for row in own[cosines.argmax(axis=1)]]
            similarity = [round(float(value), 3) for value in cosines.max(axis=1)]
        sheet = f"pools/{folder.name}.png"
        side = min(LARGEST, *(image.shape[0] for image in made))
        picture = mosaic([made, [real.load(row) for row in nearest]], gap=0, side=side)
        Image.fromarray(picture).save(site / sheet, optimize=True)
        found.append(
            {
                "technique": label_of(spec["technique"]),
                "class": spec["class"],
                "draw": spec["draw"],
                "prompt": spec["prompt"],
                "sheet": sheet,
                "images": [
                    {
                        "index": index,
                        "seed": row["seed"] if is_generative else "",
                        "attempts": int(row["attempts"]),
                        "similarity": like,
                    }
                    for (index, row), like in zip(rows, similarity, strict=True)
                ],
            }
        )
    return sorted(found, key=lambda pool: (pool["class"], pool["draw"], pool["prompt"]))


def _directions(study: Study, images: Images) -> np.ndarray:
    """Features of images, (n, features), each of length 1."""
    features = feature_arrays(study, images)[:, 0]
    return features / np.linalg.norm(features, axis=1, keepdims=True)
