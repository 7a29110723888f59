"""Raw runs are shipped, and everything that is shown of them can be made from them alone."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from sdaug_utils.errors import InputError
from sdaug_utils.evidence import records
from sdaug_utils.study import ROOT, results_folder, write_config

OF_THE_MACHINE = {"table-a-1-hardware.csv", "table-b-1-software.csv"}


def rows():
    return pd.DataFrame(
        {
            "technique": [None, "dreambooth"],
            "predictions": [np.array([1, 9]), np.array([0, 0])],
            "scores": [np.array([True, False]), np.array([False, False])],
        }
    )


def test_results_are_kept_and_read_without_being_made_again():
    made = records.kept("smoke", "03", rows)
    shipped, _ = write_config("smoke", from_results=True)
    read = records.kept(shipped, "03", lambda: pytest.fail("made again"))
    pd.testing.assert_frame_equal(made, read)
    assert read["scores"][0].dtype == bool
    assert read["scores"][0].tolist() == [True, False]
    assert read["predictions"][0].tolist() == [1, 9]
    assert (results_folder("smoke") / "03.parquet").stat().st_size < 10_000


def test_a_single_score_stays_exact():
    one = pd.DataFrame({"scores": [np.array([1 / 3])]})
    assert records.kept("smoke", "01", lambda: one)["scores"][0][0] == 1 / 3


def test_results_that_are_not_there_are_named():
    shipped, _ = write_config("smoke", from_results=True)
    with pytest.raises(InputError, match=r"04\.parquet: no such results in .*smoke: run it first"):
        records.kept(shipped, "04", rows)


def test_figures_tables_and_verdicts_come_from_the_shipped_runs_alone(tmp_path):
    shutil.copytree(ROOT / "results" / "miniature", tmp_path / "results" / "miniature")
    for only in ([], ["--only", "10", "11"]):
        result = subprocess.run(
            [sys.executable, ROOT / "run_all.py", "--from-results", *only],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    assert not any((tmp_path / "store").rglob("*.png")), "an image was made"
    made = tmp_path / "figures" / "miniature"
    shipped = [
        file
        for file in (ROOT / "figures" / "miniature").glob("*.csv")
        if file.name not in OF_THE_MACHINE
    ]
    assert len(shipped) > 20
    for file in shipped:
        found = pd.read_csv(made / file.name)
        pd.testing.assert_frame_equal(found, pd.read_csv(file), atol=1e-5, obj=file.name)
    drawn = {file.name for file in made.glob("fig-*.png")}
    assert {f"fig-4-{number:02d}" for number in (8, 9, 10, 11, 12)} <= {x[:8] for x in drawn}
