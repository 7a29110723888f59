"""ControlNet: images that follow the edges or trimap of a real one (Zhang et al., ICCV 2023)."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from sdaug_utils.compute import dtype_of
from sdaug_utils.data import control
from sdaug_utils.data.images import Split
from sdaug_utils.generation import foundation
from sdaug_utils.generation.technique import Request, Technique
from sdaug_utils.lazy import torch
from sdaug_utils.params import Parameters, Sampling, Scheduler, Settings
from sdaug_utils.study import Study


class ControlNetSettings(Parameters):
    """How images that follow a control image are drawn (thesis, section 4.3.6)."""

    canny: str
    segmentation: str
    palette: Literal["miniature", "ade20k-animal", "ade20k-food"]  # what it was trained on
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=1)
    scheduler: Scheduler
    conditioning_scale: float = Field(gt=0)


class ControlNet(Technique):
    """Image i follows the control image of a real image of the subset, in turn."""

    section = ("controlnet", ControlNetSettings)
    inputs, kind = "all", "StableDiffusionControlNetPipeline"
    image_cost = "image with a ControlNet"
    control_kind: ClassVar[str]  # the setting that names the model

    def sampling(self, settings: Settings) -> Sampling:
        keys = {"num_inference_steps", "guidance_scale", "scheduler"}
        return settings.sampling.model_copy(update=self.of(settings).model_dump(include=keys))

    def models(self, settings: Settings) -> dict[str, tuple[str, str]]:
        name = getattr(self.of(settings), self.control_kind)
        return {f"ControlNet ({self.control_kind})": (name, f"controlnet-{self.control_kind}")}

    def load(self, settings: Settings) -> foundation.Pipeline:
        import diffusers

        [model] = self.models(settings).values()
        controlnet = diffusers.ControlNetModel.from_pretrained(
            foundation.locate(*model), dtype=dtype_of(settings), use_safetensors=True
        )
        embedding = controlnet.controlnet_cond_embedding
        # A control image is one tensor in all steps: embed it once. The rest can be compiled.
        embedding.forward = torch.compiler.disable(lru_cache(maxsize=1)(embedding.forward))
        return foundation.load_pipeline(
            settings, self.sampling(settings), self.kind, controlnet=controlnet
        )

    def followed_digests(self, train: Split, rows: np.ndarray) -> list[str]:
        """A hash of what each row's control image is made from."""
        raise NotImplementedError

    def control_image(self, study: Study, row: int) -> np.ndarray:
        """8-bit RGB of shape (resolution, resolution, 3)."""
        raise NotImplementedError

    def extra_spec(self, study: Study, rows: np.ndarray) -> dict[str, Any]:
        own, [model] = self.of(study.settings), self.models(study.settings).values()
        facts = [foundation.revision(*model), own.conditioning_scale, control.CODE_VERSION]
        if own.palette != "miniature":
            facts.append(own.palette)
        controls = self.followed_digests(study.data.splits["train"], rows)
        return {"controls": controls, "controlnet": facts}

    def arguments(self, study: Study, request: Request) -> Callable[[Sequence[int]], dict]:
        plain, scale = super().arguments(study, request), self.of(study.settings).conditioning_scale

        def following(indices: Sequence[int]) -> dict[str, Any]:
            controls = [self.control_image(study, row) for row in request.source_rows(indices)]
            images = [Image.fromarray(image) for image in controls]
            return {**plain(indices), "image": images, "controlnet_conditioning_scale": scale}

        return following


class Canny(ControlNet):
    """The Canny edges of a real image (thesis, section 4.3.6)."""

    name, label, control_kind = "controlnet-canny", "ControlNet (Canny)", "canny"
    colour, marker = "#8a5aa8", "h"

    def followed_digests(self, train: Split, rows: np.ndarray) -> list[str]:
        return [train.image_digest(int(row)) for row in rows]

    def control_image(self, study: Study, row: int) -> np.ndarray:
        image = study.data.splits["train"].load(row)
        return control.canny(image, study.settings.sampling.resolution)


class Segmentation(ControlNet):
    """The trimap of a real image, in the colours that the ControlNet knows (section 4.3.8)."""

    name, control_kind = "controlnet-segmentation", "segmentation"
    label, colour, marker = "ControlNet (segmentation)", "#8a5aa8", "h"

    def followed_digests(self, train: Split, rows: np.ndarray) -> list[str]:
        return [train.trimap_digest(int(row)) for row in rows]

    def control_image(self, study: Study, row: int) -> np.ndarray:
        trimap, settings = study.data.splits["train"].trimap(row), study.settings
        palette = self.of(settings).palette
        return control.segmentation_map(trimap, settings.sampling.resolution, palette)
