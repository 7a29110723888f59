"""Copies: the placebo, since its images are the real ones again and show nothing new."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdaug_utils.data.images import digests
from sdaug_utils.generation.technique import Request, Study, Technique


class Copies(Technique):
    """The images of a run's own subset, in turn. What they gain is no gain of generated images."""

    name, label, colour, marker = "copies", "Copies (placebo)", "#cc79a7", "x"
    inputs, kind = "all", ""  # of no pipeline
    image_cost = "image, retrieved"

    def extra_spec(self, study: Study, rows: np.ndarray) -> dict[str, Any]:
        return {"images": digests(study.data.splits["train"].images(rows))}

    def found(self, study: Study, request: Request) -> Sequence[np.ndarray]:
        first = range(max(request.indices, default=-1) + 1)
        return study.data.splits["train"].images(request.source_rows(first))
