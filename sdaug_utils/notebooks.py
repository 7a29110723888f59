"""Notebooks: checked before anything starts, then run by papermill unless they are up to date."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdaug_utils import compute, params, plan, store
from sdaug_utils.errors import InputError
from sdaug_utils.generation import foundation
from sdaug_utils.registry import experiments
from sdaug_utils.study import ROOT, Study, figures_folder, open_study, output, results_folder
from sdaug_utils.training import features, runs

if TYPE_CHECKING:
    from jupyter_client import AsyncKernelManager

NOTEBOOKS, MODULE = ROOT / "notebooks", Path(__file__).parent
SOURCES = {".py", ".yaml", ".json", ".csv"}  # the files of the module that its digest covers
FINE = ("ok", "up to date")


@dataclass
class Job:
    """A notebook to be run, with its parameters."""

    path: Path
    output: Path  # the folder of executed notebooks
    overrides: dict[str, Any]  # values that are injected into the parameters cell
    study: Study
    parameters: Any  # all of them, checked: the cell's values with the overrides

    @property
    def executed(self) -> Path:
        """Where the executed notebook goes."""
        return self.output / self.path.name

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines the outcome: source, settings, module, data, models.

        It is computed before the run, so a notebook edited meanwhile is not up to date.
        """
        from sdaug_utils.evidence import prose

        settings, data = self.study.settings, self.study.data
        cells = json.loads(self.path.read_text())["cells"]  # importing nbformat takes seconds
        given = [settings.model_dump(mode="json"), compute.dtype_name(settings), self.study.name]
        return store.digest(
            {  # the source without the numbers in its text, which are results
                "source": [prose.emptied("".join(cell["source"])) for cell in cells],
                "parameters": self.parameters.model_dump(mode="json", exclude={"profile"}),
                "settings": given,
                "module": _module_digest(),
                "libraries": {name: version(name) for name in compute.TOOLS},
                "data": [data.name, data.class_names, runs.data_digest(data)],
                "models": [foundation.revision(*model) for model in plan.models(settings)],
            }
        )

    def is_up_to_date(self) -> bool:
        """Whether it was last run with this key, and its figures and tables are unchanged since."""
        key = self.key
        try:
            known = json.loads(self.executed.read_text())["metadata"]["sdaug"]
            files = [output() / name for name in known["files"]]
            unchanged = _table_digests(files) == known["numbers"] and all(map(Path.exists, files))
            return unchanged and known["key"] == key
        except (OSError, ValueError, KeyError):
            return False


@dataclass
class Report:
    """What became of a notebook."""

    notebook: str
    status: str
    minutes: float = 0.0
    figures: list[str] = field(default_factory=list)


def _table_digests(files: Iterable[Path]) -> dict[str, str]:
    """A hash of each table among some files, by name."""
    tables = sorted(file for file in files if file.suffix == ".csv")
    return {table.name: store.file_digest(table) for table in tables}


@cache
def _module_digest() -> str:
    files = sorted(path for path in MODULE.rglob("*") if path.suffix in SOURCES)
    return store.digest_of("".join(map(store.file_digest, files)).encode())


def chosen(only: list[str] | None) -> list[Path]:
    """The thesis's notebooks in order, or those whose names begin with one of ``only``."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    if unknown := [path.name for path in every if path.stem not in experiments()]:
        raise InputError(f"notebooks/{unknown[0]}: no experiment names this notebook")
    if not only:
        return [path for path in every if experiments()[path.stem].in_thesis]
    for prefix in only:
        if not any(path.stem.startswith(prefix) for path in every):
            known = ", ".join(path.stem for path in every)
            raise InputError(f"--only: no notebook begins with '{prefix}': choose from {known}")
    return [path for path in every if path.stem.startswith(tuple(only))]


def runnable_on(dataset: Path, paths: list[Path]) -> list[Path]:
    """Those notebooks that can run on a folder of one's own images; print which are left out."""
    left_out = {}
    for path in paths:
        experiment = experiments()[path.stem]
        if experiment.domain != "main":
            left_out[path] = "another domain"
        elif experiment.needs_trimaps and not (dataset / "trimaps").is_dir():
            left_out[path] = "no folder 'trimaps'"
    for path, reason in left_out.items():
        print(f"left out: {path.stem[:2]} ({reason})")
    return [path for path in paths if path not in left_out]


