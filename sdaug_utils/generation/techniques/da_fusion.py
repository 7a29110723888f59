"""DA-Fusion: noisy real images, denoised with a learnt word (Trabucco et al., ICLR 2024)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from sdaug_utils.data.images import digests
from sdaug_utils.generation.technique import Request, Section, initial_images, require_a_step
from sdaug_utils.generation.techniques.textual_inversion import TextualInversion
from sdaug_utils.params import Parameters, Settings
from sdaug_utils.store import digest
from sdaug_utils.study import Study

Strength = Annotated[float, Field(gt=0, le=1)]  # of the noise: 1 leaves nothing of the image


class DAFusionSettings(Parameters):
    """Other settings are those of ``textual_inversion``, whose words it shares."""

    strengths: list[Strength] = Field(default=[0.25, 0.5, 0.75, 1.0], min_length=1)


class DAFusion(TextualInversion):
    """Image i begins as a real one of the subset, with a strength drawn from ``strengths``."""

    name, label, colour, marker = "da-fusion", "DA-Fusion", "#5b7f3a", "H"
    section: ClassVar[Section] = ("da_fusion", DAFusionSettings)
    inputs, kind = "all", "StableDiffusionImg2ImgPipeline"
    model_folder = TextualInversion.name

    def strengths(self, settings: Settings) -> list[float]:
        """One of them is drawn for each image."""
        return self.of(settings).strengths

    def strength(self, settings: Settings, index: int) -> float:
        """The strength of image ``index``."""
        strengths = self.strengths(settings)
        return strengths[int(digest({"strength of image": index})[:8], 16) % len(strengths)]

    def batch_key(self, settings: Settings, index: int) -> float:
        return self.strength(settings, index)

    def check(self, settings: Settings) -> None:
        super().check(settings)
        require_a_step(self.section[0], min(self.strengths(settings)), settings)

    def extra_spec(self, study: Study, rows: np.ndarray) -> dict[str, Any]:
        real = study.data.splits["train"].images(rows)
        return {"images": digests(real), "strengths": self.strengths(study.settings)}

    def arguments(self, study: Study, request: Request) -> Callable[[Sequence[int]], dict]:
        return lambda some: {
            "image": initial_images(study, request, some),
            "strength": self.strength(study.settings, some[0]),  # the same for a whole batch
        }
