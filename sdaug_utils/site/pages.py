"""The pages of the site: a front page, a page per notebook, a gallery.

All files that they need are in the same folder: the site opens without a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import pandas as pd
from markupsafe import Markup

from sdaug_utils import params
from sdaug_utils.data.datasets import PROJECT
from sdaug_utils.errors import InputError
from sdaug_utils.evidence import claims, report
from sdaug_utils.registry import experiments
from sdaug_utils.site.gallery import write_gallery
from sdaug_utils.store import Store
from sdaug_utils.study import CONFIG, figures_folder, open_study
from sdaug_utils.summary import RECORD

TEMPLATES = Path(__file__).parent / "templates"
LOADER = jinja2.FileSystemLoader(TEMPLATES)
MAIN_FIGURE = "fig-4-08-training-percentage.png"
Rows = list[list[Any]]


class Site:
    """A folder of pages in an order, each with links to its neighbours."""

    def __init__(self, folder: Path, executed: Collection[Path]) -> None:
        """``executed`` are the notebooks, each of which gets a page."""
        self.folder, self.executed = folder, executed
        notebooks = [(f"{path.stem}.html", path.stem[:2]) for path in executed]
        self.pages = [("index.html", "Report"), *notebooks, ("gallery.html", "Gallery")]
        self.environment = jinja2.Environment(loader=LOADER, autoescape=True, trim_blocks=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in ("filters.js", "gallery.js"):
            shutil.copyfile(TEMPLATES / file, folder / file)
        style = (TEMPLATES / "style.css").read_text()
        (folder / "style.css").write_text(style + code_style())

    def write(self, here: str, template: str, title: str, **values: Any) -> None:
        """One of the pages."""
        place = [name for name, _ in self.pages].index(here)
        around = [None, *self.pages, None]  # the first and the last page have one neighbour only
        shown = {"title": title, "pages": self.pages, "here": here}
        neighbours = {"previous": around[place], "next": around[place + 2]}
        made = self.environment.get_template(template).render(shown | neighbours | values)
        (self.folder / here).write_text(made)

    def write_notebooks(self) -> list[tuple[str, str, str]]:
        """A page for each notebook; returns its file's name, its title and its question."""
        questions, stems = [], [path.stem for path in self.executed]
        for path in self.executed:
            notebook = nbformat.read(path, as_version=4)
            title, question = heading(notebook)
            questions.append((f"{path.stem}.html", title, question))
            made = with_links(body(notebook), stems, self.folder)
            self.write(f"{path.stem}.html", "notebook.html.j2", title, body=Markup(made))
        return questions

    def write_gallery(self, profile: str, record: Mapping[str, Any]) -> None:
        """The gallery of the pools that a run has used."""
        pools = []
        for domain, folders in pools_of(record).items():
            if folders:
                study = open_study(profile, None, domain, download=False)
                pools += write_gallery(study, folders, self.folder)
        (self.folder / "pools.js").write_text(f"const POOLS = {json.dumps(pools)};\n")
        self.write("gallery.html", "gallery.html.j2", "Gallery", number=len(pools))


def write_site(runs: Path) -> Path:
    """Make the site of a run from its folder, which holds its notebooks and ``run.json``.

    Returns the front page, ``report/index.html`` in that folder. Raises InputError if there is no
    executed notebook.
    """
    executed, record_file = sorted(runs.glob("[0-9][0-9]-*.ipynb")), runs / RECORD
    if not executed or not record_file.exists():
        raise InputError(f"{runs}: no executed notebook: run 'python run_all.py' first")
    record = json.loads(record_file.read_text())
    profile, name = str(runs / CONFIG), params.invocation_of(str(runs / CONFIG)).name
    os.environ.update(record["environment"])  # the folders of that run
    site = Site(runs / "report.partial", executed)
    questions = site.write_notebooks()
    site.write_gallery(profile, record)
    verdicts = verdict_rows(profile, [path.stem for path in executed])
    figure = figures_folder(profile) / MAIN_FIGURE
    if figure.exists():
        shutil.copyfile(figure, site.folder / figure.name)
    site.write(
        "index.html",
        "front.html.j2",
        f"Subject-driven data augmentation: {name}",
        profile=name,
        figure=figure.name if figure.exists() else "",
        figure_alt="Test accuracy of each technique against the percentage of real training data.",
        verdicts=verdicts,
        chapters=sorted({row["chapter"] for row in verdicts}),
        outcomes=list(dict.fromkeys(row["verdict"] for row in verdicts)),
        notebooks=questions,
        card=card(profile, record),
    )
    shutil.rmtree(runs / "report", ignore_errors=True)
    return site.folder.replace(runs / "report") / "index.html"