def check(paths: Iterable[Path], profile: str, output: Path, offline: bool = False) -> list[Job]:
    """Check everything that can be checked beforehand; raises InputError for what is wrong.

    An offline check downloads nothing: what is missing is planned for by its published size.
    Parameters that one's own images do not allow are changed, and the changes are printed.
    """
    jobs: list[Job] = []
    opened: dict[str, Study] = {}
    absent: list[str] = []
    for path in paths:
        values = params.parameters_cell(path)
        overrides = params.notebook_section(profile, path.stem)
        if profile != values.get("profile"):
            overrides = {"profile": profile, **overrides}
        checked = params.check_notebook(path.stem, values | overrides)
        domain = experiments()[path.stem].domain
        if domain not in opened and offline:
            opened[domain], missing = plan.planned(profile, domain)
            absent += missing
        elif domain not in opened:
            opened[domain] = open_study(profile, domain=domain)
        if not opened[domain].stands_for:  # one's own images
            changes = checked.fitted(opened[domain])
            for key, value in changes.items():
                new, old = (" ".join(str(one).split()) for one in (value, dict(checked)[key]))
                print(f"{path.stem}: {key}: {new} in place of {old}")
            overrides |= changes
            checked = params.check_notebook(path.stem, values | overrides)
        jobs.append(Job(path, output, overrides, opened[domain], checked))
    for job in jobs:
        job.parameters.check(job.study)
    if absent:
        print(f"not here yet, planned by published sizes: {', '.join(dict.fromkeys(absent))}\n")
    if not offline:
        for study in opened.values():
            _require_models(study.settings)
        for job in jobs:
            job.parameters.check_techniques(job.study)
    for folder in (output, figures_folder(profile), results_folder(profile)):
        store.require_writable(folder)
    return jobs


def _require_models(settings: params.Settings) -> None:
    """Find or download all models of a profile. Raises InputError if one is missing or corrupt."""
    for model in plan.models(settings):
        foundation.revision(*model)
    foundation.check(settings)
    for backbone in {settings.classifier.backbone, settings.segmenter.backbone}:
        if backbone != "efficientnet-lite0":  # its weights come with the packages
            features.load_backbone(backbone)


