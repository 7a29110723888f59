"""The thesis's claims as tests on results: supported, contradicted, inconclusive.

The claims are data (``tables/claims.yaml``), as are the thesis's own results
(``tables/published_results.csv``: 125 runs read from its text and its public logs, with flags).
"""

import itertools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from sdaug_utils.evidence.metrics import (
    Estimate,
    contrast,
    estimate,
    paired_difference,
    slope_weights,
)
from sdaug_utils.training.cells import SETTING, scores

TABLES = Path(__file__).parent / "tables"
OF_SUBJECTS = ("num_inputs", "input_set", "measure")
NOT_EVIDENCE = "NO_SYNTHETIC_IMAGES_IN_TRAINING|ALMOST_NO_SYNTHETIC_IMAGES"


class NotRun(KeyError):
    """The results lack runs that a comparison needs."""


Verdict = Literal["supported", "contradicted", "inconclusive", "not tested"]
Expectation = Literal["above", "below", "within", "at most", "between"]


def published_results(dataset: str = "oxford-iiit-pet") -> pd.DataFrame:
    """The thesis's runs on a data set, without those flagged as no evidence.

    The accuracy (or Jaccard index) is that of the logs, else that of the text.
    """
    table = pd.read_csv(TABLES / "published_results.csv", dtype={"run": str})
    flagged = table["flags"].fillna("").str.contains(NOT_EVIDENCE)
    table = table[~flagged & (table["dataset"] == dataset)].drop_duplicates("run")
    # The text says segmentation maps, the code took Canny edges: the same question all the same.
    segmented = (table["task"] == "segmentation") & (table["technique"] == "controlnet-canny")
    return table.assign(
        technique=table["technique"].mask(segmented, "controlnet-segmentation"),
        value=table["value"].fillna(table["value_in_thesis"]),
        synthetic_per_class=table["synthetic_per_class"].fillna(0),
    )


def read_claims(experiment: str) -> list[dict[str, Any]]:
    """The claims that an experiment decides: those whose id begins as its name does.

    A claim has ``id``, ``section``, ``claim`` and ``comparisons``, in which nothing says ``each``.
    """
    data = yaml.safe_load((TABLES / "claims.yaml").read_text())
    claims = []
    for claim in data["claims"]:
        number = claim["id"].split("-")[0]
        if experiment.startswith(number):
            section = f"4.3.{int(number) if number.isdigit() else 3}"
            parts = claim.get("comparisons", [claim])
            every = [one for part in parts for one in _expanded(part, data["names"])]
            claims.append({**claim, "section": section, "comparisons": every})
    return claims


