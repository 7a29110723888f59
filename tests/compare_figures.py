"""Compare a study's numbers and runs with other ones: exit code 1 if any differs beyond tolerance.

    python tests/compare_figures.py EXPECTED_FOLDER FIGURES_FOLDER [RESULTS_FOLDER]

The first holds what is expected, numbers behind figures (.csv) and raw runs (.parquet). Numbers
come out the same on one kind of machine. On another, sums are rounded in another order, and
training, above all personalisation, goes slightly other ways: between a Xeon and an AMD processor
differences of claims moved by up to 0.1 points, ends of three draws' intervals by 0.4. Tolerances
leave room for one arm that becomes the "best" in the place of another: a point of accuracy and one
and a half of an interval's ends, four per cent of relative gain; of a single run three points, of
all runs together half a point; 0.1 for what is judged on a few images of a few subjects, 15 points
for runs that stop early, after more updates or fewer. Verdicts, p-values, and the number of those
updates, may follow from such differences: they are not compared, nor is the description of the
machine.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

OF_THE_MACHINE = ("table-a-1-hardware.csv", "table-b-1-software.csv")
DERIVED = ("p_", "verdict", "detectable")
OF_A_RUN = (
    *("task", "protocol", "arm", "real_percent", "synthetic_per_class", "draw", "seed"),
    *("num_inputs", "input_set", "measure", "learning_rate", "step", "num_views", "shift"),
)
OF_SUBJECTS = ("fig-01", "fig-02", "verdicts-01", "verdicts-02", "claims")
STOPPED_EARLY = "protocols"  # in the name of a file; and a claim's id
AFTER_STOPPING = ("X-a", "X-b")


def tolerance(name: str, column: str) -> float:
    """The largest absolute difference that a column of a file may show."""
    if STOPPED_EARLY in name:
        return 15.0 if "points" in column else 0.15
    if name.startswith(OF_SUBJECTS):
        return 0.1
    if name.startswith("deviations"):
        return 0.3  # points
    if "relative" in column:
        return 4.0
    of_interval = column.endswith(("low", "high"))
    if "points" in column:
        return 1.5 if of_interval else 1.0
    return 0.015 if of_interval else 0.01


def differences(expected: Path, found: Path) -> list[str]:
    """A line for each column of a CSV file that does not come out as expected."""
    if not found.exists():
        return [f"{found.name}: missing"]
    first, second = pd.read_csv(expected), pd.read_csv(found)
    if list(first) != list(second) or len(first) != len(second):
        return [f"{found.name}: other rows or columns"]
    if "id" in first:
        first, second = (table[~table["id"].isin(AFTER_STOPPING)] for table in (first, second))
    lines = []
    for column in first:
        if column.startswith(DERIVED) or column.endswith(("verdict", "updates")):
            continue
        of_numbers = pd.api.types.is_numeric_dtype(first[column])
        if not of_numbers or pd.api.types.is_bool_dtype(first[column]):
            if not first[column].equals(second[column]):
                lines.append(f"{found.name}: {column}: other text")
        elif not first[column].isna().equals(second[column].isna()):
            lines.append(f"{found.name}: {column}: other gaps")
        elif (largest := (first[column] - second[column]).abs().max()) > tolerance(
            found.name, column
        ):
            lines.append(f"{found.name}: {column}: differs by {largest:.4f}")
    return lines


def run_differences(expected: Path, found: Path) -> list[str]:
    """Lines about runs that are not those expected, or do not score as expected."""
    if not found.exists():
        return [f"{found.name}: missing"]
    first, second = pd.read_parquet(expected), pd.read_parquet(found)
    if "shift" in first:
        first, second = (
            x.assign(score=x["scores"].map(lambda s: s.mean())) for x in (first, second)
        )
    scores = {"test_score", "score", "test_accuracy"} & set(first)
    if not scores:  # measures of images, or costs
        numbers = [x.select_dtypes("number") for x in (first, second)]
        alike = numbers[0].shape == numbers[1].shape and np.allclose(*numbers, rtol=0.1, atol=0.05)
        return [] if alike else [f"{found.name}: other numbers"]
    [score] = scores
    keys = [column for column in OF_A_RUN if column in first]
    both = first.merge(second, on=keys, suffixes=("", "_found"), validate="one_to_one")
    if not len(both) == len(first) == len(second):
        return [f"{found.name}: other runs"]
    gaps = (both[score] - both[f"{score}_found"]).abs()
    largest, average = (0.5, 0.05) if score == "score" else (0.03, 0.005)
    if STOPPED_EARLY in found.name:
        largest, average = 0.15, 0.15
    if gaps.max() > largest or gaps.mean() > average:
        run = both.loc[gaps.idxmax(), keys].to_dict()
        return [f"{found.name}: {gaps.mean():.4f} on average, {gaps.max():.4f} of {run}"]
    return []


def main() -> int:
    expected, figures, *results = map(Path, sys.argv[1:])
    files = [file for file in sorted(expected.glob("*.csv")) if file.name not in OF_THE_MACHINE]
    lines = [line for file in files for line in differences(file, figures / file.name)]
    runs = sorted(expected.glob("*.parquet"))
    lines += [line for file in runs for line in run_differences(file, results[0] / file.name)]
    said = f"{len(files)} files of numbers and {len(runs)} of runs come out as committed"
    print("\n".join(lines) or said)
    return 1 if lines or not files else 0


if __name__ == "__main__":
    sys.exit(main())
