"""Every notebook runs at the smoke profile, and its marked cells print what they printed before."""

import io
import os
import re
import subprocess
import sys

import nbformat
import pandas as pd
import papermill
import pytest

from sdaug_utils import notebooks
from sdaug_utils.evidence import claims, report
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.store import digest_of
from sdaug_utils.study import ROOT

NOTEBOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_at_smoke(path, tmp_path):
    [job] = notebooks.check([path], "smoke", tmp_path)
    copy = tmp_path / path.name
    papermill.execute_notebook(path, copy, job.overrides, prepare_only=True, progress_bar=False)
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
    assert path.stat().st_size < 450_000
    assert "widgets" not in notebook.metadata
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs, "not executed"
    for output in outputs:
        output.get("data", {}).pop("image/png", None)  # its letters may spell anything
    text = str(outputs)
    assert not re.search(r"Warning|Traceback|/home/|/root/|/work/|/tmp/", text)
    shown = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert all(re.search(r"100%\|.*(it/s|s/it)\]", line) for line in shown.splitlines()), shown
    checked = [cell for cell in notebook.cells if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert checked
    assert all(cell.outputs for cell in checked)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_belong_to_code_settings_and_the_numbers_behind_the_figures(path, contents):
    notebook = nbformat.read(path, as_version=4)
    made_from = notebook.metadata["sdaug"]
    stale = "is stale: renew it with 'make notebooks'"
    assert made_from["code"] == notebooks.source_digest(notebook), f"{path.stem} {stale}"
    settings = notebooks.settings_digest("miniature", path.stem)
    assert made_from["settings"] == settings, f"{path.stem} {stale}"
    assert made_from["numbers"], f"{path.stem} writes no numbers"
    for name, digest in made_from["numbers"].items():
        found = map(digest_of, contents(ROOT / "figures" / "miniature" / name))
        assert digest in found, f"{path.stem}: {name} {stale}"


def test_the_page_of_claims_shows_the_verdicts_that_the_notebooks_found(contents):
    folder = ROOT / "figures" / "miniature"
    verdicts = pd.concat(map(pd.read_csv, sorted(folder.glob("verdicts-*.csv"))))
    whole = [pd.read_csv(folder / f"{part}.csv") for part in ("claims", "claims-beyond")]
    expected = claims.holm(verdicts.reset_index(drop=True))  # they are one family
    pd.testing.assert_frame_equal(expected, pd.concat(whole, ignore_index=True), rtol=1e-4)
    page = (ROOT / "CLAIMS.md").read_text()
    for name, table in {
        "claims": report.verdict_table,
        "claims-beyond": report.verdict_table,
        "deviations": report.deviation_table,
    }.items():
        shown = [table(pd.read_csv(io.BytesIO(x))) for x in contents(folder / f"{name}.csv")]
        assert any(text in page for text in shown), name
