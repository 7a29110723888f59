"""Synthetic images for use elsewhere: a folder of class folders with ``metadata.csv``."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdaug_utils import make, plan
from sdaug_utils.errors import InputError
from sdaug_utils.generation.pools import fill
from sdaug_utils.generation.technique import Request, request, technique_requests
from sdaug_utils.registry import techniques
from sdaug_utils.store import require_writable, write_csv
from sdaug_utils.study import Study

LISTING = "metadata.csv"
COLUMNS = ("file_name", "class", "technique", "prompt", "seed", "attempts")


def requests(
    study: Study,
    technique: str,
    classes: Sequence[str] | None,
    count: int,
    draw: int,
    real_percent: float,
) -> list[Request]:
    """Requests for ``count`` images of each class by a technique.

    ``classes`` are by default all of the study's data; techniques that see no real image take any
    name. Raises InputError if an argument is not valid or there are too few real images.
    """
    if technique not in techniques():
        raise InputError(f"{technique}: unknown: choose from {', '.join(techniques())}")
    for option, value, is_valid, valid in (
        ("--count", count, count >= 1, "at least 1"),
        ("--draw", draw, draw >= 0, "0 or more"),
        ("--real-percent", real_percent, 0 < real_percent <= 100, "more than 0, at most 100"),
    ):
        if not is_valid:
            raise InputError(f"{option}: {value:g}: choose {valid}")
    known, chosen = study.data.class_names, techniques()[technique]
    if missing := chosen.missing_setting(study.settings):
        raise InputError(missing)
    chosen.check(study.settings)
    wanted = list(dict.fromkeys(classes or known))
    for name in wanted:
        if name in ("", ".", "..") or "/" in name:
            raise InputError(f"--class: '{name}': cannot be the name of a folder")
    chosen.require(study, count)
    unknown = [name for name in wanted if name not in known]
    if not unknown:
        every = technique_requests(study, technique, draw, count, real_percent)
        return [every[known.index(name)] for name in wanted]
    if chosen.inputs != "none":
        raise InputError(
            f"--class: '{unknown[0]}' has no real images, which {technique} needs: choose from "
            f"{', '.join(known)}"
        )
    prompt = study.settings.sampling.prompt
    return [request(study, chosen, name, prompt, range(count), draw) for name in wanted]


def write_images(study: Study, requests: Sequence[Request], into: Path) -> int:
    """Make the images of one technique's requests and write them as an image folder.

    Images of an earlier call stay, except those of the same class and technique. torchvision's
    ``ImageFolder`` reads the folder, and ``datasets`` with the listing's columns. Returns the
    number of images. Raises InputError if the folder holds something else.
    """
    if into.exists() and not into.is_dir():
        raise InputError(f"--into: {into}: is a file: choose a folder")
    listing = into / LISTING
    if into.exists() and any(into.iterdir()) and not listing.exists():
        raise InputError(f"--into: {into}: has other files in it: choose an empty folder")
    require_writable(into)
    wanted, technique = plan.Wanted(), requests[0].technique
    wanted.ask(requests)
    make.make_here(plan.units({study: wanted}))
    rows: dict[str, dict[str, str]] = {}
    if listing.exists():
        with listing.open(newline="") as file:
            rows = {row["file_name"]: row for row in csv.DictReader(file)}
    for asked, pool in zip(requests, fill(study, requests), strict=True):
        folder = into / pool.class_name
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{technique.name}-[0-9]*.png"):
            old.unlink()
            rows.pop(f"{folder.name}/{old.name}", None)
        for number, image in enumerate(pool.files):
            name = f"{folder.name}/{technique.name}-{number:05d}.png"
            shutil.copyfile(image, into / name)
            # Images that are found, not generated, have no seed.
            seed = pool.seeds[number] if technique.is_generative else ""
            facts = (pool.class_name, technique.name, asked.spec["prompt"], seed)
            values = map(str, (name, *facts, pool.attempts[number]))
            rows[name] = dict(zip(COLUMNS, values, strict=True))
    write_csv(listing, COLUMNS, [rows[name] for name in sorted(rows)])
    return sum(len(asked.indices) for asked in requests)
