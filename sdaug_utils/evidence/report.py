"""What a whole run leaves: the verdict on every claim, and the machine that it ran on.

python -m sdaug_utils.evidence.report README.md CLAIMS.md notebooks/*.ipynb

renews the tables of verdicts and every number in prose between marks
(``sdaug_utils.evidence.prose``).
"""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from sdaug_utils import compute
from sdaug_utils.data.datasets import PROJECT
from sdaug_utils.evidence import metrics, prose
from sdaug_utils.evidence.claims import TABLES, holm
from sdaug_utils.evidence.figures import save_table
from sdaug_utils.generation.foundation import resolved
from sdaug_utils.params import Settings, load_settings
from sdaug_utils.registry import experiments, techniques
from sdaug_utils.store import makers
from sdaug_utils.study import figures_folder, results_folder
from sdaug_utils.training.features import BACKBONES
from sdaug_utils.training.runs import scores

MARKS = "<!-- {}: made by 'make notebooks' -->", "<!-- end of {} -->"


def revision() -> dict[str, str | int | None]:
    """The commit that this project is at, and how many of its files differ from it."""

    def git(*command: str) -> str:
        return subprocess.check_output(
            ["git", *command], cwd=PROJECT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "files changed since": len(changed)}
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        return {"commit": None, "files changed since": None}


def software(artefacts: Iterable[Path]) -> dict[str, str]:
    """Versions of Python and of the libraries that do the work (thesis, table B.1).

    Of those that make ``artefacts``, all versions that the artefacts in use were made with.
    """
    facts = {"python": platform.python_version()}
    facts |= {name: version(name) for name in compute.TOOLS}
    found = makers(artefacts) or [compute.made_with()]
    for name in (*compute.LIBRARIES, "device"):
        facts[name] = "; ".join(sorted({maker[name] for maker in found}))
    facts["made on"] = facts.pop("device")
    return facts


def hyperparameters(settings: Settings) -> dict[str, pd.DataFrame]:
    """Tables 4.1 to 4.3: the thesis's values beside those in use, by file name."""
    in_use, tables = settings.model_dump(), {}
    published = yaml.safe_load((TABLES / "hyperparameters.yaml").read_text())
    for name, table in published.items():
        ours = {"resolution": settings.sampling.resolution, **in_use[table["section"]]}
        ours |= table.get("fixed", {})
        theirs = table["thesis"] | table["more"]
        rows = [(key, str(value), str(ours[key])) for key, value in theirs.items()]
        tables[name] = pd.DataFrame(rows, columns=["hyperparameter", "thesis", "in use"])
    return tables


def models(settings: Settings) -> dict[str, str]:
    """The models in use: the commits of those from the Hugging Face hub, the backbones' weights."""
    named = {"text-to-image model": resolved(settings.foundation)}
    for technique in techniques().values():
        named |= {what: resolved(*model) for what, model in technique.models(settings).items()}
    for task in ("classifier", "segmenter"):
        backbone = getattr(settings, task).backbone
        named[f"{task}'s backbone"] = f"{backbone} ({BACKBONES[backbone]})"
    return named


def write_tables(profile: str, artefacts: Iterable[Path]) -> None:
    """Tables A.1, B.1 (of the ``artefacts`` that the notebooks used), of claims and deviations."""
    tables: dict[str, Mapping[str, Any]] = {
        "table-a-1-hardware": compute.hardware(),
        "table-b-1-software": software(artefacts) | models(load_settings(profile)),
    }
    for name, facts in tables.items():
        save_table(profile, name, pd.DataFrame(facts.items(), columns=["what", "value"]))
    write_claims(profile)


def write_claims(profile: str) -> None:
    """``claims.csv``: the notebooks' verdicts, corrected for the number of all by :func:`holm`.

    Claims of experiments beyond the thesis stand on their own, in ``claims-beyond.csv``.
    ``deviations.csv`` has the :func:`deviations` of each of the thesis's experiments.
    """
    of_thesis = {name[:2]: one.in_thesis for name, one in experiments().items()}
    files = {number: figures_folder(profile) / f"verdicts-{number}.csv" for number in of_thesis}
    tables = {number: pd.read_csv(file) for number, file in files.items() if file.exists()}
    if tables:
        judged = holm(pd.concat(tables).reset_index(level=0, names="notebook"))
        in_thesis = judged.pop("notebook").map(of_thesis)
        for name, rows in (("claims", in_thesis), ("claims-beyond", ~in_thesis)):
            if rows.any():
                save_table(profile, name, judged[rows])
    raw = [results_folder(profile) / f"{x}.parquet" for x in of_thesis if of_thesis[x]]
    found = [
        deviations(runs).assign(experiment=path.stem)
        for path in raw
        if path.exists() and "real_percent" in (runs := pd.read_parquet(path))
    ]
    if found:
        save_table(profile, "deviations", pd.concat(found, ignore_index=True))


