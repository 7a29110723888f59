"""Compare the numbers behind two sets of figures: exit code 1 if any differs beyond tolerance.

    python tests/compare_figures.py EXPECTED_FOLDER FOLDER

Numbers come out the same on one machine and nearly the same on another, where sums are rounded in
another order. Tolerances: two points of accuracy, four per cent of relative gain. Verdicts, and
the updates after which training stopped early, may follow from such differences: not compared.
"""

import sys
from pathlib import Path

import pandas as pd


def tolerance(column: str) -> float:
    """The largest absolute difference that a column may show."""
    if "relative" in column:
        return 4.0
    return 2.0 if "points" in column else 0.02


def differences(expected: Path, found: Path) -> list[str]:
    """A line for each column of a CSV file that does not come out as expected."""
    if not found.exists():
        return [f"{found.name}: missing"]
    first, second = pd.read_csv(expected), pd.read_csv(found)
    if list(first) != list(second) or len(first) != len(second):
        return [f"{found.name}: other rows or columns"]
    lines = []
    for column in first:
        if column.endswith(("verdict", "updates")):
            continue
        if not pd.api.types.is_numeric_dtype(first[column]):
            if not first[column].equals(second[column]):
                lines.append(f"{found.name}: {column}: other text")
        elif not first[column].isna().equals(second[column].isna()):
            lines.append(f"{found.name}: {column}: other gaps")
        elif (largest := (first[column] - second[column]).abs().max()) > tolerance(column):
            lines.append(f"{found.name}: {column}: differs by {largest:.4f}")
    return lines


def main() -> int:
    expected, found = map(Path, sys.argv[1:])
    files = sorted(expected.glob("*.csv"))
    lines = [line for file in files for line in differences(file, found / file.name)]
    print("\n".join(lines) or f"{len(files)} files of numbers come out as committed")
    return 1 if lines or not files else 0


if __name__ == "__main__":
    sys.exit(main())
