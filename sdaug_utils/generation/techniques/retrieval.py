"""Retrieval: real images from what the foundation model learnt from (Burg et al., TMLR 2023)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdaug_utils.data import corpus
from sdaug_utils.data.images import Images, shuffled
from sdaug_utils.errors import InputError
from sdaug_utils.generation.technique import Request, Technique
from sdaug_utils.params import Parameters, Settings
from sdaug_utils.study import Study


class RetrievalSettings(Parameters):
    """Where real images with captions are."""

    corpus: str | None = "miniature"  # or a folder as the hub's image folders are: data/corpus.py
    """Where it is None, images can be planned, but not be searched for."""


class Retrieval(Technique):
    """The images whose captions name the class: a reference that a generator has to beat."""

    name, label, colour, marker = "retrieval", "Retrieval (real images)", "#444444", "*"
    section = ("retrieval", RetrievalSettings)
    kind = ""  # of no pipeline
    image_cost = "image, retrieved"

    def missing_setting(self, settings: Settings) -> str:
        if self.of(settings).corpus is not None:
            return ""
        return f"retrieval.corpus: null: name a folder of images with captions in {corpus.LISTING}"

    def extra_spec(self, study: Study, rows: np.ndarray | None) -> dict[str, Any]:
        named = self.of(study.settings).corpus
        return {"corpus": named and corpus.revision(named)}

    def require(self, study: Study, count: int) -> None:
        if not self.missing_setting(study.settings):
            for class_name in study.data.class_names:
                self._naming(study, class_name, count)

    def found(self, study: Study, request: Request) -> Sequence[np.ndarray]:
        images = self._naming(study, request.spec["class"], max(request.indices, default=-1) + 1)
        [order] = shuffled(np.zeros(len(images)), request.spec["draw"])
        return images.taken(order.tolist())

    def _naming(self, study: Study, class_name: str, count: int) -> Images:
        if missing := self.missing_setting(study.settings):
            raise InputError(missing)
        images = corpus.naming(self.of(study.settings).corpus, class_name)
        if len(images) < count:
            raise InputError(
                f"retrieval.corpus: {len(images)} of its captions name '{class_name}': ask for at "
                "most that many images per class, or choose another corpus"
            )
        return images
