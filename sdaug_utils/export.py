"""Synthetic images for use elsewhere: a folder of class folders with ``metadata.csv``."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdaug_utils import make, plan
from sdaug_utils.errors import InputError
from sdaug_utils.generation.pool_files import Pool
from sdaug_utils.generation.pools import fill
from sdaug_utils.generation.technique import Request, request, technique_requests
from sdaug_utils.registry import techniques
from sdaug_utils.store import require_writable, write_csv
from sdaug_utils.study import Study

LISTING = "metadata.csv"
COLUMNS = ("file_name", "class", "technique", "prompt", "seed", "attempts")


def write_images(
    study: Study,
    technique: str,
    classes: Sequence[str] | None,
    count: int,
    into: Path,
    draw: int = 0,
    real_percent: float = 100,
) -> int:
    """Make ``count`` images of each class by a technique and write them as an image folder.

    What is in the folder of an earlier call stays; images of the same class and technique are
    replaced. torchvision's ``ImageFolder`` reads it, and ``datasets`` with the listing's columns.

    Args:
        classes: of the study's data, all of them by default; techniques that see no real image
            take any name.

    Returns:
        The number of images.

    Raises:
        InputError: an unknown technique or class, too few real images, a folder of something else.
    """
    if technique not in techniques():
        raise InputError(f"{technique}: unknown: choose from {', '.join(techniques())}")
    for name, value, valid, range_ in (
        ("--count", count, count >= 1, "at least 1"),
        ("--draw", draw, draw >= 0, "0 or more"),
        ("--real-percent", real_percent, 0 < real_percent <= 100, "more than 0, at most 100"),
    ):
        if not valid:
            raise InputError(f"{name}: {value:g}: choose {range_}")
    if into.exists() and not into.is_dir():
        raise InputError(f"--into: {into}: is a file: choose a folder")
    if into.exists() and any(into.iterdir()) and not (into / LISTING).exists():
        raise InputError(f"--into: {into}: has other files in it: choose an empty folder")
    if missing := techniques()[technique].missing_setting(study.settings):
        raise InputError(missing)
    techniques()[technique].check(study.settings)
    require_writable(into)
    requests = _requests(study, technique, classes, count, draw, real_percent)
    wanted = plan.Wanted()
    wanted.ask(requests)
    make.make_here(plan.units({study: wanted}))
    pools = fill(study, requests)
    rows = _listed(into / LISTING)
    for asked, pool in zip(requests, pools, strict=True):
        folder = into / pool.class_name
        folder.mkdir(exist_ok=True)
        for old in folder.glob(f"{technique}-[0-9]*.png"):
            old.unlink()
            rows.pop(f"{folder.name}/{old.name}", None)
        rows |= _copied(pool, asked, folder, technique)
    write_csv(into / LISTING, COLUMNS, [rows[name] for name in sorted(rows)])
    return count * len(pools)


def _requests(
    study: Study,
    technique: str,
    classes: Sequence[str] | None,
    count: int,
    draw: int,
    real_percent: float,
) -> list[Request]:
    known, own = study.data.class_names, techniques()[technique]
    wanted = list(dict.fromkeys(classes or known))
    for name in wanted:
        if name in ("", ".", "..") or "/" in name:
            raise InputError(f"--class: '{name}': cannot be the name of a folder")
    own.require(study, count)
    if unknown := [name for name in wanted if name not in known]:
        if own.inputs != "none":
            raise InputError(
                f"--class: '{unknown[0]}' has no real images, which {technique} needs: choose from "
                f"{', '.join(known)}"
            )
        prompt = study.settings.sampling.prompt
        return [request(study, own, name, prompt, range(count), draw) for name in wanted]
    every = technique_requests(study, technique, draw, count, real_percent)
    return [every[known.index(name)] for name in wanted]


def _listed(listing: Path) -> dict[str, dict[str, str]]:
    if not listing.exists():
        return {}
    with listing.open(newline="") as file:
        return {row["file_name"]: row for row in csv.DictReader(file)}


def _copied(pool: Pool, asked: Request, folder: Path, technique: str) -> dict[str, dict[str, str]]:
    """Copy a pool's images into a folder of its class, and list them."""
    rows = {}
    for number, (file, seed, attempts) in enumerate(
        zip(pool.files, pool.seeds, pool.attempts, strict=True)
    ):
        target = folder / f"{technique}-{number:05d}.png"
        shutil.copyfile(file, target)
        name = f"{folder.name}/{target.name}"
        shown = seed if techniques()[technique].is_generative else ""  # what is found has none
        facts = (name, pool.class_name, technique, asked.spec["prompt"], shown, attempts)
        rows[name] = dict(zip(COLUMNS, map(str, facts), strict=True))
    return rows
