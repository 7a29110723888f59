"""One style for every figure; sample sheets; curves; published beside reproduced."""

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import yaml
from IPython.display import Image as DisplayedImage
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from sdaug_utils.evidence.claims import TABLES, notebook_of
from sdaug_utils.params import load_settings
from sdaug_utils.registry import repeats_of, techniques
from sdaug_utils.store import write_atomically
from sdaug_utils.study import WRITTEN, figures_folder

LARGEST = 128  # pixels of an image's side on a sheet
REAL_ARMS = {
    "baseline": ("Baseline", "black", "o"),
    "custom": ("Custom", "#8c8c8c", "s"),
    "autoaugment": ("AutoAugment", "#a1795a", "D"),
    "randaugment": ("RandAugment", "#c7a42e", "^"),
    "mixup": ("mixup", "#7f9a65", "v"),
    "cutmix": ("CutMix", "#657f9a", "^"),
    "hypernym": ("Bare name of the kind", "black", "x"),
}


RULES = {
    "chance": ("Chance", "black", "o"),
    "confidence": ("Confidence", "#c44e52", "v"),
    "agreement": ("Agreement", "#d98b4a", "^"),
    "nearness": ("Nearness to real", "#3a6fb0", "s"),
    "diversity": ("Diversity", "#5b7f3a", "D"),
    "distribution": ("Distribution", "#8a5aa8", "P"),
}


NOT_TECHNIQUES = REAL_ARMS | RULES
VARIANTS = "osD^v<>Pp*hX"  # markers


def arm_style(arm: str) -> tuple[str, str, str]:
    """Label, colour and marker of an arm, the same in every figure.

    An arm is ``baseline``, an augmentation or a technique; what a ``+`` adds makes it paler.
    """
    first, *more = arm.split("+")
    if first in NOT_TECHNIQUES:
        label, colour, marker = NOT_TECHNIQUES[first]
    else:
        known = techniques()[first]
        label, colour, marker = known.label, known.colour, known.marker
    for name in more:
        label += ", controls from outside" if name == "outside" else f" + {label_of(name)}"
        colour = to_hex(1 - (1 - np.array(to_rgb(colour))) * 0.5)
        if name not in (*NOT_TECHNIQUES, *techniques(), "outside"):  # a variant
            marker = VARIANTS[zlib.crc32(name.encode()) % len(VARIANTS)]
    return label, colour, marker


def label_of(arm: str) -> str:
    """How figures and tables name an arm; what is neither known nor a technique is a variant."""
    first = arm.split("+")[0]
    return arm_style(arm)[0] if first in NOT_TECHNIQUES or first in techniques() else arm


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms in one order for all figures: real images, then techniques by name."""
    places = {arm: place for place, arm in enumerate((*REAL_ARMS, *techniques()))}
    return sorted(set(arms), key=lambda arm: (places[arm.split("+")[0]], arm))


def set_style() -> None:
    """The study's look: call once per notebook."""
    pd.set_option("display.max_colwidth", None)  # claims are sentences
    sns.set_theme(context="notebook", style="ticks", font_scale=0.9)
    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "savefig.dpi": 160,
            "pdf.fonttype": 42,
        }
    )


def save(figure: Figure, profile: str, name: str, data: pd.DataFrame | None = None) -> None:
    """Write a figure as .png and .pdf, and the numbers behind it, if there are any, as .csv."""
    target = figures_folder(profile)
    target.mkdir(parents=True, exist_ok=True)
    png = partial(figure.savefig, format="png")
    pdf = partial(figure.savefig, format="pdf", metadata={"CreationDate": None})
    for suffix, write in (("png", png), ("pdf", pdf)):
        write_atomically(target / f"{name}.{suffix}", write)
        WRITTEN.append(str(target / f"{name}.{suffix}"))
    if data is not None:
        save_table(profile, name, data)


def save_table(profile: str, name: str, data: pd.DataFrame) -> None:
    """Write the numbers of a table as .csv, with the profile's treatment in a first column."""
    if treatment := load_settings(profile).treatment:
        data = data.assign(treatment=treatment)[["treatment", *data.columns]]
    target = figures_folder(profile)
    target.mkdir(parents=True, exist_ok=True)
    write = partial(data.to_csv, index=False, float_format="%.6g", lineterminator="\n")
    write_atomically(target / f"{name}.csv", write)
    WRITTEN.append(str(target / f"{name}.csv"))


