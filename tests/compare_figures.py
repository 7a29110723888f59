"""Compare the numbers behind two sets of figures: exit code 1 if any differs beyond tolerance.

    python tests/compare_figures.py EXPECTED_FOLDER FOLDER

Numbers come out the same on one kind of machine. On another, sums are rounded in another order, and
training, above all personalisation, goes slightly other ways. Tolerances: three points of accuracy
and six of an interval's ends, eight per cent of relative gain; 0.25 for what is judged on a handful
of subjects with a dozen images each. Verdicts, and the updates after which training stopped early,
may follow from such differences: they are not compared, nor is the description of the machine.
"""

import sys
from pathlib import Path

import pandas as pd

OF_THE_MACHINE = ("table-a-1-hardware.csv", "table-b-1-software.csv")
OF_SUBJECTS = ("fig-01", "fig-02", "verdicts-01", "verdicts-02", "claims")


def tolerance(name: str, column: str) -> float:
    """The largest absolute difference that a column of a file may show."""
    if name.startswith(OF_SUBJECTS):
        return 0.25
    if "relative" in column:
        return 8.0
    of_interval = column.endswith(("low", "high"))
    if "points" in column:
        return 6.0 if of_interval else 3.0
    return 0.06 if of_interval else 0.03


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
        elif (largest := (first[column] - second[column]).abs().max()) > tolerance(
            found.name, column
        ):
            lines.append(f"{found.name}: {column}: differs by {largest:.4f}")
    return lines


def main() -> int:
    expected, found = map(Path, sys.argv[1:])
    files = [file for file in sorted(expected.glob("*.csv")) if file.name not in OF_THE_MACHINE]
    lines = [line for file in files for line in differences(file, found / file.name)]
    print("\n".join(lines) or f"{len(files)} files of numbers come out as committed")
    return 1 if lines or not files else 0


if __name__ == "__main__":
    sys.exit(main())
