"""What the runner prints and writes: the plan before a run, the summary and the record after."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sdaug_utils import plan, rates, store, units
from sdaug_utils.compute import peak_memory
from sdaug_utils.errors import InputError
from sdaug_utils.make import Outcome
from sdaug_utils.notebooks import Job, Report
from sdaug_utils.study import figures_folder

RECORD = "run.json"  # beside the executed notebooks
FOLDERS = ("SDAUG_STORE", "SDAUG_OUTPUT")  # of the environment: where a run's files are


def asked_for(jobs: Sequence[Job]) -> plan.Asked:
    """The plan's input: each notebook's name, study and parameters."""
    return [(job.path.stem, job.study, job.parameters) for job in jobs]


def print_plan(jobs: Sequence[Job], workers: Sequence[int]) -> None:
    """Print, per notebook: what it needs, what the store lacks, the time, and the disk space.

    If several notebooks lack the same item, it is counted for the first of them only. For models of
    the thesis's size, the hours in the thesis's own logs are shown, too.
    """
    settings = jobs[0].study.settings
    source, at_scale = rates.measured(settings)["source"], rates.is_at_scale(settings)
    label, per_second = ("GPU hours", 1 / 3600) if at_scale else ("minutes", 1 / 60)
    needed = plan.wanted(asked_for(jobs))
    work, each, rows = units.Work(plan.units(needed)), plan.by_notebook(asked_for(jobs)), {}
    for name in (job.path.stem for job in jobs):
        own = work.of(name)
        counts, uses = own.counts(), each[name].counts()
        row: dict[str, Any] = {kind: f"{counts[kind][0]} / {uses[kind]}" for kind in store.KINDS}
        row[label], row["GiB"] = own.seconds() * per_second, own.gibibytes()
        rows[name] = row | ({"thesis, hours": rates.thesis_hours(name)} if at_scale else {})
    table = pd.DataFrame.from_dict(rows, orient="index")
    print("missing / all")
    print(table.to_string(float_format="{:.1f}".format))
    print(f"\n{table[label].sum():.0f} {label}, {work.gibibytes():.1f} GiB")
    print(f"rates: {source}")
    if settings.treatment:
        print(f"treatment: {settings.treatment}")
    if at_scale:
        hours = table["thesis, hours"].sum()
        print(f"the thesis's logs: {hours:.0f} hours, one run per setting, untimed ones aside")
    total = work.counts()["images"][1]
    unshared = sum(what.unshared for what in needed.values())
    print(
        f"{total} images in all; if each setting made its own, as in the thesis, {unshared}: "
        f"{unshared / max(total, 1):.1f} times as many"
    )
    if workers:
        print(f"\n{'GPUs' if at_scale else 'machines':>8} {'hours, at least':>16}")
    for number in workers:
        print(f"{number:>8} {work.hours_on(number):>16.1f}")


def require_disk(jobs: Sequence[Job], workers: int) -> None:
    """Raise InputError if the disk cannot hold what the plan makes."""
    root = jobs[0].study.store.root
    work = units.Work(plan.units(plan.wanted(asked_for(jobs))))
    needed, free = work.gibibytes(workers), shutil.disk_usage(root).free / units.GIB
    if needed > free:
        raise InputError(
            f"not enough disk: the plan needs {needed:.1f} GiB in {root}, where {free:.1f} are "
            "free: set SDAUG_STORE to another folder, or dreambooth.keep_models: false"
        )


def finish(
    jobs: Sequence[Job], reports: Sequence[Report], outcome: Outcome, profile: str, began: float
) -> None:
    """Write the tables of hardware, software and claims, and ``run.json``; print a summary.

    ``run.json`` says what ran, on which commit, how long, and what it used; the report reads it. A
    notebook that was up to date keeps the minutes of its own run.
    """
    from sdaug_utils.evidence import report

    needed = plan.wanted(asked_for(jobs))
    artefacts = [folder for study, what in needed.items() for folder in what.folders(study)]
    report.write_tables(profile, artefacts)
    each = plan.by_notebook(asked_for(jobs))
    used = {name: own.counts() for name, own in each.items()}
    _print_summary(reports, used, outcome)
    file = jobs[0].output / RECORD
    known = store.read_json(file).get("notebooks", {})
    for one in reports:
        name, minutes = one.notebook, round(one.minutes, 1)
        if one.status == "up to date" and name in known:
            minutes = known[name]["minutes"]
        pools = sorted(f"pools/{key}" for key in each[name].images)
        known[name] = {"minutes": minutes, **used[name], "status": one.status, "pools": pools}
    record = {
        **report.revision(),
        "ended": time.strftime("%Y-%m-%d %H:%M"),
        "minutes": round((time.time() - began) / 60, 1),
        "of which making": round(outcome.seconds / 60, 1),
        "workers": outcome.workers,
        "peak memory of a process, GiB": round(
            max(peak_memory(), peak_memory(of_children=True)), 2
        ),
        "notebooks": dict(sorted(known.items())),
        "environment": {name: os.environ[name] for name in FOLDERS if os.environ.get(name)},
    }
    store.write_atomically(file, json.dumps(record, indent=1))
    print(f"\nexecuted notebooks: {os.path.relpath(file.parent)}")
    print(f"figures and their numbers: {os.path.relpath(figures_folder(profile))}")


def _print_summary(
    reports: Sequence[Report], used: dict[str, dict[str, int]], outcome: Outcome
) -> None:
    print(f"\n{'notebook':<26} {'minutes':>7}  status")
    for report in reports:
        print(f"{report.notebook:<26} {report.minutes:>7.1f}  {report.status}")
        shown = [name for name in report.figures if not name.startswith("samples-")]
        if sheets := len(report.figures) - len(shown):
            shown.append(f"{sheets} sample sheet{'s' * (sheets > 1)}")
        if shown:
            print(f"{'':<35} {', '.join(shown)}")
    for kind, label in store.KINDS.items():
        made, asked = outcome.made.get(kind, 0), sum(counts[kind] for counts in used.values())
        print(f"{label:<26} {made:>7} made, {max(0, asked - made)} reused")
    if outcome.seconds:
        minutes, workers = outcome.seconds / 60, outcome.workers
        share = outcome.busy / (outcome.seconds * workers)
        print(
            f"made in {minutes:.1f} minutes by {workers} workers, which were busy for {share:.0%}"
        )
    for name, reason in outcome.failures.items():
        print(f"not made: {name}: {reason}")
    if outcome.left_out:
        print(f"left out, because they need a unit that failed: {len(outcome.left_out)} units")
