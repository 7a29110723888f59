"""Real guidance: images begin as noisy real ones, not as noise alone (He et al., ICLR 2023)."""

from typing import Any

import numpy as np
from pydantic import Field

from sdaug_utils.data.images import digests
from sdaug_utils.generation.technique import (
    Request,
    Study,
    Technique,
    initial_images,
    require_a_step,
)
from sdaug_utils.params import Parameters, Settings


class Strength(Parameters):
    strength: float = Field(default=0.5, gt=0, le=1)  # of the noise: 1 leaves nothing of the image


class RealGuidance(Technique):
    name, label, colour, marker = "real-guidance", "Real guidance", "#2a9d9d", "d"
    section = ("real_guidance", Strength)
    inputs, kind = "all", "StableDiffusionImg2ImgPipeline"

    def check(self, settings: Settings) -> None:
        require_a_step(self.section[0], self.of(settings).strength, settings)

    def extra_spec(self, study: Study, rows: np.ndarray) -> dict[str, Any]:
        real = study.data.splits["train"].images(rows)
        return {"images": digests(real), **self.of(study.settings).model_dump()}

    def arguments(self, study: Study, request: Request) -> Any:
        strength = self.of(study.settings).strength
        return lambda some: {"image": initial_images(study, request, some), "strength": strength}
