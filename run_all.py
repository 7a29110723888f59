#!/usr/bin/env python
"""Run the study's notebooks with papermill, in order, and regenerate every figure and table.

    python run_all.py                         all notebooks, miniature profile
    python run_all.py --only 03 06            some of them
    python run_all.py --dry-run               what they need and how long it takes; starts nothing
    python run_all.py --force                 what is up to date, too
    python run_all.py --profile thesis --dataset FOLDER    on one's own images

All parameters of all notebooks are checked before the first one starts. An executed notebook is an
artefact like any other: with the same code, settings, data and images it is not run again. One
that fails does not stop the others, unless --no-keep-going says so: it is kept as far as it came,
and the run ends with exit code 1.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdaug_utils import params, store
from sdaug_utils.errors import InputError

ROOT = Path(__file__).parent
NOTEBOOKS = ROOT / "notebooks"
MODULE, SOURCES = ROOT / "sdaug_utils", {".py", ".yaml", ".json", ".csv"}
FINE = ("ok", "up to date")
BEYOND = ("10", "11")  # what the thesis did not do: only where they are asked for
FOLDERS = ("SDAUG_STORE", "SDAUG_FIGURES", "SDAUG_RESULTS")
ASKED_FOR = (*FOLDERS, "SDAUG_DATASET", "SDAUG_PARAMETERS")
NEEDS_IMAGES = "needs-images"  # tag of the cells that shipped runs alone do not suffice for
AHEAD = (  # what takes seconds to import
    "torch, diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion, "
    "sdaug_utils.plan, sdaug_utils.evidence.figures"
)


@dataclass
class Job:
    """A notebook with what is injected into its parameters cell, and the whole of them, checked."""

    path: Path
    overrides: dict[str, Any]
    study: Any
    parameters: Any

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Everything that determines what comes of it, as it was before it was run."""
        import nbformat

        from sdaug_utils import compute, experiments, plan
        from sdaug_utils.evidence import prose
        from sdaug_utils.generation import foundation
        from sdaug_utils.training import cells

        settings, data = self.study.settings, self.study.data
        files = [Path(__file__), *sorted(p for p in MODULE.rglob("*") if p.suffix in SOURCES)]
        written = nbformat.read(self.path, as_version=4).cells
        sources = [prose.emptied(cell.source) for cell in written]  # numbers follow from the rest
        runs: list[str] = []
        if isinstance(self.parameters, params.Runs):  # then its runs' keys are known, too
            every = experiments.every_cell(self.study, self.parameters)
            runs = sorted({store.digest(cells.spec(self.study, cell)) for cell in every})
        return {
            "notebook": self.path.stem,
            "text": store.digest_of("\n\n".join(sources).encode()),
            "module": store.digest_of("".join(map(store.file_digest, files)).encode()),
            "libraries": {name: version(name) for name in compute.TOOLS},
            "parameters": self.parameters.model_dump(mode="json"),
            "settings": [settings.model_dump(mode="json"), compute.dtype_name(settings)],
            "profile": settings_digest(self.study.profile, self.path.stem),
            "data": [data.name, data.class_names, cells.data_digest(self.study)],
            "models": [foundation.revision(*model) for model in plan.models(settings)],
            "runs": runs,
        }


@dataclass
class Report:
    """One line of the summary."""

    notebook: str
    status: str
    minutes: float
    figures: list[str]
    where: Path
    used: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Items of each artefact of the store that it used, by kind."""
    made: dict[str, int] = field(default_factory=dict)  # how many of them, by kind


def chosen_notebooks(only: list[str] | None) -> list[Path]:
    """The thesis's notebooks in order, or those whose names begin with one of ``only``."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    for prefix in only or []:
        if not any(path.stem.startswith(prefix) for path in every):
            known = ", ".join(path.stem for path in every)
            raise InputError(f"--only: no notebook begins with '{prefix}': choose from {known}")
    if only:
        return [path for path in every if path.stem.startswith(tuple(only))]
    return [path for path in every if path.stem[:2] not in BEYOND]


