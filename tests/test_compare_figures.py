import shutil
import sys

import pandas as pd
import pytest
from compare_figures import main

from sdaug_utils.study import ROOT


@pytest.fixture
def compare(tmp_path, monkeypatch):
    def run(expected, found):
        for name, text in (("expected", expected), ("found", found)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "fig.csv").write_text(text)
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "expected"), str(tmp_path / "found")])
        return main()

    run.folder = tmp_path
    return run


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ("arm,accuracy,gain_points\na,0.715,1.5\nb,,2\n", 0),
        ("arm,accuracy,gain_points\na,0.75,1.5\nb,,2\n", 1),
        ("arm,accuracy,gain_points\na,0.715,3.5\nb,,2\n", 1),
        ("arm,accuracy,gain_points\na,0.715,1.5\nc,,2\n", 1),
        ("arm,accuracy,gain_points\na,,1.5\nb,0.7,2\n", 1),
        ("arm,accuracy,gain_points\na,0.715,1.5\n", 1),
    ],
)
def test_small_differences_pass_and_large_ones_do_not(compare, found, code):
    assert compare("arm,accuracy,gain_points\na,0.71,1.0\nb,,2\n", found) == code


def test_ends_of_intervals_may_move_further_and_the_machine_is_not_compared(compare, tmp_path):
    assert compare("low,mean\n0.60,0.71\n", "low,mean\n0.587,0.718\n") == 0
    (tmp_path / "expected" / "table-a-1-hardware.csv").write_text("what,value\ncores,2\n")
    (tmp_path / "found" / "table-a-1-hardware.csv").write_text("what,value\ncores,64\n")
    assert main() == 0


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ([0.70, 0.714], 0),
        ([0.66, 0.71], 1),  # one run is far off
        ([0.72, 0.73], 1),  # all are a little
        ([0.70], 1),
    ],
)
def test_runs_are_compared_one_by_one(tmp_path, monkeypatch, found, code):
    for name, scores in (("expected", [0.70, 0.71]), ("found", found)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fig.csv").write_text("mean\n0.7\n")
        rows = pd.DataFrame({"arm": "a", "draw": range(len(scores)), "test_score": scores})
        rows.to_parquet(tmp_path / name / "03.parquet")
    folders = [str(tmp_path / name) for name in ("expected", "found", "found")]
    monkeypatch.setattr(sys, "argv", ["", *folders])
    assert main() == code


def test_what_follows_from_early_stopping_is_given_more_room(compare):
    table = "id,difference\n03-a,{}\nX-b,{}\n"
    assert compare(table.format(0.05, 0.2), table.format(0.05, 0.3)) == 0


def test_other_claims_are_not(compare):
    table = "id,difference,p_value\n03-a,{},{}\nX-b,{},0.1\n"
    assert compare(table.format(0.05, 0.01, 0.2), table.format(0.055, 0.9, 0.2)) == 0
    shutil.rmtree(compare.folder / "expected")
    shutil.rmtree(compare.folder / "found")
    assert compare(table.format(0.05, 0.01, 0.2), table.format(0.07, 0.01, 0.2)) == 1


def test_what_is_committed_is_equal_to_itself(tmp_path, monkeypatch):
    folders = [ROOT / name / "miniature" for name in ("figures", "results")]
    for folder in folders:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), *map(str, folders)])
    assert main() == 0


def test_nothing_to_compare_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path), str(tmp_path)])
    assert main() == 1
