"""Diff-Mix: a real image of one class is turned into another (Wang et al., CVPR 2024)."""

import itertools
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from sdaug_utils.generation.techniques.da_fusion import DAFusion, Strength
from sdaug_utils.params import Parameters, Settings


class DiffMixSettings(Parameters):
    """Other settings are those of ``textual_inversion``, whose words it shares."""

    strength: Strength = 0.7
    gamma: float = Field(default=0.5, gt=0)  # the label is strength ** gamma of the class


class DiffMix(DAFusion):
    """Images of the other classes, in turn, denoised with the class's learnt word.

    The label is mixed: strength ** gamma of the class, the rest of the one that the image was of
    (the paper's equation 4). The paper learns words and LoRA together; here they are words alone,
    the same as those of textual inversion.
    """

    name, label, colour, marker = "diff-mix", "Diff-Mix", "#b0763c", "p"
    section = ("diff_mix", DiffMixSettings)

    def strengths(self, settings: Settings) -> list[float]:
        return [self.of(settings).strength]

    def source_order(self, orders: Sequence[np.ndarray], label: int) -> np.ndarray:
        others = [order for number, order in enumerate(orders) if number != label]
        turns = itertools.zip_longest(*others)
        return np.array([row for turn in turns for row in turn if row is not None])

    def label_weight(self, settings: Settings) -> float:
        own = self.of(settings)
        return own.strength**own.gamma
