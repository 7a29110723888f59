"""The thesis's claims as tests on results: supported, contradicted, inconclusive.

The claims are data (``tables/claims.yaml``), as are the thesis's own results
(``tables/published_results.csv``: 125 runs read from its text and its public logs, with flags).
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from sdaug_utils.evidence import metrics
from sdaug_utils.training.runs import SETTING, chosen, scores

TABLES = Path(__file__).parent / "tables"
# Columns besides SETTING in which settings of 01 to 03 and 11 differ:
MORE_KEYS = ("num_inputs", "input_set", "measure", "budget", "shift")
NO_RUNS = metrics.Estimate(np.nan, np.nan, np.nan, 0, 0, 0, metrics.Spread(np.nan, np.nan))
BASELINE = {"arm": "baseline", "synthetic_per_class": 0}
PUBLISHED_KEYS = ["task", "arm", "real_percent", "synthetic_per_class"]
NOT_EVIDENCE = "NO_SYNTHETIC_IMAGES_IN_TRAINING|ALMOST_NO_SYNTHETIC_IMAGES"


class NotRun(KeyError):
    """The results lack runs that a comparison needs."""


Verdict = Literal["supported", "contradicted", "inconclusive", "not tested"]
Expectation = Literal["above", "below", "within", "at most"]
EQUIVALENCE = ("within", "at most")  # shown by two one-sided tests at 5 %: a 90 % interval


def published_results(dataset: str) -> pd.DataFrame:
    """The thesis's runs on a data set, without those flagged as no evidence.

    The accuracy (or Jaccard index) is that of the logs, else that of the text.
    """
    table = pd.read_csv(TABLES / "published_results.csv", dtype={"run": str})
    flagged = table["flags"].fillna("").str.contains(NOT_EVIDENCE)
    table = table[~flagged & (table["dataset"] == dataset)].drop_duplicates("run")
    # The thesis's text says segmentation maps, its code used Canny edges: listed as the former.
    segmented = (table["task"] == "segmentation") & (table["technique"] == "controlnet-canny")
    return table.assign(
        technique=table["technique"].mask(segmented, "controlnet-segmentation"),
        value=table["value"].fillna(table["value_in_thesis"]),
        synthetic_per_class=table["synthetic_per_class"].fillna(0),
    )


def published_settings(
    arms: Collection[str], dataset: str, task: str = "classification"
) -> pd.DataFrame:
    """The thesis's values of some arms on one of its data sets, columns as in :func:`gains`."""
    table = published_results(dataset).rename(columns={"technique": "arm", "value": "score"})
    rows = (table["task"] == task) & table["arm"].isin(arms)
    return table.loc[rows, ["arm", "real_percent", "synthetic_per_class", "score"]]


@cache
def _claims_file() -> dict[str, Any]:
    return yaml.safe_load((TABLES / "claims.yaml").read_text())


def notebook_of(claim: str) -> str:
    """The number of the notebook that decides a claim, by the claim's id."""
    number = claim.split("-")[0]
    return _claims_file()["decided_in"].get(number, number)


def read_claims(experiment: str) -> list[dict[str, Any]]:
    """The claims whose ids begin with a notebook's number (or X, Y), or the one claim of an id.

    A claim has ``id``, ``section``, ``claim`` and ``comparisons``, in which nothing says ``each``;
    the ``primary`` ones decide it, the others are only shown.
    """
    data, claims = _claims_file(), []
    for claim in data["claims"]:
        number = claim["id"].split("-")[0]
        of_notebook = number.isdigit() and experiment.startswith(f"{number}-")
        if not of_notebook and experiment not in (claim["id"], number):
            continue
        section = claim.get("source") or f"4.3.{int(number)}"
        same = {key: claim[key] for key in ("expect", "margin") if key in claim}
        parts = [{**part, "primary": True} for part in claim.get("comparisons", [claim])]
        parts += [{**same, **part, "primary": False} for part in claim.get("secondary", [])]
        every = [one for part in parts for one in _expanded(part, data["names"])]
        claims.append({**claim, "section": section, "comparisons": every})
    return claims