def about(dataset: Path, paths: list[Path]) -> list[Path]:
    """The notebooks that can run on a folder of one's own, which has one domain."""
    left_out = {"09": "another domain"}
    if not (dataset / "trimaps").is_dir():
        left_out["08"] = "no folder 'trimaps'"
    for number, reason in sorted(left_out.items()):
        print(f"left out: {number} ({reason})")
    return [path for path in paths if path.stem[:2] not in left_out]


def check(
    paths: list[Path],
    profile: str,
    output: Path,
    protocol: str | None = None,
    dry: bool = False,
) -> list[Job]:
    """Check everything that can be checked beforehand; no work starts but for downloads.

    A dry check downloads nothing: what is not here yet is planned for by its published size.
    """
    from sdaug_utils import experiments, plan, study

    jobs: list[Job] = []
    opened: dict[str, study.Study] = {}
    absent: list[str] = []
    for path in paths:
        values, overrides = params.parameters_cell(path), params.overrides(profile, path.stem)
        if profile != values.get("profile"):
            overrides = {"profile": profile, **overrides}
        if protocol and "protocol" in values:
            overrides["protocol"] = protocol
        checked = params.check_notebook(path.stem, values | overrides)
        domain = params.domain_of(path.stem)
        if domain not in opened and dry:
            opened[domain], missing = plan.planned(profile, domain)
            absent += missing
        elif domain not in opened:
            opened[domain] = study.open_study(profile, domain=domain)
        if os.environ.get("SDAUG_DATASET"):
            changes = experiments.fitted(opened[domain], checked)
            for key, value in changes.items():
                print(f"{path.stem}: {key}: {_short(value)} in place of {_short(checked, key)}")
            overrides |= changes
            checked = params.check_notebook(path.stem, values | overrides)
        jobs.append(Job(path, overrides, opened[domain], checked))
    for job in jobs:
        experiments.check(job.study, job.parameters)
    if dry and absent:
        print(f"not here yet, planned by published sizes: {', '.join(dict.fromkeys(absent))}\n")
    elif not dry:
        for one in opened.values():
            require_models(one.settings)
        for job in jobs:
            experiments.require_techniques(job.study, job.parameters)
    for folder in (output, study.figures_folder(profile), study.results_folder(profile)):
        store.require_writable(folder)
    return jobs


def _short(value: Any, key: str | None = None) -> str:
    """A parameter, on one line."""
    return " ".join(str(getattr(value, key) if key else value).split())


def require_models(settings: params.Settings) -> None:
    """Find or download all models that a profile names.

    Raises:
        InputError: one is missing or corrupt.
    """
    from sdaug_utils import plan
    from sdaug_utils.generation import foundation
    from sdaug_utils.training import features

    for model in plan.models(settings):
        foundation.revision(*model)
    foundation.check(settings)
    for backbone in {settings.classifier.backbone, settings.segmenter.backbone}:
        if backbone != "efficientnet-lite0":  # whose weights come with the packages
            features.load_backbone(backbone)


class Kernel:
    """A kernel of its own for each notebook, started while the one before is still at work.

    By its turn it has imported what takes seconds. It talks through sockets in a folder, no ports:
    several runs may share a host.
    """

    def __init__(self) -> None:
        from jupyter_client import AsyncKernelManager, BlockingKernelClient

        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Path(self.folder.name) / "ledger"
        self.manager = AsyncKernelManager(transport="ipc", ip=f"{self.folder.name}/kernel")
        environment = os.environ | {"SDAUG_LEDGER": str(self.ledger)}
        asyncio.run(self._start(environment))
        client = BlockingKernelClient()
        client.load_connection_info(self.manager.get_connection_info())
        client.start_channels(iopub=False, stdin=False, hb=False, control=False)
        client.execute(f"import {AHEAD}", silent=True)
        client.stop_channels()

    async def _start(self, environment: dict[str, str]) -> None:
        await self.manager.start_kernel(cwd=NOTEBOOKS, env=environment)

    def stop(self) -> None:
        """End the kernel, whatever it is doing."""
        asyncio.run(self._stop())
        self.folder.cleanup()

    async def _stop(self) -> None:
        await self.manager.shutdown_kernel(now=True)


