"""Raw runs, shipped with the project: figures, tables and verdicts are made from them alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from sdaug_utils.errors import InputError
from sdaug_utils.params import invocation_of
from sdaug_utils.store import write_atomically
from sdaug_utils.study import WRITTEN, results_folder

STORED_AS = {
    "predictions": np.int16,
    "scores": np.float32,
    "mean_iou": np.float32,
    "confidences": np.float16,
}
"""Columns with a value per test image, and the types that they are written in."""


def kept(profile: str, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Write the results of ``make`` to ``results/<profile>/<name>.parquet``; return what is there.

    With ``run_all.py --from-results`` they are only read; InputError if there are none.
    """
    path = results_folder(profile) / f"{name}.parquet"
    if not invocation_of(profile).from_results:
        rows = make().reset_index(drop=True)
        for column in STORED_AS.keys() & set(rows):
            rows[column] = pd.Series([_small(values, STORED_AS[column]) for values in rows[column]])
        write_result(path, lambda temporary: rows.to_parquet(temporary, compression="zstd"))
    if not path.exists():
        raise InputError(f"{path.name}: no such results in {path.parent}: run it first")
    return pd.read_parquet(path)


def _small(values: np.ndarray, kind: type) -> np.ndarray:
    """An array in a smaller type; a single score stays exact."""
    return values if values.dtype == bool or values.size == 1 else values.astype(kind)


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file of results, of a figure or of a table, and remember that this process did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    WRITTEN.append(str(path))
