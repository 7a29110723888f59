"""Describe the machine that a benchmark ran on."""

from sdaug_utils.evidence import report


def describe() -> dict[str, object]:
    """Processor, cores, memory and versions, without names or paths."""
    versions = report.software()
    chosen = {name: versions[name] for name in ("python", "torch", "diffusers", "transformers")}
    return report.hardware() | chosen
