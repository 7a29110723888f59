"""Figures and tables in one style: curves, intervals, sheets of images, verdicts."""

import io
import itertools
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
from sdaug_utils.evidence.records import write_result
from sdaug_utils.params import load_settings
from sdaug_utils.registry import repeats_of, techniques
from sdaug_utils.study import figures_folder

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

    An arm is ``baseline``, an augmentation or a technique; each part after a ``+`` makes it paler.
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
    """How figures and tables name an arm; an unknown name is a variant's, and its own label."""
    first = arm.split("+")[0]
    return arm_style(arm)[0] if first in NOT_TECHNIQUES or first in techniques() else arm


def in_order(arms: Iterable[str]) -> list[str]:
    """Arms in one order for all figures: real images, then techniques by name."""
    order = [*REAL_ARMS, *techniques()]
    return sorted(set(arms), key=lambda arm: (order.index(arm.split("+")[0]), arm))


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
    pdf = partial(figure.savefig, format="pdf", metadata={"CreationDate": None})
    folder = figures_folder(profile)
    write_result(folder / f"{name}.png", partial(figure.savefig, format="png"))
    write_result(folder / f"{name}.pdf", pdf)
    if data is not None:
        save_table(profile, name, data)


def save_table(profile: str, name: str, data: pd.DataFrame) -> None:
    """Write the numbers of a table as .csv, with the profile's treatment in a first column."""
    if treatment := load_settings(profile).treatment:
        data = data.assign(treatment=treatment)[["treatment", *data.columns]]
    write = partial(data.to_csv, index=False, float_format="%.6g", lineterminator="\n")
    write_result(figures_folder(profile) / f"{name}.csv", write)


