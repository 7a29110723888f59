"""One style for every figure; sample sheets; curves; published beside reproduced."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image as DisplayedImage
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DEFAULT_FOLDER = Path(__file__).parents[1] / "figures"
ARMS = {
    "baseline": ("Baseline", "black", "o"),
    "custom": ("Custom", "#8c8c8c", "s"),
    "autoaugment": ("AutoAugment", "#a1795a", "D"),
    "randaugment": ("RandAugment", "#c7a42e", "^"),
    "dreambooth": ("DreamBooth", "#c44e52", "v"),
    "textual-inversion": ("Textual inversion", "#3a6fb0", "P"),
    "stable-diffusion-prompt": ("Stable Diffusion prompt", "#3f9b57", "X"),
}
"""Label, colour and marker of each arm, the same in every figure."""


def folder(profile: str) -> Path:
    """Where a profile's figures go; the environment's ``SDAUG_FIGURES`` moves them elsewhere."""
    return Path(os.environ.get("SDAUG_FIGURES") or DEFAULT_FOLDER) / profile


def set_style() -> None:
    """The study's look: call once per notebook."""
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
    target = folder(profile)
    target.mkdir(parents=True, exist_ok=True)
    figure.savefig(target / f"{name}.png")
    figure.savefig(target / f"{name}.pdf", metadata={"CreationDate": None})
    if data is not None:
        save_table(profile, name, data)


def save_table(profile: str, name: str, data: pd.DataFrame) -> None:
    """Write the numbers of a table as .csv."""
    target = folder(profile)
    target.mkdir(parents=True, exist_ok=True)
    data.to_csv(target / f"{name}.csv", index=False, float_format="%.4f", lineterminator="\n")


def curves(
    axes: Axes,
    data: pd.DataFrame,
    x: str,
    y: str,
    low: str | None = None,
    high: str | None = None,
) -> None:
    """A line per arm over a logarithmic x axis, with intervals where there are columns for them.

    Points of one x are set a little apart, so that their intervals can be told from each other.
    """
    names = [name for name in ARMS if name in set(data["arm"])]
    for position, name in enumerate(names):
        label, colour, marker = ARMS[name]
        rows = data[data["arm"] == name].sort_values(x)
        shift = 1 + 0.025 * (position - (len(names) - 1) / 2)
        axes.plot(
            rows[x] * shift, rows[y], color=colour, marker=marker, markersize=5, label=label, lw=1.4
        )
        if low and high:
            axes.vlines(rows[x] * shift, rows[low], rows[high], color=colour, lw=1.2, alpha=0.7)
    ticks = sorted(set(data[x]))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def update_curves(axes: Axes, curve: pd.DataFrame) -> None:
    """Accuracy against updates: a thin line per draw, a thick one for their mean.

    Solid lines are for the lowest learning rate, dashed ones for the next.
    """
    rates = sorted(set(curve["learning_rate"]))
    for (arm, rate), rows in curve.groupby(["arm", "learning_rate"], sort=False):
        label, colour, _ = ARMS[str(arm)]
        style = ("-", "--", ":")[rates.index(rate)]
        for _, draw in rows.groupby("draw"):
            axes.plot(draw["step"], draw["test_accuracy"], style, color=colour, lw=0.6, alpha=0.5)
        mean = rows.groupby("step")["test_accuracy"].mean()
        axes.plot(mean.index, mean, style, color=colour, lw=2, label=f"{label}, rate {rate:g}")
    axes.set_xscale("log")
    axes.legend()


def side_by_side(table: pd.DataFrame) -> pd.DataFrame:
    """Published beside reproduced, as text: absolute points with interval, then relative."""
    order = {name: position for position, name in enumerate(ARMS)}
    rows = table.sort_values("arm", key=lambda arms: arms.map(order), kind="stable")
    rows = rows.sort_values("real_percent", ascending=False, kind="stable")
    is_baseline = rows["arm"] == "baseline"
    shown = pd.DataFrame(
        {
            "real %": rows["real_percent"].map("{:g}".format),
            "arm": rows["arm"].map(lambda name: ARMS[name][0]),
            "published": rows["published_accuracy"].map("{:.3f}".format),
            "gain (points)": rows["published_gain_points"].map("{:+.1f}".format),
            "relative (%)": rows["published_gain_relative"].map("{:+.1f}".format),
            "reproduced": rows["accuracy"].map("{:.3f}".format),
            "95 %": _interval(rows["accuracy_low"], rows["accuracy_high"], "{:.3f}"),
            "gain (points) ": rows["gain_points"].map("{:+.1f}".format),
            "95 % ": _interval(rows["gain_points_low"], rows["gain_points_high"], "{:+.1f}"),
            "relative (%) ": rows["gain_relative"].map("{:+.1f}".format),
        }
    )
    gains = [str(name) for name in shown if str(name).startswith(("gain", "relative", "95 % "))]
    shown.loc[is_baseline, gains] = "–"
    return shown.replace({"nan": "–", "+nan": "–"}).set_index(["real %", "arm"])


