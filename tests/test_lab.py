"""JupyterLab as ``make lab`` opens it: a landing page, a notebook changed and run, its gallery."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from sdaug_utils import params
from sdaug_utils.evidence import gallery
from sdaug_utils.generation import pools
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.study import ROOT

TOKEN = "of-this-test"
NOTEBOOK = "05-all-generated"


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on a copy of README and one notebook, whose outputs are gone."""
    (tmp_path / "notebooks").mkdir()
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    notebook = nbformat.read(NOTEBOOKS / f"{NOTEBOOK}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / "notebooks" / f"{NOTEBOOK}.ipynb")
    made = (ROOT / "Makefile").read_text()
    settings = re.search(r'JUPYTER_CONFIG_PATH="\$\(CURDIR\)/([^"]+)', made).group(1)
    landing = re.search(r"jupyter lab (\S+)", made).group(1)
    runtime = tmp_path / "runtime"
    environment = os.environ | {
        "JUPYTER_CONFIG_PATH": str(ROOT / settings),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),  # nobody's own settings or workspaces
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "PYTHONPATH": str(ROOT),
    }
    options = [landing, "--no-browser", "--allow-root", "--port=0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={TOKEN}"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _address(runtime) + landing.partition("=")[2].removeprefix("/")
    finally:
        server.kill()
        server.wait()


def _address(runtime):
    """Where a server that has just been started answers."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for file in runtime.glob("jpserver-*.json"):
            try:
                url = json.loads(file.read_text())["url"]
                urllib.request.urlopen(f"{url}api?token={TOKEN}", timeout=5)
                return url
            except (OSError, ValueError):
                pass
        time.sleep(0.3)
    raise TimeoutError("JupyterLab does not answer")


def parameters():
    """The cell of parameters with the grid of the smoke profile."""
    changed = {"profile": "smoke"} | params.notebook_section("smoke", NOTEBOOK)
    return "\n".join(f"{key} = {value!r}" for key, value in changed.items())


def test_a_student_opens_a_notebook_changes_it_and_sees_figure_and_gallery(lab, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{lab}?token={TOKEN}")
    link = page.locator(".jp-RenderedMarkdown a", has_text=NOTEBOOK).first
    link.click(timeout=60_000)  # the landing page: README's table of notebooks
    cell = page.locator(".jp-Notebook .jp-CodeCell").first
    cell.locator(".cm-content").click(timeout=60_000)
    page.keyboard.press("Control+End")
    page.keyboard.insert_text("\n" + parameters())
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    outputs = page.locator(".jp-Notebook .jp-OutputArea-output")
    outputs.filter(has_text="To be made:").wait_for(timeout=120_000)
    controls = page.locator(".jp-Notebook .widget-dropdown select")
    controls.first.wait_for(timeout=240_000)
    picture = page.locator(".jp-Notebook .widget-image").first
    before = picture.get_attribute("src")
    controls.first.select_option(index=1)
    page.wait_for_function(
        "old => document.querySelector('.jp-Notebook .widget-image').src != old",
        arg=before,
        timeout=30_000,
    )
    page.locator(".jp-Notebook .jp-RenderedImage img").first.wait_for(timeout=240_000)
    outputs.filter(has_text="as many updates as asked for").wait_for(timeout=240_000)
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_a_gallery_pages_through_pools_and_falls_back_on_a_sheet(world, monkeypatch):
    shown = []
    monkeypatch.setattr(gallery, "display", shown.append)
    made = {
        name: pools.technique_pools(world, name, 0, count)
        for name, count in (("stable-diffusion-prompt", 12), ("real-guidance", 3))
    }
    rows = {"prompt": [made["stable-diffusion-prompt"][0].images()[:2]]}
    gallery.show(made, gallery.figures.sheet(rows, ["first"]))
    [found] = shown
    data, metadata = found._repr_mimebundle_()
    assert {"image/png", gallery.WIDGET} <= set(data)
    assert "images in rows (prompt)" in metadata["image/png"]["alt"]
    assert found.num_pages == 2
    name = world.data.class_names[1]
    first, last = (found.caption(name, page) for page in (0, 1))
    pool = made["stable-diffusion-prompt"][1]
    assert str(pool.seeds[9]) in first
    assert str(pool.seeds[10]) in last
    assert "no more" in last
    assert found.page(name, 0) != found.page(name, 1)