def heading(notebook: Any) -> tuple[str, str]:
    """A notebook's title, and its question."""
    first = notebook.cells[0].source
    asked = re.search(r"\*\*Question\.\*\* (.*)", first)
    return first.splitlines()[0].lstrip("# "), asked.group(1) if asked else ""


def body(notebook: Any) -> str:
    """A notebook as HTML; its code is folded away."""
    from nbconvert import HTMLExporter

    template = {"template_name": "basic", "template_file": "outputs.html.j2"}
    exporter = HTMLExporter(**template, extra_loaders=[LOADER])
    made, _ = exporter.from_notebook_node(notebook)
    return made.replace('<div class="output_html', '<div tabindex="0" class="output_html')


def with_links(html: str, executed: Collection[str], site: Path) -> str:
    """A notebook's page with links that lead on from the site.

    To the pages of other notebooks, or to the project's own files where the site has no page.
    """
    project = Path(os.path.relpath(PROJECT, site)).as_posix()

    def target(found: re.Match) -> str:
        shown = found[1] in executed
        return f'href="{found[1]}.html' if shown else f'href="{project}/notebooks/{found[1]}.ipynb'

    html = html.replace('href="../', f'href="{project}/')
    return re.sub(r'href="([0-9]{2}-[\w-]+)\.ipynb', target, html)


def code_style() -> str:
    """Colours of code, for light and dark mode."""
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def pools_of(record: Mapping[str, Any]) -> dict[params.Domain, list[Path]]:
    """The folders of the pools that a run's notebooks used, by the domain that they are about."""
    root, found = Store().root, dict[params.Domain, list[Path]]()
    for notebook, facts in record["notebooks"].items():
        of_domain = found.setdefault(experiments()[notebook].domain, [])
        for folder in (root / pool for pool in facts["pools"]):
            if folder not in of_domain and (folder / "spec.json").exists():
                of_domain.append(folder)
    return found


def verdict_rows(profile: str, executed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of the table of claims, with their chapters and the pages that they link to."""
    pages = {stem[:2]: f"{stem}.html" for stem in executed}
    tables = [figures_folder(profile) / f"{name}.csv" for name in ("claims", "claims-beyond")]
    rows = [row for path in tables if path.exists() for row in report.verdicts(pd.read_csv(path))]
    for row in rows:
        row["chapter"] = row["id"].split("-")[0]
        row["page"] = pages.get(claims.notebook_of(row["id"]), "")
    return rows


def card(profile: str, record: Mapping[str, Any]) -> dict[str, Rows]:
    """What ran where: tables by title, the first row of each its head."""
    facts = [[key, value] for key, value in record.items() if not isinstance(value, dict)]
    columns = ["minutes", "images", "models", "runs", "status"]
    notebooks = record["notebooks"].items()
    found: dict[str, Rows] = {
        "The run": [["what", "value"], *facts],
        "Experiments": [
            ["notebook", *columns],
            *([name, *(used[column] for column in columns)] for name, used in notebooks),
        ],
    }
    tables = {"Hardware": "table-a-1-hardware", "Software and models": "table-b-1-software"}
    for title, name in tables.items():
        file = figures_folder(profile) / f"{name}.csv"
        if file.exists():
            table = pd.read_csv(file, dtype=str).fillna("–")
            found[title] = [list(table.columns), *table.to_numpy().tolist()]
    return found