def curves(
    axes: Axes,
    data: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
    logarithmic: bool = True,
) -> None:
    """A line per arm, with intervals where there are columns for them.

    Points of one x are set a little apart, so that their intervals can be told from each other.
    Rows without a value are left out.
    """
    data = data.dropna(subset=y)
    names = in_order(data["arm"])
    for position, name in enumerate(names):
        label, colour, marker = arm_style(name)
        rows = data[data["arm"] == name].sort_values(x)
        offset = position - (len(names) - 1) / 2
        places = rows[x] * (1 + 0.025 * offset) if logarithmic else rows[x] + 0.06 * offset
        axes.plot(places, rows[y], color=colour, marker=marker, markersize=5, label=label, lw=1.4)
        if low and high:
            axes.vlines(places, rows[low], rows[high], color=colour, lw=1.2, alpha=0.7)
    if logarithmic:
        axes.set_xscale("log")
    _ticks(axes, data[x])


def _ticks(axes: Axes, values: pd.Series) -> None:
    """A tick, with its number, at each of the values of x, if there are any."""
    if len(values):
        ticks = sorted(set(values))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def reference(axes: Axes, row: pd.Series, label: str, value: str = "score") -> None:
    """A horizontal line with its interval, if there is one, to compare curves with."""
    drawn = [line for line in axes.lines if line.get_gid() == "reference"]
    style = ("-", "--", ":", "-.")[len(drawn) % 4]
    axes.axhline(row[value], ls=style, color="black", lw=1.3, label=label, gid="reference")
    if f"{value}_low" in row:
        axes.axhspan(row[f"{value}_low"], row[f"{value}_high"], color="black", alpha=0.08, lw=0)


def amounts(
    published: pd.DataFrame,
    reproduced: pd.DataFrame,
    real_percents: Sequence[float],
    reference_percents: Sequence[float] | None = None,
    score: str = "test accuracy",
) -> Figure:
    """Score against the number of synthetic images: the thesis's and, below or beside it, ours.

    A column per real percentage. Horizontal lines are baselines: at the column's own real
    percentage, or at others. Where the thesis has no values, ours stand alone.
    """
    tables = {"Published (thesis)": published, "Reproduced": reproduced}
    tables = {name: table for name, table in tables.items() if len(table)}
    columns = len(real_percents)
    shape = (len(tables), columns) if columns > 1 else (1, len(tables))
    figure, axes = plt.subplots(
        *shape,
        figsize=(1.6 + 4.2 * shape[1], 0.6 + 3.3 * shape[0]),
        layout="constrained",
        squeeze=False,
    )
    panels = iter(axes.flat)
    for name, table in tables.items():
        for percent in real_percents:
            panel = next(panels)
            made = table[(table["real_percent"] == percent) & (table["synthetic_per_class"] > 0)]
            low_high = ("score_low", "score_high") if "score_low" in table else ()
            curves(panel, made, "synthetic_per_class", "score", *low_high)
            for wanted in reference_percents or [percent]:
                real = table[(table["arm"] == "baseline") & (table["real_percent"] == wanted)]
                label = f"{wanted:g} % real images only" if reference_percents else "Baseline"
                for _, row in real.iterrows():
                    reference(panel, row, label)
            title = f"{name}, {percent:g} % real" if percent else f"{name}, no real images"
            panel.set(title=title, xlabel="synthetic images per class")
    for panel in axes[:, 0]:
        panel.set_ylabel(score)
    handles = axes.flat[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
    return figure


def dots(
    axes: Axes,
    table: pd.DataFrame,
    order: Sequence[str],
    by: str = "arm",
    value: str = "gain_points",
    offset: float = 0.0,
    **style: Any,
) -> None:
    """A point with its interval per row of a table, from above in the order of a column's values.

    Columns ``<value>_low`` and ``<value>_high`` hold the intervals. What ``offset`` moves down
    stands beside what does not.
    """
    for place, name in enumerate(order):
        _, colour, marker = arm_style(name)
        for _, row in table[table[by] == name].iterrows():
            own = {"color": colour, "marker": marker} | style
            height = place + offset
            axes.plot(row[value], height, ls="", markersize=6, **own)
            ends = (row[f"{value}_low"], row[f"{value}_high"])
            axes.hlines(height, *ends, color=own["color"], lw=1.3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(order)), [label_of(name) for name in order])
    axes.set_ylim(len(order) - 0.5, -0.5)


