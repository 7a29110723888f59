"""Real guidance: images begin as noisy real ones, not as noise alone (He et al., ICLR 2023)."""

from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from sdaug_utils.data.images import digests
from sdaug_utils.generation.technique import Request, Study, Technique
from sdaug_utils.params import Parameters
from sdaug_utils.registry import register


class Strength(Parameters):
    strength: float = Field(default=0.5, gt=0, le=1)  # of the noise: 1 leaves nothing of the image


@register
class RealGuidance(Technique):
    name, label, colour, marker = "real-guidance", "Real guidance", "#2a9d9d", "d"
    section, inputs, kind = ("real_guidance", Strength), "all", "StableDiffusionImg2ImgPipeline"

    def determined_by(self, study: Study, rows: np.ndarray) -> dict[str, Any]:
        real = study.data.splits["train"].images(rows)
        return {"images": digests(real), **self.of(study.settings).model_dump()}

    def arguments(self, study: Study, request: Request) -> Any:
        real, side = study.data.splits["train"], study.settings.sampling.resolution
        strength = self.of(study.settings).strength
        begin = [Image.fromarray(image).resize((side, side)) for image in real.images(request.rows)]
        return lambda some: {"image": [begin[i % len(begin)] for i in some], "strength": strength}
