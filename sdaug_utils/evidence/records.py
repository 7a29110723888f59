"""Raw runs, shipped: a row each, with all that figures, tables and verdicts are made from."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from sdaug_utils.errors import InputError
from sdaug_utils.params import invocation_of
from sdaug_utils.store import write_atomically
from sdaug_utils.study import WRITTEN, results_folder

SMALL = {
    "predictions": np.int16,
    "scores": np.float32,
    "mean_iou": np.float32,
    "confidences": np.float16,
}
"""Columns with a value per test image, and as what they are written."""


def kept(profile: str, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Results, written to ``results/<profile>/<name>.parquet`` once made.

    With ``run_all.py --from-results`` they are read from there, and ``make`` is not called. In
    either case what is returned is what was written.

    Raises:
        InputError: they are to be read, and are not there.
    """
    path = results_folder(profile) / f"{name}.parquet"
    if not invocation_of(profile).from_results:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _small(make())
        write_atomically(path, lambda temporary: rows.to_parquet(temporary, compression="zstd"))
        WRITTEN.append(str(path))
    if not path.exists():
        raise InputError(f"{path.name}: no such results in {path.parent}: run it first")
    return pd.read_parquet(path)


def _small(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose arrays are of the smallest type that holds them; one score alone stays exact."""

    def small(values: np.ndarray, kind: type) -> np.ndarray:
        return values if values.dtype == bool or values.size == 1 else values.astype(kind)

    rows = rows.reset_index(drop=True)
    for name, kind in SMALL.items():
        if name in rows:
            rows[name] = pd.Series([small(values, kind) for values in rows[name]])
    return rows