def protocols(table: pd.DataFrame) -> pd.DataFrame:
    """An arm's gain under both protocols, as text."""
    shown = pd.DataFrame(
        {
            "protocol": table["protocol"],
            "baseline: updates": table["baseline_updates"].map("{:.0f}".format),
            "accuracy": table["baseline_accuracy"].map("{:.3f}".format),
            "with synthetic images: updates": table["updates"].map("{:.0f}".format),
            "accuracy ": table["accuracy"].map("{:.3f}".format),
            "gain (points)": table["gain_points"].map("{:+.1f}".format),
            "95 %": _interval(table["gain_points_low"], table["gain_points_high"], "{:+.1f}"),
        }
    )
    return shown.replace("nan", "").set_index("protocol")


def verdicts(judged: pd.DataFrame) -> pd.DataFrame:
    """The claims and what became of them, as text; differences in absolute points."""
    shown = pd.DataFrame(
        {
            "id": judged["id"],
            "claim": judged["claim"],
            "comparison": judged["comparison"],
            "difference": (100 * judged["difference"]).map("{:+.1f}".format),
            "95 %": _interval(100 * judged["low"], 100 * judged["high"], "{:+.1f}"),
            "verdict": judged["verdict"],
        }
    )
    return shown.set_index(["id", "claim"])


def _interval(low: pd.Series, high: pd.Series, form: str) -> pd.Series:
    return "[" + low.map(form.format) + ", " + high.map(form.format) + "]"


def show(figure: Figure, num_colours: int = 64) -> None:
    """Display a figure in a notebook, in few colours: notebooks stay small enough to commit."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=figure.dpi)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(num_colours).save(small, "PNG", optimize=True)
    display(DisplayedImage(small.getvalue()))


def sheet(rows: Mapping[str, Sequence[Sequence[np.ndarray]]], titles: Sequence[str]) -> Figure:
    """A sheet of images, a labelled row each, in titled groups side by side.

    Args:
        rows: label to groups of 8-bit RGB arrays, made square; all rows have groups of the same
            sizes.
        titles: one per group.
    """
    side, gap = next(iter(rows.values()))[0][0].shape[0], 1
    sizes = [len(group) for group in next(iter(rows.values()))]
    starts = np.cumsum([0, *(size * (side + gap) + side // 4 for size in sizes)])
    mosaic = np.full((len(rows) * (side + gap), starts[-1], 3), 255, np.uint8)
    for line, groups in enumerate(rows.values()):
        top = line * (side + gap)
        for start, images in zip(starts, groups, strict=False):
            for column, image in enumerate(images):
                left = start + column * (side + gap)
                square = np.asarray(Image.fromarray(image).resize((side, side)))
                mosaic[top : top + side, left : left + side] = square
    inches = 0.62 / side
    figure, axes = plt.subplots(
        figsize=(mosaic.shape[1] * inches + 1.2, mosaic.shape[0] * inches + 0.3),
        dpi=64,  # on screen; files are finer
        layout="constrained",
    )
    axes.imshow(mosaic, interpolation="nearest")
    axes.set_xticks(starts[:-1], titles, ha="left")
    axes.set_yticks(side / 2 + (side + gap) * np.arange(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def save_sheet(rows: Mapping[str, Sequence[np.ndarray]], path: Path, scale: int = 2) -> None:
    """Write a sheet of equally large images as a plain mosaic, each enlarged ``scale`` times."""
    height, width = next(iter(rows.values()))[0].shape[:2]
    num_columns = max(len(images) for images in rows.values())
    gap = 2
    mosaic = np.full(
        (len(rows) * (height + gap) - gap, num_columns * (width + gap) - gap, 3), 255, np.uint8
    )
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            top, left = row * (height + gap), column * (width + gap)
            mosaic[top : top + height, left : left + width] = image
    picture = Image.fromarray(mosaic)
    size = (picture.width * scale, picture.height * scale)
    picture.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)