def execute(job: Job, kernel: Kernel | None, output: Path, profile: str) -> Report:
    """Run one notebook and say what became of it; what went well is kept in the store."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from sdaug_utils.study import figures_folder

    path, folder = job.path, figures_folder(profile)
    target, began, status = output / path.name, time.time(), "ok"
    target.unlink(missing_ok=True)
    (folder / f"verdicts-{path.stem[:2]}.csv").unlink(missing_ok=True)
    if kernel is None:
        return Report(path.stem, "failed: no kernel", 0, [], target)
    try:
        papermill.execute_notebook(
            path, target, job.overrides, cwd=NOTEBOOKS, progress_bar=False, km=kernel.manager
        )
    except PapermillExecutionError as error:
        status = f"failed in cell {error.cell_index}: {error.ename}: {error.evalue}"
    except Exception as error:  # a kernel that died: the other notebooks still run
        status = f"failed: {type(error).__name__}: {error}"
    used, made = read_ledger(kernel.ledger)
    written = files_written(kernel.ledger)
    if target.exists():
        tidy(target, profile, [folder / name for name in written if name.endswith(".csv")])
    if status == "ok":
        try:
            remember(job, target, [place(name, profile) for name in written], used)
        except OSError as error:  # it is done all the same, and will be run again
            print(f"{path.stem}: not kept in the store: {error}", file=sys.stderr)
    drawn = [name for name in written if name.endswith(".png")]
    minutes, status = (time.time() - began) / 60, status.splitlines()[0]
    return Report(path.stem, status, minutes, drawn, target, used, made)


def remember(
    job: Job, executed: Path, written: list[Path], used: Mapping[str, Mapping[str, list[int]]]
) -> None:
    """Keep an executed notebook with the figures and tables that it wrote, and what it used."""

    def keep(folder: Path) -> None:
        for file in (executed, *written):
            shutil.copyfile(file, folder / file.name)
        record = {"used": used, "state": state(job.study.store.root, used)}
        (folder / "used.json").write_text(json.dumps(record))

    job.study.store.get("notebooks", job.spec, keep)


def recall(job: Job, output: Path, profile: str, force: bool) -> Report | None:
    """Put an executed notebook with its figures and tables in place, if it is up to date.

    If it is not, or is not to be used, it is deleted.
    """
    kept, folder = job.study.store, job.study.store.folder("notebooks", job.spec)
    if not kept.is_whole(folder, to_read=True):
        return None
    record = json.loads((folder / "used.json").read_text())
    if force or record["state"] != state(kept.root, record["used"]):
        kept.drop("notebooks", job.spec)
        return None
    executed, drawn = output / job.path.name, []
    for file in sorted(folder.iterdir()):
        if file.suffix not in {".json", ".ipynb"}:
            target = place(file.name, profile)
            target.parent.mkdir(parents=True, exist_ok=True)
            store.write_atomically(target, partial(shutil.copyfile, file))
            drawn += [file.name] if file.suffix == ".png" else []
    store.write_atomically(executed, partial(shutil.copyfile, folder / executed.name))
    return Report(job.path.stem, "up to date", 0, drawn, executed, record["used"])


def place(name: str, profile: str) -> Path:
    """Where a file that a notebook writes belongs: raw runs, or figures and their numbers."""
    from sdaug_utils.study import figures_folder, results_folder

    folder = results_folder if name.endswith(".parquet") else figures_folder
    return folder(profile) / name


def remake(jobs: list[Job]) -> None:
    """Figures, tables and verdicts from shipped runs: nothing is generated, nothing is trained.

    Each notebook's code runs in this process, but for the cells that need images.
    """
    import matplotlib
    import nbformat

    matplotlib.use("agg")
    for job in jobs:
        names: dict[str, Any] = {"display": lambda *_: None}
        for cell in nbformat.read(job.path, as_version=4).cells:
            tags = cell.metadata.get("tags", [])
            if cell.cell_type == "code" and NEEDS_IMAGES not in tags:
                with contextlib.redirect_stdout(None):
                    exec(compile(cell.source, job.path.name, "exec"), names)
                names |= job.overrides if "parameters" in tags else {}
        print(f"{job.path.stem}: figures, tables and verdicts from its results", flush=True)


def state(root: Path, used: Mapping[str, Mapping[str, list[int]]]) -> str:
    """A hash of names, sizes and times of the images and runs that a notebook used.

    Models do not count: images are made of them, and some are deleted when theirs are made.
    """
    found = []
    for artefact, items in used.get("images", {}).items():
        found += [root / artefact / f"{item:05d}.png" for item in items]
    for artefact in used.get("runs", {}):
        found += sorted((root / artefact).glob("*"))
    facts = [(str(f), f.exists() and (f.stat().st_size, f.stat().st_mtime_ns)) for f in found]
    return store.digest_of(json.dumps(facts).encode())


def asked_for(jobs: list[Job]) -> list[tuple[str, Any, Any]]:
    """What the plan is made of: notebooks' names, studies and parameters."""
    return [(job.path.stem, job.study, job.parameters) for job in jobs]


