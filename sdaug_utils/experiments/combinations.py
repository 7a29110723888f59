"""Experiment 07: classical augmentation on top of synthetic images (thesis, section 4.3.7)."""

from typing import Any

from pydantic import Field

from sdaug_utils.experiments import base
from sdaug_utils.params import Augmentation, Count, Percent, TechniqueName
from sdaug_utils.study import Study


class Combinations(base.Runs):
    """Each row with and without the augmentation."""

    notebook = "07-combinations"

    augmentation: Augmentation
    # Technique, real %, synthetic images in % of the real ones:
    rows: list[tuple[TechniqueName, Percent, Count]] = Field(min_length=1)

    def arms(self, study: Study) -> list[base.Arm]:
        arms = []
        for technique, real, percent in self.rows:
            [row] = base.synthetic([technique], base.counts_of(study, {real: [percent]}))
            arms += [{**row, "augmentation": name} for name in ("none", self.augmentation)]
        return arms

    def values_allowed(self, study: Study) -> dict[str, Any]:
        technique, _, percent = self.rows[0]
        names = base.images_needed(self.grid(study))
        known = base.allowed(study, [row[1] for row in self.rows], names)
        kept = [row for row in self.rows if row[1] in known] or [(technique, 100.0, percent)]
        return {} if kept == self.rows else {"rows": [list(row) for row in kept]}