def deviations(results: pd.DataFrame) -> pd.DataFrame:
    """Standard deviations of an arm's gain over the baseline, by real percentage, in points.

    Variances (:func:`metrics.run_deviations`) are averaged over arms and numbers of synthetic
    images, techniques that generate nothing left out. Empty where there is no baseline.
    """
    rows, known = [], techniques()
    others = [name for name in known if not known[name].is_generative]
    results = results[~results["arm"].isin(others)]
    for percent, group in results[results["real_percent"] > 0].groupby("real_percent", sort=False):
        is_baseline = group["arm"] == "baseline"
        settings = group[~is_baseline].groupby(["arm", "synthetic_per_class"])
        if not is_baseline.any() or not len(settings):
            continue
        baseline = scores(group[is_baseline]).astype(float)
        gains = [scores(runs) - baseline for _, runs in settings]
        found = pd.DataFrame([metrics.run_deviations(gain) for gain in gains])
        mean = 100 * np.sqrt((found**2).mean())
        rows.append({"real_percent": percent, **mean.to_dict(), "num_settings": len(found)})
    return pd.DataFrame(rows)


def deviation_table(table: pd.DataFrame) -> str:
    """``deviations.csv`` as a table in Markdown."""
    rows = ["| | real data | draw | seed | test images |", "|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        values = [row[name] for name in ("draw", "seed", "test images")]
        shown = " | ".join("–" if np.isnan(value) else f"{value:.1f}" for value in values)
        rows.append(f"| {row['experiment']:0>2} | {row['real_percent']:g} % | {shown} |")
    return "\n".join(rows)


def verdicts(claims: pd.DataFrame) -> list[dict[str, str]]:
    """What tables show of each claim of ``claims.csv``, with differences in points.

    Only the primary comparisons, which decide, are shown. ``remark`` is whether a decided claim
    stays so by Holm's rule, or which distance from its bound an open one would have shown.
    """
    rows = []
    for (name, claim), parts in claims[claims["primary"]].groupby(["id", "claim"], sort=False):
        differences = [
            "–" if np.isnan(mean) else f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for mean, low, high in parts[["difference", "low", "high"]].to_numpy()
        ]
        found, strict, p = parts.iloc[0][["verdict", "verdict_holm", "p_holm"]]
        remark = "the same" if strict == found else f"{strict} (p = {p:.2f})"
        if found == "inconclusive":
            points = 100 * parts["detectable"]
            remark = "; ".join("–" if np.isnan(one) else f"{one:.1f} points" for one in points)
        elif found == "not tested":
            remark = ""
        row = {"id": name, "claim": claim, "difference": "; ".join(differences)}
        rows.append({**row, "verdict": found, "remark": remark})
    return rows


def verdict_table(claims: pd.DataFrame) -> str:
    """The verdicts of ``claims.csv`` as a table in Markdown, a row per claim."""
    last = "by Holm's rule; if open, the distance from its bound that would have been found"
    head = f"| | claim | difference [95 %] | verdict | {last} |"
    row = "| {id} | {claim} | {difference} | **{verdict}** | {remark} |"
    return "\n".join([head, "|---|---|---|---|---|", *(row.format(**x) for x in verdicts(claims))])


TABLES_SHOWN: dict[str, Callable[[pd.DataFrame], str]] = {
    "claims": verdict_table,
    "claims-beyond": verdict_table,
    "deviations": deviation_table,
}


def renew(path: Path, profile: str = "miniature") -> None:
    """Put tables between their marks, if there are any, and the numbers in prose."""
    text = path.read_text()
    for name, table in TABLES_SHOWN.items():
        start, end = (mark.format(name) for mark in MARKS)
        if start in text:
            made = table(pd.read_csv(figures_folder(profile) / f"{name}.csv"))
            before, rest = text.split(start)
            text = f"{before}{start}\n{made}\n{end}{rest.split(end)[1]}"
    path.write_text(text)
    prose.renew(path, profile)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renew(Path(name))