@contextlib.contextmanager
def running_kernel() -> Iterator[AsyncKernelManager]:
    """Start a Jupyter kernel that imports this copy of the package; kill it at the end.

    It communicates by Unix sockets in a temporary folder, not by ports, so that several runs can
    share a host.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_core.utils import run_sync

    known = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(known)}
    # The path of a socket has at most 107 characters, a cluster's TMPDIR may have nearly all.
    with tempfile.TemporaryDirectory(prefix="sdaug-", dir="/tmp") as folder:
        manager = AsyncKernelManager(transport="ipc", ip=f"{folder}/kernel")
        run_sync(manager.start_kernel)(cwd=NOTEBOOKS, env=environment)
        try:
            yield manager
        finally:
            run_sync(manager.shutdown_kernel)(now=True)


def ask(kernel: AsyncKernelManager, expression: str) -> Any:
    """The value of an expression in a kernel; its ``repr`` must be a literal."""
    client = kernel.blocking_client()
    client.start_channels(iopub=False, stdin=False, hb=False, control=False)
    try:
        client.execute("", silent=True, user_expressions={"asked": expression})
        reply = client.get_shell_msg(timeout=60)["content"]["user_expressions"]["asked"]
        return ast.literal_eval(reply["data"]["text/plain"])
    finally:
        client.stop_channels()
        client.context.destroy(linger=0)


def execute_all(jobs: Sequence[Job], done: Sequence[Job], keep_going: bool) -> list[Report]:
    """Run the jobs in order, except those ``done``; stop at a failure unless ``keep_going``."""
    reports: list[Report] = []
    for job in jobs:
        if job in done:
            reports.append(Report(job.path.stem, "up to date"))
            continue
        print(f"{job.path.stem} …", flush=True)
        reports.append(execute(job))
        if reports[-1].status != "ok" and not keep_going:
            break
    return reports


def execute(job: Job) -> Report:
    """Run one notebook; if it fails, its output up to there is kept."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    profile, began, report = job.study.profile, time.time(), Report(job.path.stem, "ok")
    job.executed.unlink(missing_ok=True)
    (figures_folder(profile) / f"verdicts-{job.path.stem[:2]}.csv").unlink(missing_ok=True)
    key, written = job.key, list[Path]()
    options: dict[str, Any] = {"cwd": NOTEBOOKS, "progress_bar": False}
    try:
        with running_kernel() as kernel:
            papermill.execute_notebook(job.path, job.executed, job.overrides, **options, km=kernel)
            # An expression, since a statement would add a name to the notebook's own.
            names = ask(kernel, "__import__('sdaug_utils.study').study.WRITTEN")
        written = sorted(map(Path, set(names)))
    except PapermillExecutionError as error:
        report.status = f"failed in cell {error.cell_index}: {error.ename}: {error.evalue}"
    except Exception as error:  # the kernel died or did not start: the other notebooks still run
        report.status = f"failed: {type(error).__name__}: {error}"
    if job.executed.exists():
        tidy(job.executed, profile, written, key if report.status == "ok" else "")
    report.figures = sorted(file.name for file in written if file.suffix == ".png")
    report.minutes = (time.time() - began) / 60
    report.status = report.status.splitlines()[0]
    return report


def remake(jobs: Iterable[Job]) -> None:
    """Figures, tables and verdicts from shipped runs: nothing is generated, nothing is trained.

    Each notebook's code runs in this process, except the cells tagged ``needs-images``, since
    shipped runs come without images.
    """
    import matplotlib
    import nbformat

    matplotlib.use("agg")
    for job in jobs:
        names: dict[str, Any] = {"display": lambda *_: None}
        for cell in nbformat.read(job.path, as_version=4).cells:
            tags = cell.metadata.get("tags", [])
            if cell.cell_type == "code" and "needs-images" not in tags:
                with contextlib.redirect_stdout(None):
                    exec(compile(cell.source, job.path.name, "exec"), names)
                if "parameters" in tags:
                    names |= job.overrides
        print(f"{job.path.stem}: figures, tables and verdicts from its results", flush=True)


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


def tidy(path: Path, profile: str, written: Sequence[Path], key: str) -> None:
    """Remove from an executed notebook everything that differs from machine to machine.

    Its metadata then hold digests of the code, the settings and the tables, the files that the
    notebook wrote, and the ``key`` it was run with, empty if it failed.
    """
    import nbformat
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    from sdaug_utils.evidence.gallery import WIDGET

    read = nbformat.read(path, as_version=4)
    notebook, _ = CoalesceStreamsPreprocessor(enabled=True)(read, {})
    notebook.metadata["sdaug"] = {
        "code": source_digest(notebook),
        "settings": settings_digest(profile, path.stem),
        "numbers": _table_digests(written),
        "files": [os.path.relpath(file, output()) for file in written],
        "key": key,
    }
    tables: dict[str, str] = {}  # pandas names a styled one at random

    def name(found: re.Match) -> str:
        return tables.setdefault(found[0], f"T_{len(tables):05d}")

    for cell in notebook.cells:
        for shown in cell.get("outputs", []):
            data = shown.get("data", {})
            data.pop(WIDGET, None)
            if "text/html" in data:
                data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}", name, data["text/html"])
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
    for part in (notebook, *notebook.cells):
        for noted in ("papermill", "widgets", "execution"):
            part.metadata.pop(noted, None)
    nbformat.write(notebook, path)
