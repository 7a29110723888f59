"""Every notebook runs at the smoke profile, and its marked cells print what they printed before."""

import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

import run_all

NOTEBOOKS = sorted(run_all.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_at_smoke(path, tmp_path):
    overrides = run_all.check([path], "smoke", tmp_path)[path]
    copy = tmp_path / path.name
    papermill.execute_notebook(path, copy, overrides, prepare_only=True, progress_bar=False)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "--nbval-cell-timeout=300", copy],
        capture_output=True,
        text=True,
        env=os.environ | {"JUPYTER_PLATFORM_DIRS": "1"},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_fit_to_be_read_on_the_web(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 400_000
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs, "not executed"
    text = str(outputs)
    assert not re.search(r"Warning|Traceback|/home/|/root/|/work/|/tmp/", text)
    checked = [cell for cell in notebook.cells if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert len(checked) >= 3
    assert all(cell.outputs for cell in checked)
