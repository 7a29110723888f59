import os
import shutil
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from sdaug_utils.store import Store
from sdaug_utils.study import ROOT, Study, open_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """No test reads or writes the project's own store and figures."""
    monkeypatch.setenv("SDAUG_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("SDAUG_OUTPUT", str(tmp_path))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def world(store) -> Study:
    """The smoke profile with an empty store."""
    torch.manual_seed(0)
    return open_study("smoke", store)


@pytest.fixture(scope="session")
def contents():
    """Reads a file as it is, and as it is committed if there is a repository.

    Whoever runs the study on another machine gets numbers that differ in the last digits; they do
    not make the committed notebooks stale.
    """

    def read(path):
        name = path.relative_to(ROOT).as_posix()
        shown = subprocess.run(["git", "show", f":{name}"], cwd=ROOT, capture_output=True)
        return [path.read_bytes(), *([shown.stdout] if shown.returncode == 0 else [])]

    return read


@pytest.fixture
def browser():
    """Chromium without a window; tests of what a reader sees are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