def update_curves(axes: Axes, curve: pd.DataFrame) -> None:
    """Accuracy against updates: a thin line per draw, a thick one for their mean.

    Solid lines are for the lowest learning rate, dashed ones for the next.
    """
    rates = sorted(set(curve["learning_rate"]))
    for (arm, rate), rows in curve.groupby(["arm", "learning_rate"], sort=False):
        label, colour, _ = arm_style(str(arm))
        style = ("-", "--", ":")[rates.index(rate)]
        for _, draw in rows.groupby("draw"):
            axes.plot(draw["step"], draw["test_accuracy"], style, color=colour, lw=0.6, alpha=0.5)
        mean = rows.groupby("step")["test_accuracy"].mean()
        axes.plot(mean.index, mean, style, color=colour, lw=2, label=f"{label}, rate {rate:g}")
    axes.set_xscale("log")
    _ticks(axes, curve["step"])
    axes.legend()


def as_text(table: pd.DataFrame, kind: str) -> pd.DataFrame:
    """A table as text, in the columns and formats that ``tables/columns.yaml`` gives its kind.

    A missing value is a dash.
    """
    layout = yaml.safe_load((TABLES / "columns.yaml").read_text())[kind]
    shown = {}
    for header, (source, form) in layout["columns"].items():
        write = label_of if form == "label" else int if form == "count" else form.format
        if source.endswith("*"):
            low, high = (
                table[source[:-1] + end].map(write).astype(object) for end in ("low", "high")
            )
            shown[header] = "[" + low + ", " + high + "]"
        else:
            shown[header] = table[source].map(write)
    empty = {"nan": "–", "+nan": "–", "[nan, nan]": "–", "[+nan, +nan]": "–"}
    return pd.DataFrame(shown).replace(empty).set_index(layout["index"])


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """Published beside reproduced: absolute points with interval, then relative."""
    places = {arm: place for place, arm in enumerate(in_order(table["arm"]))}
    rows = table.sort_values("arm", key=lambda arms: arms.map(places), kind="stable")
    rows = rows.sort_values("real_percent", ascending=False, kind="stable")
    no_gain = (rows["arm"] == "baseline") | rows["gain_points"].isna()
    shown = as_text(rows, "side by side")
    gains = [name for name in map(str, shown) if name.startswith(("gain", "relative", "95 % "))]
    shown.loc[no_gain.to_numpy(), gains] = "–"
    return shown


def to_decide(judged: pd.DataFrame) -> list[str]:
    """What would decide each comparison: a difference, or a number of draws; "" if decided.

    The distance from its bound that would have been shown with 80 % power, and how many draws (or
    subjects) would show, with the same power, the distance that was found; more test images, if no
    number of draws would.
    """
    found = []
    for row in judged[["id", "detectable", "draws_needed"]].to_dict("records"):
        unit = repeats_of(notebook_of(row["id"]))
        number = row["draws_needed"]
        more = "more test images" if np.isinf(number) else f"{number:.0f} {unit}"
        missing = f"{100 * row['detectable']:.1f} points, {more}"
        found.append("" if np.isnan(row["detectable"]) else missing)
    return found


def verdicts(judged: pd.DataFrame) -> pd.DataFrame:
    """The claims and what became of them; differences in absolute points.

    ``n`` is the number of runs per setting in so many draws (or subjects), and of test images.
    Beside an open claim stands what would decide it (:func:`to_decide`). What is
    shown beside a claim's primary comparison follows it with a dot, its verdict in brackets.
    """
    points = judged.assign(**{x: 100 * judged[x] for x in ("difference", "low", "high")})
    secondary = ~judged["primary"]
    points["comparison"] = judged["comparison"].mask(secondary, "· " + judged["comparison"])
    in_brackets = "(" + judged["comparison_verdict"] + ")"
    points["verdict"] = judged["verdict"].mask(secondary, in_brackets)
    counts = [
        f"{runs} in {draws}" + (f" × {images} images" if images > 1 else "") if runs else "–"
        for runs, draws, images in judged[["num_runs", "num_draws", "num_test_images"]].to_numpy()
    ]
    missing = pd.Series(to_decide(judged), judged.index).mask(secondary, "")
    return as_text(points.assign(n=counts, to_decide=missing), "verdicts")


