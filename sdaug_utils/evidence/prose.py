"""Numbers in prose are made by code: what stands between two marks comes from a table of results.

In Markdown, where the marks are invisible, a value is written as ::

    <!-- fig-4-08-training-percentage; arm == "baseline" and real_percent == 5; {score:.3f} -->
    0.690<!-- / -->

(on one line): a table of ``figures/<profile>``, the row (a query of pandas), a format of its
columns. ``points``, ``points_low`` and ``points_high`` are a verdict's difference, or a mean over
subjects, with its interval, times a hundred.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd

from sdaug_utils.study import figures_folder

MARK = re.compile(r"(<!-- ([\w-]+); (.+?); (.+?) -->).*?<!-- / -->", re.DOTALL)


def filled(text: str, read: Callable[[str], pd.DataFrame]) -> str:
    """A text with each marked value as the tables have it now; ``read`` gives a table by its name.

    Raises ValueError if a mark names no table, or not exactly one row of it.
    """

    def renewed(mark: re.Match[str]) -> str:
        begin, name, query, shown = mark.groups()
        try:
            rows = read(name).query(query)
        except (OSError, pd.errors.UndefinedVariableError) as error:
            raise ValueError(f"{name}; {query}: {error}") from error
        if len(rows) != 1:
            raise ValueError(f"{name}; {query}: {len(rows)} rows, not one")
        typeset = shown.format(**rows.iloc[0])
        typeset = re.sub(r"-(?=0(\.0+)?(?![.\d]))", "", typeset)  # zero has no sign
        typeset = re.sub(r"-(?=\d)", "−", typeset)
        return f"{begin}{typeset}<!-- / -->"

    return MARK.sub(renewed, text)


def emptied(text: str) -> str:
    """A text without its marked values: the same whatever the results are."""
    return MARK.sub(r"\1", text)


def with_points(table: pd.DataFrame) -> pd.DataFrame:
    """A table of verdicts or of means over subjects, with its values in points, too."""
    for value in {"difference", "mean"} & set(table):
        ends = {"points": value, "points_low": "low", "points_high": "high"}
        table = table.assign(**{name: 100 * table[column] for name, column in ends.items()})
    return table


def renew(path: Path, profile: str) -> None:
    """Fill in the values of a Markdown file, or of a notebook's Markdown cells."""

    @cache  # many marks name one table
    def read(name: str) -> pd.DataFrame:
        return with_points(pd.read_csv(figures_folder(profile) / f"{name}.csv"))

    if path.suffix != ".ipynb":
        path.write_text(filled(path.read_text(), read))
        return
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = filled(cell.source, read)
    for name in ("files", "key"):  # they describe one run: not to be committed
        notebook.metadata.get("sdaug", {}).pop(name, None)
    nbformat.write(notebook, path)