def _expanded(comparison: dict[str, Any], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A comparison for each combination of the values that it lists under ``each``."""
    columns = comparison.get("each", {})
    for values in itertools.product(*columns.values()):
        each = dict(zip(columns, values, strict=True))
        shown = {column: names.get(value, value) for column, value in each.items()}
        filled: dict[str, Any] = {"what": comparison["what"].format(**shown)}
        for key in {"first", "second"} & set(comparison):
            selector = comparison[key]
            filled[key] = selector | {x: each[x] for x in selector if selector[x] == "each"}
        yield {**comparison, **filled}


def region(expect: Expectation, margin: float = 0.0) -> tuple[float, float]:
    """Where a claim puts a difference: above or below 0, within ± margin, at most margin."""
    lower = {"above": 0.0, "within": -margin}.get(expect, -np.inf)
    upper = {"below": 0.0, "within": margin, "at most": margin}.get(expect, np.inf)
    return lower, upper


def verdict(found: metrics.Estimate, expect: Expectation, margin: float = 0.0) -> Verdict:
    """Judge a difference, with its 95 % interval, against the :func:`region` of a claim.

    An interval wholly inside supports, one wholly outside contradicts, any other is inconclusive.
    For "within" and "at most", which say that there is no effect, it is the 90 % interval that
    supports: two one-sided tests at 5 % (Schuirmann, 1987).
    """
    lower, upper = region(expect, margin)
    if found.high < lower or found.low > upper:
        return "contradicted"
    return "supported" if p_values(found, expect, margin)[0] <= 0.05 else "inconclusive"


def p_values(
    found: metrics.Estimate, expect: Expectation, margin: float = 0.0
) -> tuple[float, float]:
    """p-value of the test that supports a claim, and that of the test that contradicts it.

    Two-sided; for "within" and "at most" the one that supports is the larger one-sided one.
    """
    lower, upper = region(expect, margin)
    bounds = [(b, side) for b, side in ((lower, 1), (upper, -1)) if np.isfinite(b)]
    inside = max(found.p_value(bound, side) for bound, side in bounds)
    outside = min(found.p_value(bound, -side) for bound, side in bounds)
    supports = inside if expect in EQUIVALENCE else min(1.0, 2 * inside)
    return supports, min(1.0, 2 * outside)


def detectable(found: metrics.Estimate, expect: Expectation, margin: float = 0.0) -> float:
    """The smallest distance from the claim's bound that would have been found with 80 % power."""
    lower, upper = region(expect, margin)
    return found.detectable(0.9 if expect in EQUIVALENCE and lower < found.mean < upper else 0.95)


def all_of(verdicts: list[Verdict]) -> Verdict:
    """The verdict on a claim of several parts: all must hold, and one that fails is enough."""
    if "contradicted" in verdicts:
        return "contradicted"
    return verdicts[0] if len(set(verdicts)) == 1 else "inconclusive"


def terms(results: pd.DataFrame, selector: dict[str, Any]) -> list[tuple[float, np.ndarray]]:
    """The scores of the settings that a selector of a claim names, with their weights.

    A selector gives for columns of ``results`` a value, a list of them, or a range (``from``,
    ``to``). Without ``reduce`` the settings are averaged; ``best`` takes the one with the highest
    mean validation score; ``slope over X`` is the least-squares slope per doubling of column X,
    ``trend over X`` per step of it, averaged over the other columns' values.

    Raises NotRun if a value that the selector names has no run, or a slope has one point only.
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
    keys = [column for column in (*SETTING, *MORE_KEYS) if column in rows]
    groups = [group for _, group in rows.groupby(keys)]
    if not groups:
        raise NotRun(f"no run of {selector}")
    arrays = [scores(group) for group in groups]
    if how == "mean":
        return [(1 / len(arrays), array) for array in arrays]
    if how == "best":
        validation = [group["validation_score"].mean() for group in groups]
        return [(1.0, arrays[int(np.argmax(validation))])]
    kind, column = how.split(" over ")
    settings = pd.DataFrame([group.iloc[0][keys] for group in groups]).reset_index(drop=True)
    lines = settings.groupby([key for key in keys if key != column], sort=False)[column]
    weighted: list[tuple[float, np.ndarray]] = []
    for _, line in lines:
        if len(line) < 2:
            raise NotRun(f"a slope over {column} needs two points")
        x = line.to_numpy(float)
        x = np.log2(x) if kind == "slope" else x
        weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum() / len(lines)
        weighted += zip(weights, [arrays[row] for row in line.index], strict=True)
    return weighted


def _selectors(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """What a comparison adds up, each with its weight."""
    signs = {"first": 1, "second": -1}
    return comparison.get("terms") or [
        {**comparison[key], "weight": sign} for key, sign in signs.items() if key in comparison
    ]


def compared(results: pd.DataFrame, comparison: dict[str, Any]) -> metrics.Estimate:
    """The difference that decides a comparison: ``first`` minus ``second``, or a sum of ``terms``.

    Raises NotRun if ``results`` lacks runs that it needs.
    """
    parts = _selectors(comparison)
    weighted = [(part["weight"] * w, array) for part in parts for w, array in terms(results, part)]
    return metrics.contrast(weighted)


def _at_chance(results: pd.DataFrame, comparison: dict[str, Any]) -> bool:
    """Whether a baseline of a comparison is at chance: its interval reaches 1 / classes."""
    if "predictions" not in results:
        return False
    # Every class is predicted by some run.
    chance = 1 / (1 + max(int(values.max()) for values in results["predictions"]))
    baselines = [part for part in _selectors(comparison) if part.get("arm") == "baseline"]
    arrays = [array for part in baselines for _, array in terms(results, part)]
    return any(metrics.estimate(array).low <= chance for array in arrays)


def judge(results: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """One row per comparison of each claim that an experiment decides.

    ``difference``, ``low`` and ``high`` are absolute, with a 95 % interval; of an open comparison
    :func:`detectable` says what would have been found; ``verdict`` is the claim's, by its primary
    comparisons. Without runs a comparison is ``not tested``, and so it is
    where a baseline's interval includes chance.
    """
    rows = []
    for claim in read_claims(experiment):
        parts = [_judged(results, claim, comparison) for comparison in claim["comparisons"]]
        whole = all_of([part["comparison_verdict"] for part in parts if part["primary"]])
        rows += [{**part, "verdict": whole} for part in parts]
    return pd.DataFrame(rows)


def _judged(
    results: pd.DataFrame, claim: dict[str, Any], comparison: dict[str, Any]
) -> dict[str, Any]:
    expect, margin = comparison["expect"], comparison.get("margin", 0.0)
    outcome: Verdict = "not tested"
    found, p = NO_RUNS, np.nan
    try:
        found = compared(results, comparison)
        if not _at_chance(results, comparison):
            outcome, p = verdict(found, expect, margin), min(p_values(found, expect, margin))
    except NotRun:
        pass
    is_open = outcome == "inconclusive"
    return {
        **{key: claim[key] for key in ("id", "section", "claim")},
        "comparison": f"{comparison['what']}: {_bound(expect, margin)}",
        "primary": comparison["primary"],
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "num_draws": found.num_draws,  # or of subjects
        "num_runs": found.num_runs,  # of each setting
        "num_test_images": found.num_images,
        "p_value": p,
        "detectable": detectable(found, expect, margin) if is_open else np.nan,
        "comparison_verdict": outcome,
    }


def _bound(expect: Expectation, margin: float) -> str:
    if expect in ("above", "below") or margin == 0:
        return f"{expect} 0"
    unit = "point" if margin == 0.01 else "points"
    return f"{expect} {'±' * (expect == 'within')}{100 * margin:g} {unit}"


def holm(judged: pd.DataFrame) -> pd.DataFrame:
    """All claims' verdicts with columns ``p_holm`` and ``verdict_holm``, which allow for many.

    Holm (1979): the probability that any of the claims that stay decided is wrong is at most 5 %.
    A claim of several parts is supported if all are (their largest p-value counts), and
    contradicted if one is (the smallest counts, times their number).
    """
    p_values: dict[str, float] = {}
    for name, parts in judged[judged["primary"]].groupby("id", sort=False):
        of_parts = parts["p_value"]
        if "contradicted" in set(parts["verdict"]):
            fallen = of_parts[parts["comparison_verdict"] == "contradicted"]
            p_values[str(name)] = min(1.0, len(parts) * fallen.min())
        elif not of_parts.isna().any():
            p_values[str(name)] = of_parts.max()
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    found = judged["id"].map(adjusted)
    weak = (found > 0.05) & (judged["verdict"] != "not tested")
    return judged.assign(p_holm=found, verdict_holm=judged["verdict"].mask(weak, "inconclusive"))


def gains(
    results: pd.DataFrame,
    by: Sequence[str] = ("arm", "real_percent", "synthetic_per_class"),
    against: Mapping[str, Any] = BASELINE,
    dataset: str = "",
) -> pd.DataFrame:
    """One row per setting: its score, and its gain over a reference setting.

    Scores are accuracies, or weighted Jaccard indices, in 0 to 1; gains are in absolute points, or
    ``relative`` in per cent, and empty where there is no reference. Intervals are of 95 %. Settings
    differ in the columns ``by``; a setting's reference is the same but for the values ``against``.
    The thesis's runs on ``dataset`` are ``published``; by default none are.

    Raises KeyError if a setting with real images has no reference, ValueError if one has not one
    run per draw and seed.
    """
    table = published_results(dataset).rename(columns={"technique": "arm"})
    theirs = table.drop_duplicates(PUBLISHED_KEYS).set_index(PUBLISHED_KEYS)["value"]

    def published(runs: pd.DataFrame) -> float:
        if runs.empty:
            return np.nan
        return theirs.get(tuple(runs.iloc[0].reindex(PUBLISHED_KEYS)), np.nan)

    rows = []
    for values, group in results.groupby([*by], sort=False):
        setting: dict[str, Any] = dict(zip(by, values, strict=True))
        other = chosen(results, **(setting | dict(against)))
        value, reference = published(group), published(other)
        score, change, relative = metrics.estimate(scores(group)), NO_RUNS, np.nan
        if len(other):
            change = metrics.paired_difference(scores(group), scores(other))
            relative = 100 * change.mean / scores(other).mean()
        elif setting.get("real_percent", 1) > 0:
            raise KeyError(f"nothing to compare {setting} with: no run with {dict(against)}")
        rows.append(
            {
                **setting,
                "published": value,
                "published_gain_points": 100 * (value - reference),
                "published_gain_relative": 100 * (value / reference - 1),
                "score": score.mean,
                "score_low": score.low,
                "score_high": score.high,
                "gain_points": 100 * change.mean,
                "gain_points_low": 100 * change.low,
                "gain_points_high": 100 * change.high,
                "gain_relative": relative,
                "num_draws": score.num_draws,
                "num_seeds": score.num_runs // score.num_draws,
                "num_test_images": score.num_images,
            }
        )
    return pd.DataFrame(rows)


def at_budgets(curve: pd.DataFrame, few: int, many: int) -> pd.DataFrame:
    """Runs of three ``budget``s, as claims read them, from accuracy against updates.

    ``few``, ``many``: so many updates for each arm; ``own``: few for the baseline, many for others.
    ``curve`` is test accuracy in 0 to 1 by ``arm``, ``draw`` and ``step``, at one learning rate.
    """
    own = np.where(curve["arm"] == "baseline", few, many)
    parts = [
        curve[curve["step"] == steps].assign(budget=budget, seed=0)
        for budget, steps in (("own", own), ("many", many), ("few", few))
    ]
    runs = pd.concat(parts, ignore_index=True)
    return runs.assign(scores=pd.Series([np.array([value]) for value in runs["test_accuracy"]]))


def what_helps(gains: pd.DataFrame, num_classes: int, name: Callable[[str], str]) -> str:
    """One sentence on which arms beat the baseline at one real percentage.

    ``gains`` are rows of :func:`gains`, the baseline's among them; ``name`` gives an arm's label.
    """
    is_baseline = gains["arm"] == "baseline"
    others = gains[~is_baseline].sort_values("gain_points", ascending=False)
    best = others.iloc[0]
    where = f"At {best['real_percent']:g} % real images"
    if gains[is_baseline].iloc[0]["score_low"] <= 1 / num_classes:
        return f"{where} the baseline may be at chance: nothing can be compared with it."
    interval = f"[{best['gain_points_low']:.1f}, {best['gain_points_high']:.1f}]"
    gain = f"{name(best['arm'])}, {best['gain_points']:+.1f} points {interval}"
    helping = [name(arm) for arm in others.loc[others["gain_points_low"] > 0, "arm"]]
    if not helping:
        return f"{where} nothing is shown to help: the highest mean has {gain}."
    return (
        f"{where} the highest mean has {gain}. Better than real images alone, by their 95 % "
        f"intervals: {', '.join(helping)}."
    )
