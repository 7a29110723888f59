"""What the runner prints and writes: the plan before a run, the summary and the record after."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdaug_utils import plan, rates, store, units
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
    import pandas as pd

    settings = jobs[0].study.settings
    source, at_scale = rates.measured(settings)["source"], rates.is_at_scale(settings)
    label, per_second = ("GPU hours", 1 / 3600) if at_scale else ("minutes", 1 / 60)
    needed = plan.wanted(asked_for(jobs))
    work, rows = units.Work(plan.units(needed)), []
    each = plan.by_notebook(asked_for(jobs))
    for job in jobs:
        own = work.of(job.path.stem)
        counts, uses = own.counts(), each[job.path.stem].counts()
        row: dict[str, Any] = {k: f"{counts[k][0]} / {uses[k]}" for k in store.KINDS}
        row[label], row["GiB"] = own.seconds() * per_second, own.gibibytes()
        row["thesis, hours"] = rates.thesis_hours(job.path.stem)
        rows.append(row)
    table = pd.DataFrame(rows, index=[job.path.stem for job in jobs])
    shown = table if at_scale else table.drop(columns="thesis, hours")
    print("missing / all")
    print(shown.to_string(float_format="{:.1f}".format))
    print(f"\n{table[label].sum():.0f} {label}, {work.gibibytes():.1f} GiB")
    print(f"rates: {source}")
    if settings.treatment:
        print(f"treatment: {settings.treatment}")
    if at_scale:
        hours = table["thesis, hours"].sum()
        print(f"the thesis's logs: {hours:.0f} hours, one run per setting, if it is timed")
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
    wanted, free = work.gibibytes(workers), shutil.disk_usage(root).free / units.GIB
    if wanted > free:
        raise InputError(
            f"not enough disk: the plan needs {wanted:.1f} GiB in {root}, where {free:.1f} are "
            "free: set SDAUG_STORE to another folder, or dreambooth.keep_models: false"
        )


def close(
    jobs: Sequence[Job], reports: Sequence[Report], outcome: Outcome, profile: str, began: float
) -> None:
    """After a run: tables of hardware, software and claims, ``run.json``, and a summary."""
    from sdaug_utils.evidence import report

    needed = plan.wanted(asked_for(jobs))
    report.write_tables(profile, [f for study, what in needed.items() for f in what.folders(study)])
    each = plan.by_notebook(asked_for(jobs))
    used = {name: own.counts() for name, own in each.items()}
    pools = {name: sorted(f"pools/{key}" for key in own.images) for name, own in each.items()}
    _print_summary(reports, used, outcome)
    output = jobs[0].output
    _write_record(output, reports, used, pools, outcome, time.time() - began)
    print(f"\nexecuted notebooks: {_relative(output)}")
    print(f"figures and their numbers: {_relative(figures_folder(profile))}")


def _print_summary(
    reports: Sequence[Report], used: dict[str, dict[str, int]], outcome: Outcome
) -> None:
    print(f"\n{'notebook':<26} {'minutes':>7}  status")
    for report in reports:
        print(f"{report.notebook:<26} {report.minutes:>7.1f}  {report.status}")
        named = [name for name in report.figures if not name.startswith("samples-")]
        sheets = len(report.figures) - len(named)
        named += [f"{sheets} sample sheet{'s' * (sheets > 1)}"] if sheets else []
        if named:
            print(f"{'':<35} {', '.join(named)}")
    for kind, label in store.KINDS.items():
        made, asked = outcome.made.get(kind, 0), sum(counts[kind] for counts in used.values())
        print(f"{label:<26} {made:>7} made, {max(0, asked - made)} reused")
    if outcome.seconds:
        share = outcome.busy / (outcome.seconds * outcome.workers)
        print(
            f"made in {outcome.seconds / 60:.1f} minutes by {outcome.workers} workers, which were "
            f"busy for {share:.0%} of them"
        )
    for name, reason in outcome.failures.items():
        print(f"not made: {name}: {reason}")
    if outcome.left_out:
        print(f"left out, because they need a unit that failed: {len(outcome.left_out)} units")


def _write_record(
    output: Path,
    reports: Sequence[Report],
    used: dict[str, dict[str, int]],
    pools: dict[str, list[str]],
    outcome: Outcome,
    seconds: float,
) -> None:
    """``run.json``: what ran, on which commit, how long, and what it used; the report reads it.

    What was up to date keeps the minutes of the run that it is from.
    """
    from sdaug_utils.compute import peak_memory
    from sdaug_utils.evidence.report import revision

    file = output / RECORD
    known = json.loads(file.read_text()).get("notebooks", {}) if file.exists() else {}
    for report in reports:
        name, minutes = report.notebook, round(report.minutes, 1)
        if report.status == "up to date" and name in known:
            minutes = known[name]["minutes"]
        facts = {"minutes": minutes, **used[name], "status": report.status, "pools": pools[name]}
        known[name] = facts
    record = {
        **revision(),
        "ended": time.strftime("%Y-%m-%d %H:%M"),
        "minutes": round(seconds / 60, 1),
        "of which making": round(outcome.seconds / 60, 1),
        "workers": outcome.workers,
        "peak memory of a process, GiB": round(max(peak_memory(), peak_memory(True)), 2),
        "notebooks": dict(sorted(known.items())),
        "environment": {name: os.environ[name] for name in FOLDERS if os.environ.get(name)},
    }
    text = json.dumps(record, indent=1)
    store.write_atomically(file, lambda path: path.write_text(text))


def _relative(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())
