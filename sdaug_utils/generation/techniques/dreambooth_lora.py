"""DreamBooth by low-rank adapters of the U-Net's attention (LoRA; Hu et al., 2022)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from sdaug_utils.generation.foundation import Pipeline
from sdaug_utils.generation.technique import Section, with_shared_components
from sdaug_utils.generation.techniques.dreambooth import DreamBooth, DreamBoothSettings
from sdaug_utils.lazy import torch
from sdaug_utils.params import Parameters, Settings

FILE = "pytorch_lora_weights.safetensors"
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # as in diffusers


class LoRA(Parameters):
    """What is not here is as in DreamBooth's section."""

    rank: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    max_train_steps: int = Field(default=400, ge=1)


class DreamBoothLoRA(DreamBooth):
    """A technique of its own: few weights learn, at a rate of their own."""

    name, label = "dreambooth-lora", "DreamBooth by LoRA"
    colour, marker = "#e59a9c", "<"
    section: ClassVar[Section] = ("dreambooth_lora", LoRA)
    model_bytes = 0  # a few megabytes: not counted
    latent_cost = "latent, fine-tuning by LoRA"

    def recipe(self, settings: Settings) -> DreamBoothSettings:
        own = self.of(settings).model_dump(exclude={"rank"})
        return settings.dreambooth.model_copy(update=own)

    def extra_model_spec(self, settings: Settings, draw: int) -> dict[str, Any]:
        return {**super().extra_model_spec(settings, draw), "rank": self.of(settings).rank}

    def keeps_models(self, settings: Settings) -> bool:
        return True  # adapters are small

    def unfreeze(self, settings: Settings, unet: torch.nn.Module, seed: int) -> None:
        from peft import LoraConfig

        rank = self.of(settings).rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS))
        unet.add_adapter(config)  # type: ignore[operator]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # peft's "gaussian", from a generator of our own
            for name, weight in unet.named_parameters():
                if "lora_A" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) / rank)

    def save(self, pipeline: Pipeline, unet: Any, folder: Path) -> None:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        type(pipeline).save_lora_weights(folder, unet_lora_layers=layers)

    def apply(self, pipeline: Pipeline, folder: Path) -> Pipeline:
        adapted = with_shared_components(pipeline, unet=copy.deepcopy(pipeline.unet))
        adapted.unet.load_lora_adapter(
            folder, prefix="unet", weight_name=FILE, low_cpu_mem_usage=False
        )
        return adapted
