"""The thesis's claims as tests on results: supported, contradicted, inconclusive.

The claims are data (``data/claims.yaml``), as are the thesis's own results
(``data/published_results.csv``: 125 runs read from its text and its public logs, with flags).
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from sdaug_utils.cells import correct
from sdaug_utils.metrics import Estimate, estimate, paired_difference

DATA_FOLDER = Path(__file__).parent / "data"
NOT_EVIDENCE = "NO_SYNTHETIC_IMAGES_IN_TRAINING"

JUDGED_COLUMNS = (
    "id",
    "section",
    "claim",
    "comparison",
    "difference",
    "low",
    "high",
    "comparison_verdict",
    "verdict",
)

Verdict = Literal["supported", "contradicted", "inconclusive"]


def published_results(experiment: str) -> pd.DataFrame:
    """The thesis's runs of one experiment, without those flagged as no evidence."""
    table = pd.read_csv(DATA_FOLDER / "published_results.csv", dtype={"run": str})
    flagged = table["flags"].fillna("").str.contains(NOT_EVIDENCE)
    return table[(table["experiment"] == experiment) & ~flagged].reset_index(drop=True)


def read_claims(experiment: str) -> list[dict[str, Any]]:
    """The claims whose id begins with the experiment's number."""
    claims = yaml.safe_load((DATA_FOLDER / "claims.yaml").read_text())
    return [claim for claim in claims if claim["id"].startswith(experiment[:2])]


def verdict(
    low: float, high: float, expect: Literal["above", "below", "within"], margin: float = 0.0
) -> Verdict:
    """Judge the 95 % interval of a difference.

    ``above`` and ``below``: the interval must lie wholly on that side of 0. ``within``: wholly
    inside ± margin. Wholly on the other side contradicts; anything else is inconclusive.
    """
    if expect == "within":
        if -margin <= low and high <= margin:
            return "supported"
        return "contradicted" if low > margin or high < -margin else "inconclusive"
    if expect == "below":
        low, high = -high, -low
    if low > 0:
        return "supported"
    return "contradicted" if high < 0 else "inconclusive"


def all_of(verdicts: list[Verdict]) -> Verdict:
    """A claim of several parts holds if all hold and falls if one falls."""
    if "contradicted" in verdicts:
        return "contradicted"
    return "supported" if set(verdicts) == {"supported"} else "inconclusive"


def pooled_difference(
    results: pd.DataFrame, first: str, second: str, percents: list[float]
) -> Estimate:
    """Accuracy of one arm minus another's, averaged over real percentages, paired throughout."""
    pairs = [
        [correct(results, arm, percent).mean(axis=1, keepdims=True) for percent in percents]
        for arm in (first, second)
    ]
    means = [np.mean(arm, axis=0) for arm in pairs]
    return paired_difference(means[0], means[1])


def judge(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """One row per comparison of each claim whose runs are in ``results``.

    Columns: ``id``, ``section``, ``claim``, ``comparison``, ``difference``, ``low``, ``high``
    (absolute, 95 % interval), ``comparison_verdict`` and ``verdict`` (of the whole claim).
    """
    available = set(zip(results["arm"], results["real_percent"], strict=True))
    rows = []
    for claim in read_claims(experiment):
        parts = []
        for comparison in claim["comparisons"]:
            first, second, percents = (comparison[k] for k in ("first", "second", "percents"))
            needed = {(arm, percent) for arm in (first, second) for percent in percents}
            if not needed <= available:
                continue
            difference = pooled_difference(results, first, second, percents)
            expect, margin = comparison["expect"], comparison.get("margin", 0.0)
            bound = f"within ± {100 * margin:g} points" if margin else f"{expect} 0"
            shown = ", ".join(f"{percent:g}" for percent in percents)
            parts.append(
                {
                    "id": claim["id"],
                    "section": claim["section"],
                    "claim": claim["claim"],
                    "comparison": f"{first} − {second} at {shown} %: {bound}",
                    "difference": difference.mean,
                    "low": difference.low,
                    "high": difference.high,
                    "comparison_verdict": verdict(difference.low, difference.high, expect, margin),
                }
            )
        if len(parts) == len(claim["comparisons"]):
            whole = all_of([part["comparison_verdict"] for part in parts])
            rows += [{**part, "verdict": whole} for part in parts]
    return pd.DataFrame(rows, columns=JUDGED_COLUMNS)


def compare_protocols(results: pd.DataFrame, arm: str, percent: float) -> pd.DataFrame:
    """An arm's gain over the baseline under each protocol, and the difference of the gains.

    ``results`` holds runs of both protocols with the same draws. Accuracies are in 0 to 1, gains
    and their 95 % intervals in absolute points; the last row is published minus controlled: what
    the thesis's way of training adds to the gain.
    """
    rows, gains = [], []
    for protocol in ("published", "controlled"):
        runs = results[results["protocol"] == protocol]
        first, second = (
            correct(runs, name, percent).mean(axis=1, keepdims=True) for name in (arm, "baseline")
        )
        gains.append(first - second)
        updates = runs.groupby("arm")["num_updates"].mean()
        rows.append(
            {
                "protocol": protocol,
                "baseline_updates": updates["baseline"],
                "baseline_accuracy": second.mean(),
                "updates": updates[arm],
                "accuracy": first.mean(),
                **_points(estimate(gains[-1])),
            }
        )
    difference = _points(estimate(gains[0] - gains[1]))
    rows.append({"protocol": "published − controlled", **difference})
    return pd.DataFrame(rows)


def _points(gain: Estimate) -> dict[str, float]:
    return {
        "gain_points": 100 * gain.mean,
        "gain_points_low": 100 * gain.low,
        "gain_points_high": 100 * gain.high,
    }


def summary(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Published beside reproduced: one row per arm and real percentage.

    Accuracy in 0 to 1 with its 95 % interval; gains over the baseline at the same percentage in
    absolute points, then relative in per cent. Published values are single runs.
    """
    published = published_results(experiment).set_index(["technique", "real_percent"])["value"]
    rows = []
    arms = results.drop_duplicates(["arm", "real_percent"])
    for arm, percent in zip(arms["arm"], arms["real_percent"], strict=True):
        values = correct(results, arm, percent)
        baseline = correct(results, "baseline", percent)
        accuracy, gain = estimate(values), paired_difference(values, baseline)
        theirs, their_baseline = (published.get((a, percent), np.nan) for a in (arm, "baseline"))
        rows.append(
            {
                "arm": arm,
                "real_percent": percent,
                "published_accuracy": theirs,
                "published_gain_points": 100 * (theirs - their_baseline),
                "published_gain_relative": 100 * (theirs / their_baseline - 1),
                "accuracy": accuracy.mean,
                "accuracy_low": accuracy.low,
                "accuracy_high": accuracy.high,
                **_points(gain),
                "gain_relative": 100 * gain.mean / baseline.mean(),
                "num_draws": values.shape[0],
                "num_seeds": values.shape[1],
                "num_test_images": values.shape[2],
            }
        )
    return pd.DataFrame(rows)