def _expanded(comparison: dict[str, Any], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A comparison for each combination of the values that it lists under ``each``."""
    columns = comparison.get("each", {})
    for values in itertools.product(*columns.values()):
        chosen = dict(zip(columns, values, strict=True))
        shown = {column: names.get(value, value) for column, value in chosen.items()}
        filled: dict[str, Any] = {"what": comparison["what"].format(**shown)}
        for key in ("first", "second"):
            if selector := comparison.get(key):
                filled[key] = {
                    column: chosen[column] if value == "each" else value
                    for column, value in selector.items()
                }
        yield {**comparison, **filled}


def verdict(low: float, high: float, expect: Expectation, margin: float = 0.0) -> Verdict:
    """Judge the 95 % interval of a difference against the region that a claim puts it in.

    ``above`` 0, ``below`` 0, ``within`` ± margin, ``at most`` margin, ``between`` 0 and margin. An
    interval wholly inside supports, one wholly outside contradicts, any other is inconclusive.
    """
    regions = {
        "above": (0.0, np.inf),
        "below": (-np.inf, 0.0),
        "within": (-margin, margin),
        "at most": (-np.inf, margin),
        "between": (0.0, margin),
    }
    lower, upper = regions[expect]
    if lower < low and high < upper:
        return "supported"
    return "contradicted" if high < lower or low > upper else "inconclusive"


def all_of(verdicts: list[Verdict]) -> Verdict:
    """A claim of several parts holds if all hold and falls if one falls."""
    if "contradicted" in verdicts:
        return "contradicted"
    found = set(verdicts)
    return found.pop() if len(found) == 1 else "inconclusive"


def terms(results: pd.DataFrame, selector: dict[str, Any]) -> list[tuple[float, np.ndarray]]:
    """The settings that a selector of a claim names, with their weights.

    A selector gives for columns of ``results`` a value, a list of them, or a range (``from``,
    ``to``). Without ``reduce`` the settings are averaged; ``best`` takes the one with the highest
    mean validation score; ``slope over X`` is the least-squares slope per doubling of column X,
    ``trend over X`` per step of it, averaged over what else differs.

    Raises:
        NotRun: a value that the selector names has no run, or a slope has fewer than two points.
    """
    rows, how = results, selector.get("reduce", "mean")
    for column, wanted in selector.items():
        if column in ("reduce", "weight"):
            continue
        if isinstance(wanted, dict):
            rows = rows[rows[column].between(wanted.get("from", -np.inf), wanted.get("to", np.inf))]
            continue
        values = wanted if isinstance(wanted, list) else [wanted]
        if missing := set(values) - set(rows[column]):
            raise NotRun(f"no run with {column} {missing}")
        rows = rows[rows[column].isin(values)]
    keys = [column for column in (*SETTING, *OF_SUBJECTS) if column in rows]
    settings: list[tuple[dict[str, Any], pd.DataFrame]] = [
        (dict(zip(keys, name, strict=True)), group) for name, group in rows.groupby(keys)
    ]
    if not settings:
        raise NotRun(f"no run of {selector}")
    arrays = [scores(group) for _, group in settings]
    if how == "mean":
        return [(1 / len(arrays), array) for array in arrays]
    if how == "best":
        validation = [group["validation_score"].mean() for _, group in settings]
        return [(1.0, arrays[int(np.argmax(validation))])]
    kind, column = how.split(" over ")
    lines: dict[tuple[Any, ...], list[tuple[float, np.ndarray]]] = {}
    for (setting, _), array in zip(settings, arrays, strict=True):
        others = tuple(setting[key] for key in keys if key != column)
        x = np.log2(setting[column]) if kind == "slope" else setting[column]
        lines.setdefault(others, []).append((x, array))
    weighted = []
    for points in lines.values():
        if len(points) < 2:
            raise NotRun(f"a slope over {column} needs two points")
        weights = slope_weights([x for x, _ in points]) / len(lines)
        weighted += [(w, array) for w, (_, array) in zip(weights, points, strict=True)]
    return weighted


def compared(results: pd.DataFrame, comparison: dict[str, Any]) -> Estimate:
    """The difference that decides a comparison: ``first`` minus ``second``, or a sum of ``terms``.

    Raises:
        NotRun: ``results`` lacks runs that it needs.
    """
    selectors = comparison.get("terms") or [
        {**comparison[key], "weight": weight}
        for key, weight in (("first", 1), ("second", -1))
        if key in comparison
    ]
    return contrast(
        [
            (selector["weight"] * weight, array)
            for selector in selectors
            for weight, array in terms(results, selector)
        ]
    )


def judge(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """One row per comparison of each claim that an experiment decides.

    Columns: ``id``, ``section``, ``claim``, ``comparison``, ``difference``, ``low``, ``high``
    (absolute, 95 % interval), the number of draws (or subjects), of runs per setting and of test
    images behind them, ``comparison_verdict`` and ``verdict`` (of the whole claim). What a profile
    has no runs for is ``not tested``.
    """
    rows = []
    for claim in read_claims(experiment):
        differences: list[Estimate] = []
        outcomes: list[Verdict] = []
        for comparison in claim["comparisons"]:
            try:
                found = compared(results, comparison)
                margin = comparison.get("margin", 0.0)
                outcomes.append(verdict(found.low, found.high, comparison["expect"], margin))
            except NotRun:
                found = Estimate(np.nan, np.nan, np.nan, 0, 0, 0)
                outcomes.append("not tested")
            differences.append(found)
        rows += [
            {
                **{key: claim[key] for key in ("id", "section", "claim")},
                "comparison": f"{comparison['what']}: {_bound(comparison)}",
                "difference": found.mean,
                "low": found.low,
                "high": found.high,
                "num_draws": found.num_draws,
                "num_runs": found.num_runs,
                "num_test_images": found.num_images,
                "comparison_verdict": outcome,
                "verdict": all_of(outcomes),
            }
            for comparison, found, outcome in zip(
                claim["comparisons"], differences, outcomes, strict=True
            )
        ]
    return pd.DataFrame(rows)


def _bound(comparison: dict[str, Any]) -> str:
    expect, points = comparison["expect"], f"{100 * comparison.get('margin', 0.0):g} points"
    if expect in ("above", "below") or points == "0 points":
        return f"{expect} 0"
    return {"within": f"within ± {points}", "between": f"between 0 and {points}"}.get(
        expect, f"{expect} {points}"
    )


def _gain(prefix: str, change: Estimate) -> dict[str, float]:
    """A difference of scores in absolute points, with its 95 % interval, as columns of a table."""
    names = [f"{prefix}points{end}" for end in ("", "_low", "_high")]
    return {
        name: 100 * value
        for name, value in zip(names, (change.mean, change.low, change.high), strict=True)
    }


def _published_gain(prefix: str, value: float, baseline: float) -> dict[str, float]:
    points, relative = 100 * (value - baseline), 100 * (value / baseline - 1)
    return {f"{prefix}points": points, f"{prefix}relative": relative}


def compare_protocols(results: pd.DataFrame, arm: str) -> pd.DataFrame:
    """An arm's gain over the baseline under each protocol, and the difference of the gains.

    ``results`` holds runs of both protocols with the same draws, at one real percentage. Accuracies
    are in 0 to 1, gains and their 95 % intervals in absolute points; the last row is published
    minus controlled: what the thesis's way of training adds to the gain.
    """
    rows, gains = [], []
    for protocol in ("published", "controlled"):
        runs = results[results["protocol"] == protocol]
        first, second = (
            scores(runs, arm=name).mean(axis=1, keepdims=True) for name in (arm, "baseline")
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
                **_gain("gain_", estimate(gains[-1])),
            }
        )
    difference = _gain("gain_", estimate(gains[0] - gains[1]))
    return pd.DataFrame([*rows, {"protocol": "published − controlled", **difference}])


def summary(results: pd.DataFrame, dataset: str | None = "oxford-iiit-pet") -> pd.DataFrame:
    """Published beside reproduced: one row per setting.

    Scores (accuracy, or the weighted Jaccard index) in 0 to 1 with their 95 % intervals; gains over
    the baseline at the same real percentage in absolute points, then relative in per cent; without
    real images there is no baseline, hence no gain. Published values are single runs on
    ``dataset``; None leaves them out.
    """
    theirs, rows = _published_values(dataset or ""), []
    setting: Any
    for setting, group in results.groupby(
        ["task", "arm", "real_percent", "synthetic_per_class"], sort=False
    ):
        task, arm, percent, count = setting
        values = scores(group)
        score, value = estimate(values), theirs.get((task, arm, percent, count), np.nan)
        base_value = theirs.get((task, "baseline", percent, 0), np.nan) if percent else np.nan
        gain, relative = Estimate(np.nan, np.nan, np.nan, 0, 0, 0), np.nan
        if percent > 0:
            baseline = scores(results, arm="baseline", real_percent=percent)
            gain = paired_difference(values, baseline)
            relative = 100 * gain.mean / baseline.mean()
        rows.append(
            {
                "arm": arm,
                "real_percent": percent,
                "synthetic_per_class": count,
                "published": value,
                **_published_gain("published_gain_", value, base_value),
                "score": score.mean,
                "score_low": score.low,
                "score_high": score.high,
                **_gain("gain_", gain),
                "gain_relative": relative,
                "num_draws": score.num_draws,
                "num_seeds": score.num_runs // score.num_draws,
                "num_test_images": score.num_images,
            }
        )
    return pd.DataFrame(rows)


def _published_values(dataset: str = "oxford-iiit-pet") -> pd.Series:
    """The thesis's values by task, technique, real % and synthetic images per class."""
    keys = ["task", "technique", "real_percent", "synthetic_per_class"]
    return published_results(dataset).drop_duplicates(keys).set_index(keys)["value"]


def published_settings(
    arms: Collection[str], task: str = "classification", dataset: str = "oxford-iiit-pet"
) -> pd.DataFrame:
    """The thesis's values of some arms, with the column names of :func:`summary`."""
    table = published_results(dataset)
    chosen = table[(table["task"] == task) & table["technique"].isin(arms)]
    names = {"technique": "arm", "value": "score"}
    return chosen.rename(columns=names)[["arm", "real_percent", "synthetic_per_class", "score"]]


def combinations(results: pd.DataFrame, augmentation: str) -> pd.DataFrame:
    """Each setting with an augmentation beside the same without, paired (thesis, table 4.4).

    Columns: ``technique``, ``real_percent``, ``synthetic_per_class``, the published variation in
    points and in per cent, the accuracy without and with, their difference in points with its
    95 % interval, and in per cent.
    """
    theirs, rows = _published_values(), []
    keys = ["technique", "real_percent", "synthetic_per_class"]
    chosen = results[results["augmentation"] == augmentation]
    for (technique, percent, count), group in chosen.groupby(keys, sort=False):
        setting = {"real_percent": percent, "synthetic_per_class": count}
        without = scores(results, arm=technique, **setting)
        change = paired_difference(scores(group), without)
        before, after = (
            theirs.get(("classification", name, percent, count), np.nan)
            for name in (technique, f"{technique}+{augmentation}")
        )
        rows.append(
            {
                "technique": technique,
                **setting,
                **_published_gain("published_", after, before),
                "without": without.mean(),
                "with": scores(group).mean(),
                **_gain("", change),
                "relative": 100 * change.mean / without.mean(),
            }
        )
    return pd.DataFrame(rows)