def execute_all(
    jobs: list[Job], recalled: list[Report | None], output: Path, profile: str, keep_going: bool
) -> list[Report]:
    """Run what is not recalled, in order, to the first that fails or, to keep going, the last."""
    waiting = [job for job, report in zip(jobs, recalled, strict=True) if not report]
    reports: list[Report] = []
    ahead: Kernel | None = None
    try:
        for job, report in zip(jobs, recalled, strict=True):
            if not report:
                print(f"{job.path.stem} …", flush=True)
                kernel, ahead = ahead or start_kernel(), None
                try:
                    ahead = start_kernel() if job is not waiting[-1] else None
                    report = execute(job, kernel, output, profile)
                finally:
                    if kernel:
                        kernel.stop()
            reports.append(report)
            if report.status not in FINE and not keep_going:
                break
    finally:
        if ahead:
            ahead.stop()
    return reports


def start_kernel() -> Kernel | None:
    """A kernel, or None where none would start: its notebook's turn brings another try."""
    try:
        return Kernel()
    except Exception as error:
        print(f"no kernel: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def read_ledger(ledger: Path) -> tuple[dict[str, dict[str, list[int]]], dict[str, int]]:
    """The items of each artefact that a notebook used, and how many it made, by kind."""
    used: dict[str, dict[str, set[int]]] = {kind: {} for kind in store.KINDS}
    made: dict[str, dict[str, set[int]]] = {kind: {} for kind in store.KINDS}
    for entry in _entries(ledger):
        if "artefact" in entry:
            for items, noted in ((used, "used"), (made, "made")):
                known = items[entry["what"]].setdefault(entry["artefact"], set())
                known.update(entry[noted])
    listed = {
        kind: {artefact: sorted(items) for artefact, items in sorted(artefacts.items())}
        for kind, artefacts in used.items()
    }
    return listed, {kind: sum(map(len, artefacts.values())) for kind, artefacts in made.items()}


def files_written(ledger: Path) -> list[str]:
    """Names of the figures and tables that a notebook wrote."""
    return sorted({entry["file"] for entry in _entries(ledger) if "file" in entry})


def _entries(ledger: Path) -> Iterator[dict[str, Any]]:
    if ledger.exists():
        yield from map(json.loads, ledger.read_text().splitlines())


def source_digest(notebook: Any) -> str:
    """A hash of a notebook's code, but for the cell that papermill injects."""
    cells = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    return store.digest_of("\n\n".join(cells).encode())


def settings_digest(profile: str, notebook: str) -> str:
    """A hash of what a profile sets for a notebook."""
    sections = params.read_profile(profile)
    chosen = [sections["common"], sections.get(notebook, {})]
    return store.digest_of(json.dumps(chosen, sort_keys=True).encode())


def tidy(path: Path, profile: str, numbers: list[Path]) -> None:
    """Take out of an executed notebook what only the machine that ran it cares for.

    Progress bars keep their last state, widgets leave the picture that stands in for them, tables
    are numbered, objects lose their addresses, and metadata lose times and paths. In their stead
    they say which code and settings, and which numbers behind the figures, the outputs belong to.
    """
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    from sdaug_utils.evidence.gallery import WIDGET

    read = nbformat.read(path, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True)(read, {})
    notebook.metadata["sdaug"] = {
        "code": source_digest(notebook),
        "settings": settings_digest(profile, path.stem),
        "numbers": {file.name: store.file_digest(file) for file in sorted(numbers)},
    }
    tables: dict[str, str] = {}  # pandas names a styled one at random

    def name(found: re.Match) -> str:
        return tables.setdefault(found[0], f"T_{len(tables):05d}")

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop(WIDGET, None)
            if "text/html" in data:
                data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}", name, data["text/html"])
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "widgets", "execution"):
            part.metadata.pop(key, None)
    nbformat.write(notebook, path)


