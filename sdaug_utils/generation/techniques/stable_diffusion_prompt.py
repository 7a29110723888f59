"""Plain prompts: what Stable Diffusion makes of a class's name (Rombach et al., 2022)."""

from sdaug_utils.generation.technique import Technique


class StableDiffusionPrompt(Technique):
    """The prompt of the section ``sampling`` with the class's name; no real image is seen."""

    name, label = "stable-diffusion-prompt", "Stable Diffusion prompt"
    colour, marker = "#3f9b57", "X"
