"""Experiment 04: numbers of synthetic images beside real ones (thesis, section 4.3.4)."""

from sdaug_utils.experiments.base import ByAmount


class GenerationPercentage(ByAmount):
    """Numbers of synthetic images at some real percentages."""

    notebook = "04-generation-percentage"