def print_summary(reports: list[Report], profile: str, outcome: Any) -> None:
    from sdaug_utils.study import figures_folder

    print(f"\n{'notebook':<26} {'minutes':>7}  status")
    for report in reports:
        print(f"{report.notebook:<26} {report.minutes:>7.1f}  {report.status}")
        named = [name for name in report.figures if not name.startswith("samples-")]
        sheets = len(report.figures) - len(named)
        named += [f"{sheets} sample sheet{'s' * (sheets > 1)}"] if sheets else []
        print(f"{'':<35} {', '.join(named)}")
    for kind, label in store.KINDS.items():
        made = sum(report.made.get(kind, 0) for report in reports) + outcome.made.get(kind, 0)
        used = sum(len(x) for report in reports for x in report.used.get(kind, {}).values())
        print(f"{label:<26} {made:>7} made, {max(0, used - made)} reused")
    if outcome.seconds:
        share = outcome.busy / (outcome.seconds * outcome.workers)
        print(
            f"made in {outcome.seconds / 60:.1f} minutes by {outcome.workers} workers, which were "
            f"busy for {share:.0%} of them"
        )
    for name, reason in outcome.failures.items():
        print(f"not made: {name}: {reason}")
    if outcome.left_out:
        print(f"left out, since they need it: {len(outcome.left_out)} tasks")
    executed = reports[0].where.parent if reports else ROOT
    print(f"\nexecuted notebooks: {_relative(executed)}")
    print(f"figures and their numbers: {_relative(figures_folder(profile))}")


def write_record(
    output: Path, profile: str, reports: list[Report], outcome: Any, minutes: float
) -> None:
    """``run.json``: what ran, on which commit, how long, and what it used; the report reads it.

    What was up to date keeps the minutes of the run that it is from.
    """
    from sdaug_utils.compute import peak_memory
    from sdaug_utils.evidence.report import revision
    from sdaug_utils.site.pages import RECORD

    file = output / RECORD
    earlier = json.loads(file.read_text()).get("notebooks", {}) if file.exists() else {}
    notebooks = {}
    for report in reports:
        facts = {
            "minutes": round(report.minutes, 1),
            **{kind: sum(map(len, report.used.get(kind, {}).values())) for kind in store.KINDS},
            "status": report.status,
            "pools": sorted(report.used.get("images", {})),
        }
        if report.status == "up to date" and report.notebook in earlier:
            facts["minutes"] = earlier[report.notebook]["minutes"]
        notebooks[report.notebook] = facts
    peak = max(peak_memory(), peak_memory(of_children=True))
    record = {
        "profile": profile,
        **revision(),
        "ended": time.strftime("%Y-%m-%d %H:%M"),
        "minutes": round(minutes, 1),
        "of which making": round(outcome.seconds / 60, 1),
        "workers": outcome.workers,
        "peak memory of a process, GiB": round(peak, 2),
        "notebooks": dict(sorted((earlier | notebooks).items())),
        "environment": {name: os.environ[name] for name in ASKED_FOR if os.environ.get(name)},
    }
    text = json.dumps(record, indent=1)
    store.write_atomically(file, lambda path: path.write_text(text))


