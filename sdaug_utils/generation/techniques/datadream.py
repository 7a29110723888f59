"""DataDream: LoRA on all real images of a class, by its name (Kim et al., ECCV 2024)."""

from pydantic import Field

from sdaug_utils.generation.techniques.dreambooth import DreamBoothSettings
from sdaug_utils.generation.techniques.dreambooth_lora import DreamBoothLoRA
from sdaug_utils.params import Parameters, Settings

ALL = 10**9  # images: as many as the subset has


class DataDreamSettings(Parameters):
    """As in the authors' code, but the learning rate is constant and the text encoder frozen.

    What is not here is as in DreamBooth's section.
    """

    instance_prompt: str = Field(default="a photo of a {}", pattern=r"\{\}")
    rank: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    max_train_steps: int = Field(default=400, ge=1)  # 200 epochs of 16 images
    train_batch_size: int = Field(default=8, ge=1)


class DataDream(DreamBoothLoRA):
    """Few weights learn what a class is from all that the subset has of it; no word is new.

    A model's key does not hold the class's name, which its training prompt does: after a class has
    been renamed, take another store.
    """

    name, label, colour, marker = "datadream", "DataDream", "#a8456e", ">"
    section = ("datadream", DataDreamSettings)

    def recipe(self, settings: Settings) -> DreamBoothSettings:
        own = {**self.of(settings).model_dump(exclude={"rank"}), "prior_loss_weight": 0.0}
        return settings.dreambooth.model_copy(update=own)

    def num_inputs(self, settings: Settings) -> int:
        return ALL

    def subject_word(self, settings: Settings, class_name: str) -> str:
        return class_name
