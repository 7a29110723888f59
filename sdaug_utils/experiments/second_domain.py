"""Experiment 09: numbers of synthetic images on a second data set (thesis, section 4.3.9)."""

from sdaug_utils.experiments.base import ByAmount


class SecondDomain(ByAmount):
    """As experiment 04, on other data."""

    notebook = "09-food-101"
    domain = "second"