def print_plan(jobs: list[Job], workers: list[int]) -> None:
    """What the notebooks need, what the store has not got, how long that takes, and on what disk.

    What several notebooks need is missing for the first of them alone. Where the models are those
    of the thesis, the hours in the thesis's own logs stand there, too.
    """
    import pandas as pd

    from sdaug_utils import plan, rates

    settings = jobs[0].study.settings
    source, at_scale = rates.rates(settings)[0], rates.is_at_scale(settings)
    label, per_second = ("GPU hours", 1 / 3600) if at_scale else ("minutes", 1 / 60)
    needed = plan.wanted(asked_for(jobs))
    work, rows = plan.Work(plan.units(needed)), []
    used = {name: counts for what in needed.values() for name, counts in what.used.items()}
    for job in jobs:
        own = work.of(job.path.stem)
        counts, uses = own.counts(), used[job.path.stem]
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
        print(f"the thesis's logs: {hours:.0f} hours, one run per setting; their gaps count as 0")
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


def require_disk(jobs: list[Job], workers: int) -> None:
    """Check that the disk can hold what the plan makes.

    Raises:
        InputError: it cannot.
    """
    from sdaug_utils import plan

    root = jobs[0].study.store.root
    work = plan.Work(plan.units(plan.wanted(asked_for(jobs))))
    wanted, free = work.gibibytes(workers), shutil.disk_usage(root).free / plan.GIB
    if wanted > free:
        raise InputError(
            f"not enough disk: the plan needs {wanted:.1f} GiB in {root}, where {free:.1f} are "
            "free: set SDAUG_STORE to another folder, or dreambooth.keep_models: false"
        )


def _relative(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())


