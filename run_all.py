#!/usr/bin/env python
"""Run the study's notebooks with papermill, in order, and regenerate every figure and table.

    python run_all.py                         all notebooks, miniature profile
    python run_all.py --only 03 --profile smoke

All parameters of all notebooks are checked before the first one starts. A notebook that fails does
not stop the others: it is kept as far as it came, and the run ends with exit code 1.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
from traitlets.config import Config

ROOT = Path(__file__).parent
NOTEBOOKS = ROOT / "notebooks"


@dataclass
class Report:
    """One line of the summary."""

    notebook: str
    status: str
    minutes: float
    figures: list[str]
    where: Path


def chosen_notebooks(only: list[str] | None) -> list[Path]:
    """The notebooks in order, or those whose names begin with one of ``only``."""
    from sdaug_utils.errors import InputError

    every = sorted(NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    for prefix in only or []:
        if not any(path.stem.startswith(prefix) for path in every):
            known = ", ".join(path.stem for path in every)
            raise InputError(f"--only: no notebook begins with '{prefix}': choose from {known}")
    return [path for path in every if not only or path.stem.startswith(tuple(only))]


def check(paths: list[Path], profile: str, output: Path) -> dict[Path, dict[str, Any]]:
    """Check everything that can be checked beforehand; return each notebook's overrides."""
    from sdaug_utils import figures, foundation, params, store, study

    overrides = {path: params.overrides(profile, path.stem) for path in paths}
    opened = study.open_study(profile)
    foundation.revision(opened.settings.foundation)
    for folder in (output, figures.folder(profile)):
        store.require_writable(folder)
    for path, changes in overrides.items():
        values = params.parameters_cell(path)
        if profile != values.get("profile"):
            changes = overrides[path] = {"profile": profile, **changes}
        checked = params.check_notebook(path.stem, values | changes)
        percents = [*checked.real_percents, checked.protocols_at_percent]
        study.check_percents(opened, percents)
    return overrides


def execute(path: Path, parameters: dict[str, Any], output: Path, profile: str) -> Report:
    """Run one notebook and say what became of it."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from sdaug_utils import figures

    target, began = output / path.name, time.time()
    target.unlink(missing_ok=True)
    status = "ok"
    try:
        with tempfile.TemporaryDirectory() as sockets:
            # Sockets in a folder of their own, no ports: several runs may share a host.
            kernel = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
            papermill.execute_notebook(
                path, target, parameters, cwd=NOTEBOOKS, progress_bar=False, config=kernel
            )
    except PapermillExecutionError as error:
        status = f"failed in cell {error.cell_index}: {error.ename}: {error.evalue}"
    except Exception as error:  # a kernel that died: the other notebooks still run
        status = f"failed: {type(error).__name__}: {error}"
    if target.exists():
        tidy(target)
    made = [
        figure.name
        for figure in sorted(figures.folder(profile).glob("*.png"))
        if figure.stat().st_mtime >= began
    ]
    return Report(path.stem, status.splitlines()[0], (time.time() - began) / 60, made, target)


def tidy(path: Path) -> None:
    """Take out of an executed notebook what only the machine that ran it cares for.

    Progress bars keep their last state, and metadata lose times and paths.
    """
    notebook = nbformat.read(path, as_version=4)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = list(_merged_streams(cell.outputs))
    nbformat.write(notebook, path)


def _merged_streams(outputs: list[Any]) -> Iterator[Any]:
    for (kind, name), group in groupby(outputs, lambda o: (o.output_type, o.get("name"))):
        if kind != "stream":
            yield from group
            continue
        text = "".join(output.text for output in group)
        lines = [line.rsplit("\r", 1)[-1] for line in text.split("\n")]
        yield nbformat.v4.new_output("stream", name=name, text="\n".join(lines))


def print_summary(reports: list[Report], profile: str) -> None:
    from sdaug_utils import figures

    print(f"\n{'notebook':<26} {'minutes':>7}  status")
    for report in reports:
        print(f"{report.notebook:<26} {report.minutes:>7.1f}  {report.status}")
        for name in report.figures:
            print(f"{'':<35} {name}")
    executed = reports[0].where.parent if reports else ROOT
    print(f"\nexecuted notebooks: {_relative(executed)}")
    print(f"figures and their numbers: {_relative(figures.folder(profile))}")


def _relative(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the study's notebooks.")
    parser.add_argument("--profile", default="miniature", help="params/<profile>.yaml")
    parser.add_argument("--only", nargs="+", metavar="NN", help="numbers of notebooks, as in 03")
    parser.add_argument("--output", type=Path, help="folder of the executed notebooks")
    arguments = parser.parse_args()

    from sdaug_utils.errors import InputError

    for variable in ("SDAUG_STORE", "SDAUG_FIGURES"):  # the notebooks run in another folder
        if variable in os.environ:
            os.environ[variable] = str(Path(os.environ[variable]).resolve())
    output = arguments.output or ROOT / "runs" / arguments.profile
    try:
        paths = chosen_notebooks(arguments.only)
        overrides = check(paths, arguments.profile, output)
    except InputError as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return 2
    reports = []
    for path in paths:
        print(f"{path.stem} …", flush=True)
        reports.append(execute(path, overrides[path], output, arguments.profile))
    print_summary(reports, arguments.profile)
    return 0 if all(report.status == "ok" for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