def show(figure: Figure, num_colours: int = 64) -> None:
    """Display a figure in a notebook, in few colours: notebooks stay small enough to commit."""
    alt = described(figure)
    display(DisplayedImage(png_of(figure, num_colours), alt=alt))


def png_of(figure: Figure, num_colours: int) -> bytes:
    """A figure as a PNG file, in few colours; it is closed."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=figure.dpi)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(num_colours).save(small, "PNG", optimize=True)
    return small.getvalue()


def described(figure: Figure) -> str:
    """What a figure shows, for those who do not see it: panels, axes, rows or series."""
    parts, series = [], dict[str, None]()
    for axes in figure.axes:
        rows = [label.get_text() for label in axes.get_yticklabels()]
        if axes.images:
            columns = [label.get_text() for label in axes.get_xticklabels()]
            parts.append(f"images in rows ({', '.join(rows)}), columns: {', '.join(columns)}")
            continue
        pair = [text for text in (axes.get_ylabel(), axes.get_xlabel()) if text]
        parts.append(": ".join(filter(None, [axes.get_title(), " against ".join(pair)])))
        labels = axes.get_legend_handles_labels()[1]
        series |= dict.fromkeys(labels or rows)
    shown = "; ".join(filter(None, dict.fromkeys(parts)))
    named = [name for name in series if name and not name.lstrip("−-").replace(".", "").isdigit()]
    return f"{shown}. Shown: {', '.join(named)}." if named else f"{shown}."


def sheet(rows: Mapping[str, Sequence[Sequence[np.ndarray]]], titles: Sequence[str]) -> Figure:
    """A sheet of images, a labelled row each, in titled groups side by side.

    Args:
        rows: label to groups of 8-bit RGB arrays, made square; all rows have as many groups.
        titles: one per group.
    """
    heights = [image.shape[0] for row in rows.values() for group in row for image in group]
    side = min([*heights, LARGEST])
    groups = [mosaic(group, gap=1, side=side) for group in zip(*rows.values(), strict=True)]
    between = np.full((groups[0].shape[0], side // 4, 3), 255, np.uint8)
    starts = np.cumsum([0, *(group.shape[1] + side // 4 for group in groups)])
    whole = np.hstack([part for group in groups for part in (group, between)])
    inches = 0.62 / side
    last = groups[-1].shape[1] * inches
    longest = max(map(len, rows))
    margin = 0.3 + 0.09 * longest + 0.03 * max(0, longest - 12)
    names = max(1.2, margin, 0.2 + 0.09 * len(titles[-1]) - last)
    figure, axes = plt.subplots(
        figsize=(whole.shape[1] * inches + names, whole.shape[0] * inches + 0.3),
        dpi=64,  # on screen; files are finer
        layout="constrained",
    )
    axes.imshow(whole, interpolation="nearest")
    axes.set_xticks(starts[:-1], titles, ha="left")
    axes.set_yticks(side / 2 + (side + 1) * np.arange(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def mosaic(rows: Iterable[Sequence[np.ndarray]], gap: int, side: int | None = None) -> np.ndarray:
    """Rows of 8-bit RGB images as one, all squares of one side, on white.

    By default the side is the first one's height, at most 128: a sheet may have many rows.
    """
    lines = [list(row) for row in rows]
    side, columns = side or min(lines[0][0].shape[0], LARGEST), max(map(len, lines))
    whole = np.full((len(lines) * (side + gap), columns * (side + gap), 3), 255, np.uint8)
    for top, line in zip(range(0, len(whole), side + gap), lines, strict=True):
        for left, image in zip(range(0, whole.shape[1], side + gap), line, strict=False):
            square = Image.fromarray(image).resize((side, side))
            whole[top : top + side, left : left + side] = np.asarray(square)
    return whole


def trimap_picture(trimap: np.ndarray) -> np.ndarray:
    """A trimap in the thesis's colours: purple subject, green background, yellow border."""
    colours = np.array([(0, 0, 0), (88, 40, 130), (60, 150, 90), (250, 220, 60)], np.uint8)
    return colours[trimap]


def save_sheet(rows: Mapping[str, Sequence[np.ndarray]], path: Path, scale: int = 2) -> None:
    """Write a sheet of equally large images as a plain mosaic, each enlarged ``scale`` times."""
    picture = Image.fromarray(mosaic(rows.values(), gap=2)[:-2, :-2])
    size = (picture.width * scale, picture.height * scale)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)
