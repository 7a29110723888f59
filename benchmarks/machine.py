"""Describe the machine that a benchmark ran on."""

import resource

from sdaug_utils.evidence import report


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, without names or paths."""
    versions = report.software()
    chosen = {name: versions[name] for name in ("python", "torch", "diffusers", "transformers")}
    return report.hardware() | chosen


def peak_memory() -> float:
    """The most memory that this process has had so far, in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