def curves(
    axes: Axes,
    data: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
    logarithmic: bool = True,
) -> None:
    """A line per arm, with intervals from the columns ``low`` and ``high`` if they are given.

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


def amounts(
    published: pd.DataFrame,
    reproduced: pd.DataFrame,
    real_percents: Sequence[float],
    reference_percents: Sequence[float] | None = None,
    score: str = "test accuracy",
) -> Figure:
    """Score against the number of synthetic images: the thesis's and, below or beside it, ours.

    A column per real percentage. Horizontal lines are baselines: at the column's own real
    percentage, or at ``reference_percents``. Without published values, ours stand alone.
    """
    tables = {"Published (thesis)": published, "Reproduced": reproduced}
    tables = {name: table for name, table in tables.items() if len(table)}
    columns = len(real_percents)
    shape = (len(tables), columns) if columns > 1 else (1, len(tables))
    size = (1.6 + 4.2 * shape[1], 0.6 + 3.3 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    shown = itertools.product(tables.items(), real_percents)
    for panel, ((name, table), percent) in zip(axes.flat, shown, strict=True):
        made = table[(table["real_percent"] == percent) & (table["synthetic_per_class"] > 0)]
        ends = ("score_low", "score_high") if "score_low" in table else ()
        curves(panel, made, "synthetic_per_class", "score", *ends)
        baselines = table[table["arm"] == "baseline"]
        references = [
            row
            for wanted in reference_percents or [percent]
            for row in baselines[baselines["real_percent"] == wanted].to_dict("records")
        ]
        styles = itertools.cycle(("-", "--", ":", "-."))
        for row, style in zip(references, styles, strict=False):
            own = (
                f"{row['real_percent']:g} % real images only" if reference_percents else "Baseline"
            )
            panel.axhline(row["score"], ls=style, color="black", lw=1.3, label=own)
            if ends:
                panel.axhspan(*(row[end] for end in ends), color="black", alpha=0.08, lw=0)
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
    offset: float = 0.0,
    **style: Any,
) -> None:
    """A gain with its interval per row of a table; the values of column ``by`` from top to bottom.

    ``offset`` moves the points down, to draw several tables in one panel.
    """
    for place, name in enumerate(order):
        _, colour, marker = arm_style(name)
        own = {"color": colour, "marker": marker} | style
        for _, row in table[table[by] == name].iterrows():
            axes.plot(row["gain_points"], place + offset, ls="", markersize=6, **own)
            ends = (row["gain_points_low"], row["gain_points_high"])
            axes.hlines(place + offset, *ends, color=own["color"], lw=1.3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(order)), [label_of(name) for name in order])
    axes.set_ylim(len(order) - 0.5, -0.5)


def update_curves(axes: Axes, curve: pd.DataFrame) -> None:
    """Accuracy against updates: thin lines for draws, thick for means, dashed for higher rates."""
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
    shown: dict[str, Any] = {}
    for header, (source, form) in layout["columns"].items():
        write = {"label": label_of, "count": int}.get(form, form.format)
        if source.endswith("*"):
            low, high = (table[source[:-1] + end].map(write) for end in ("low", "high"))
            shown[header] = [f"[{ends[0]}, {ends[1]}]" for ends in zip(low, high, strict=True)]
        else:
            shown[header] = table[source].map(write)
    empty = {"nan": "–", "+nan": "–", "[nan, nan]": "–", "[+nan, +nan]": "–"}
    return pd.DataFrame(shown).replace(empty).set_index(layout["index"])


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """Published beside reproduced: absolute points with interval, then relative."""
    place = table["arm"].map(in_order(table["arm"]).index)
    order = ["real_percent", "place"]
    rows = table.assign(place=place).sort_values(order, ascending=[False, True])
    no_gain = (rows["arm"] == "baseline") | rows["gain_points"].isna()
    shown = as_text(rows, "side by side")
    gains = [name for name in map(str, shown) if name.startswith(("gain", "relative", "95 % "))]
    shown.loc[no_gain.to_numpy(), gains] = "–"
    return shown


def verdicts(judged: pd.DataFrame) -> pd.DataFrame:
    """The claims and what became of them; differences in absolute points.

    ``n`` is the number of runs per setting in so many draws (or subjects), and of test images. Of
    an open comparison the last column is the distance from its bound that would have been found.
    Comparisons that do not decide a claim follow it with a dot, their verdicts in brackets.
    """
    points = judged.assign(**{x: 100 * judged[x] for x in ("difference", "low", "high")})
    secondary = ~judged["primary"]
    points["comparison"] = judged["comparison"].mask(secondary, "· " + judged["comparison"])
    in_brackets = "(" + judged["comparison_verdict"] + ")"
    points["verdict"] = judged["verdict"].mask(secondary, in_brackets)
    points["detectable"] = (100 * judged["detectable"]).mask(secondary)
    columns = ["id", "num_runs", "num_draws", "num_test_images"]
    points["n"] = [
        f"{runs} in {draws} {repeats_of(notebook_of(claim))}" + f" × {images} images" * (images > 1)
        for claim, runs, draws, images in judged[columns].to_numpy()
    ]
    points["n"] = points["n"].where(judged["num_runs"] > 0, "–")
    return as_text(points, "verdicts")


def show(figure: Figure, num_colours: int = 64) -> None:
    """Display a figure in a notebook, in few colours: notebooks stay small enough to commit."""
    alt = described(figure)
    display(DisplayedImage(png_of(figure, num_colours), alt=alt))


def png_of(figure: Figure, num_colours: int) -> bytes:
    """A figure as a PNG file, in few colours; the figure is closed."""
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
        pair = " against ".join(filter(None, [axes.get_ylabel(), axes.get_xlabel()]))
        parts.append(": ".join(filter(None, [axes.get_title(), pair])))
        series |= dict.fromkeys(axes.get_legend_handles_labels()[1] or rows)
    shown = "; ".join(filter(None, dict.fromkeys(parts)))
    named = [name for name in series if name and not name.lstrip("−-").replace(".", "").isdigit()]
    return f"{shown}. Shown: {', '.join(named)}." if named else f"{shown}."


def sheet(rows: Mapping[str, Sequence[Sequence[np.ndarray]]], titles: Sequence[str]) -> Figure:
    """A sheet of 8-bit RGB images, made square: a labelled row each, in groups with titles."""
    heights = [image.shape[0] for row in rows.values() for group in row for image in group]
    side = min([*heights, LARGEST])
    groups = [mosaic(group, gap=1, side=side) for group in zip(*rows.values(), strict=True)]
    between = np.full((groups[0].shape[0], side // 4, 3), 255, np.uint8)
    starts = np.cumsum([0, *(group.shape[1] + side // 4 for group in groups)])
    whole = np.hstack([part for group in groups for part in (group, between)])
    inches = 0.62 / side
    longest = max(map(len, rows))
    margin = 0.3 + 0.09 * longest + 0.03 * max(0, longest - 12)
    beyond = 0.2 + 0.09 * len(titles[-1]) - groups[-1].shape[1] * inches  # of the last title
    width = whole.shape[1] * inches + max(1.2, margin, beyond)
    size = (width, whole.shape[0] * inches + 0.3)
    figure, axes = plt.subplots(figsize=size, dpi=64, layout="constrained")  # files are finer
    axes.imshow(whole, interpolation="nearest")
    axes.set_xticks(starts[:-1], titles, ha="left")
    axes.set_yticks(side / 2 + (side + 1) * np.arange(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def mosaic(rows: Sequence[Sequence[np.ndarray]], gap: int, side: int) -> np.ndarray:
    """Rows of 8-bit RGB images as one image on white, all squares of one side in pixels."""
    step, columns = side + gap, max(map(len, rows))
    whole = np.full((len(rows) * step, columns * step, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            square = np.asarray(Image.fromarray(image).resize((side, side)))
            whole[top * step :, left * step :][:side, :side] = square
    return whole


def trimap_picture(trimap: np.ndarray) -> np.ndarray:
    """A trimap in the thesis's colours: purple subject, green background, yellow border."""
    colours = np.array([(0, 0, 0), (88, 40, 130), (60, 150, 90), (250, 220, 60)], np.uint8)
    return colours[trimap]


def save_sheet(rows: Mapping[str, Sequence[np.ndarray]], path: Path, scale: int = 2) -> None:
    """Write a sheet of equally large images as a plain mosaic, enlarged ``scale`` times."""
    lines = list(rows.values())
    picture = mosaic(lines, gap=2, side=min(lines[0][0].shape[0], LARGEST))[:-2, :-2]
    enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(enlarged).save(path, optimize=True)