def positive(text: str) -> int:
    """A whole number of at least 1, from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def command_line() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description="Run the study's notebooks.")
    parser.add_argument("--profile", default="miniature", help="params/<profile>.yaml")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of notebooks, as in 03")
    parser.add_argument("--protocol", choices=["published", "controlled"], help="how to train")
    parser.add_argument(
        *("-p", "--parameter"),
        nargs=2,
        action="append",
        default=[],
        metavar=("SECTION.KEY", "VALUE"),
        help="another value, as in 03.real_percents '[100, 50]'",
    )
    parser.add_argument("--dataset", type=Path, help="a folder of class folders, for the main data")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; start nothing")
    parser.add_argument(
        "--download-only", action="store_true", help="fetch models and data; start no notebook"
    )
    parser.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the next notebook when one fails (the default)",
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        nargs="+",
        metavar="N",
        help="with --dry-run: hours on so many GPUs",
    )
    parser.add_argument(
        "--workers",
        type=lambda text: None if text == "auto" else positive(text),
        metavar="N",
        help="processes that make everything, or jobs of a cluster; auto: one per GPU or core",
    )
    parser.add_argument(
        "--cluster",
        choices=["slurm", "lsf", "pbs", "sge"],
        help="make everything in jobs of a queue; their options are in the profile or Dask's YAML",
    )
    parser.add_argument(
        "--scheduler", metavar="ADDRESS", help="make everything on a Dask cluster that runs"
    )
    parser.add_argument(
        "--timeout", type=positive, default=600, metavar="MINUTES", help="after which a unit hangs"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every image with its digest, not its size"
    )
    parser.add_argument("--force", action="store_true", help="run what is up to date, too")
    parser.add_argument(
        "--from-results", action="store_true", help="figures, tables, verdicts from shipped runs"
    )
    parser.add_argument("--output", type=Path, help="folder of the executed notebooks")
    return parser.parse_args()


def set_environment(arguments: argparse.Namespace) -> str:
    """Tell the notebooks' kernels, by the environment, what was asked for.

    Returns:
        The name of the folder of executed notebooks; what is not the default's has its own, and
        figures and results likewise.

    Raises:
        InputError: a parameter that cannot be set.
    """
    from sdaug_utils.study import figures_folder, results_folder

    for variable in FOLDERS:  # the notebooks run in another folder
        if variable in os.environ:
            os.environ[variable] = str(Path(os.environ[variable]).resolve())
    changes = [params.override(*pair) for pair in arguments.parameter]
    os.environ["SDAUG_PARAMETERS"] = changed = json.dumps(changes) if changes else ""
    name, own = arguments.profile, ""
    if arguments.dataset:
        own = arguments.dataset.resolve().name
        os.environ["SDAUG_DATASET"] = str(arguments.dataset.resolve())
    changed = changed and f"changed-{store.digest_of(changed.encode())[:8]}"
    for part in (arguments.protocol, own, changed):
        if part:  # beside the default's figures, not over them
            name += f"-{part}"
            os.environ["SDAUG_FIGURES"] = str(figures_folder(part))
            os.environ["SDAUG_RESULTS"] = str(results_folder(part))
    for variable, is_set in (
        ("HF_HUB_OFFLINE", arguments.dry_run or arguments.from_results),
        ("SDAUG_VERIFY", arguments.verify),
        ("SDAUG_FROM_RESULTS", arguments.from_results),
    ):
        if is_set:
            os.environ[variable] = "1"
    return name


def workers_of(arguments: argparse.Namespace) -> Any:
    """Who is to make everything.

    Raises:
        InputError: there can be no such workers.
    """
    from sdaug_utils import make

    workers = make.Workers(
        arguments.workers, arguments.cluster, arguments.scheduler, arguments.timeout * 60.0
    )
    make.require_workers(workers)
    return workers


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then plan, download, make again from results, or run the study.

    Raises:
        InputError: what is wrong, before any work has started.
    """
    if arguments.cluster or arguments.scheduler:
        workers_of(arguments)
    profile, name = arguments.profile, set_environment(arguments)
    output = arguments.output or ROOT / "runs" / name
    paths = chosen_notebooks(arguments.only)
    if arguments.dataset and not arguments.only:
        paths = about(arguments.dataset, paths)
    dry = arguments.dry_run or arguments.from_results
    jobs = check(paths, profile, output, arguments.protocol, dry)
    if arguments.dry_run:
        print_plan(jobs, arguments.gpus or [])
        return 0
    from sdaug_utils import make, rates  # takes seconds, and an error needs none of it
    from sdaug_utils.evidence import report

    if arguments.from_results:
        remake(jobs)
        report.write_claims(profile)
        report.write_deviations(profile)
        return 0
    if arguments.download_only:
        return 0
    if jobs and rates.is_at_scale(jobs[0].study.settings):
        require_disk(jobs, arguments.workers or 1)
    began = time.time()
    recalled = [recall(job, output, profile, arguments.force) for job in jobs]
    waiting = [job for job, report in zip(jobs, recalled, strict=True) if not report]
    outcome = make.make_all(asked_for(waiting), profile, workers_of(arguments))
    reports = execute_all(jobs, recalled, output, profile, arguments.keep_going)
    used = {artefact for each in reports for kind in each.used.values() for artefact in kind}
    root = store.Store().root
    report.write_tables(profile, [root / artefact for artefact in used])
    print_summary(reports, profile, outcome)
    write_record(output, profile, reports, outcome, (time.time() - began) / 60)
    return 0 if all(each.status in FINE for each in reports) and not outcome.failures else 1


def main() -> int:
    """The exit code: 2 where something was wrong from the start, 1 where a notebook failed."""
    try:
        return run(command_line())
    except InputError as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return 2


def interruptible() -> int:
    """As :func:`main`; Ctrl-C ends it at once, with exit code 130."""
    try:
        return main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(interruptible())
