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

from sdaug_utils.store import note

DEFAULT_FOLDER = Path(__file__).parents[1] / "figures"
ARMS = {
    "baseline": ("Baseline", "black", "o"),
    "custom": ("Custom", "#8c8c8c", "s"),
    "autoaugment": ("AutoAugment", "#a1795a", "D"),
    "randaugment": ("RandAugment", "#c7a42e", "^"),
    "dreambooth": ("DreamBooth", "#c44e52", "v"),
    "dreambooth-lora": ("DreamBooth by LoRA", "#e59a9c", "<"),
    "textual-inversion": ("Textual inversion", "#3a6fb0", "P"),
    "stable-diffusion-prompt": ("Stable Diffusion prompt", "#3f9b57", "X"),
    "controlnet-canny": ("ControlNet (Canny)", "#8a5aa8", "h"),
    "controlnet-canny+outside": ("ControlNet, controls from outside", "#c7a9d8", "h"),
    "controlnet-segmentation": ("ControlNet (segmentation)", "#8a5aa8", "h"),
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
    note({"file": f"{name}.png"})
    figure.savefig(target / f"{name}.pdf", metadata={"CreationDate": None})
    if data is not None:
        save_table(profile, name, data)


def save_table(profile: str, name: str, data: pd.DataFrame) -> None:
    """Write the numbers of a table as .csv."""
    target = folder(profile)
    target.mkdir(parents=True, exist_ok=True)
    data.to_csv(target / f"{name}.csv", index=False, float_format="%.4f", lineterminator="\n")
    note({"file": f"{name}.csv"})


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
    names = [name for name in ARMS if name in set(data["arm"])]
    for position, name in enumerate(names):
        label, colour, marker = ARMS[name]
        rows = data[data["arm"] == name].sort_values(x)
        offset = position - (len(names) - 1) / 2
        places = rows[x] * (1 + 0.025 * offset) if logarithmic else rows[x] + 0.06 * offset
        axes.plot(places, rows[y], color=colour, marker=marker, markersize=5, label=label, lw=1.4)
        if low and high:
            axes.vlines(places, rows[low], rows[high], color=colour, lw=1.2, alpha=0.7)
    ticks = sorted(set(data[x]))
    if logarithmic:
        axes.set_xscale("log")
    if not ticks:
        return
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def reference(axes: Axes, row: pd.Series, label: str, value: str = "score") -> None:
    """A horizontal line with its interval, if there is one, to compare curves with."""
    style = ("-", "--", ":")[sum(line.get_gid() == "reference" for line in axes.lines)]
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
    percentage, or at others.
    """
    columns = len(real_percents)
    shape = (2, columns) if columns > 1 else (1, 2)
    figure, axes = plt.subplots(
        *shape, figsize=(1.6 + 4.2 * shape[1], 0.6 + 3.3 * shape[0]), layout="constrained"
    )
    panels = iter(axes.flat)
    for name, table in {"Published (thesis)": published, "Reproduced": reproduced}.items():
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
    for panel in axes.flat[:: shape[1]]:
        panel.set_ylabel(score)
    handles = axes.flat[-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5)
    return figure


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
    no_gain = (rows["arm"] == "baseline") | rows["gain_points"].isna()
    shown = pd.DataFrame(
        {
            "real %": rows["real_percent"].map("{:g}".format),
            "arm": rows["arm"].map(lambda name: ARMS[name][0]),
            "synthetic per class": rows["synthetic_per_class"],
            "published": rows["published"].map("{:.3f}".format),
            "gain (points)": rows["published_gain_points"].map("{:+.1f}".format),
            "relative (%)": rows["published_gain_relative"].map("{:+.1f}".format),
            "reproduced": rows["score"].map("{:.3f}".format),
            "95 %": _interval(rows["score_low"], rows["score_high"], "{:.3f}"),
            "gain (points) ": rows["gain_points"].map("{:+.1f}".format),
            "95 % ": _interval(rows["gain_points_low"], rows["gain_points_high"], "{:+.1f}"),
            "relative (%) ": rows["gain_relative"].map("{:+.1f}".format),
        }
    )
    gains = [str(name) for name in shown if str(name).startswith(("gain", "relative", "95 % "))]
    shown.loc[no_gain, gains] = "–"
    return shown.replace({"nan": "–", "+nan": "–"}).set_index(
        ["real %", "arm", "synthetic per class"]
    )


def combinations(table: pd.DataFrame) -> pd.DataFrame:
    """Table 4.4 as text: the change that an augmentation brings, published and reproduced."""
    shown = pd.DataFrame(
        {
            "technique": table["technique"].map(lambda name: ARMS[name][0]),
            "real %": table["real_percent"].map("{:g}".format),
            "synthetic per class": table["synthetic_per_class"],
            "published (points)": table["published_points"].map("{:+.1f}".format),
            "relative (%)": table["published_relative"].map("{:+.1f}".format),
            "without": table["without"].map("{:.3f}".format),
            "with": table["with"].map("{:.3f}".format),
            "change (points)": table["points"].map("{:+.1f}".format),
            "95 %": _interval(table["points_low"], table["points_high"], "{:+.1f}"),
            "relative (%) ": table["relative"].map("{:+.1f}".format),
        }
    )
    return shown.replace({"nan": "–", "+nan": "–"}).set_index(
        ["technique", "real %", "synthetic per class"]
    )


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
    """The claims and what became of them, as text; differences in absolute points.

    ``n`` is the number of runs per setting in so many draws (or subjects), and of test images.
    """
    shown = pd.DataFrame(
        {
            "id": judged["id"],
            "claim": judged["claim"],
            "comparison": judged["comparison"],
            "difference": (100 * judged["difference"]).map("{:+.1f}".format),
            "95 %": _interval(100 * judged["low"], 100 * judged["high"], "{:+.1f}"),
            "n": _counts(judged),
            "verdict": judged["verdict"],
        }
    )
    return shown.replace({"+nan": "–", "[+nan, +nan]": "–"}).set_index(["id", "claim"])


def _counts(judged: pd.DataFrame) -> pd.Series:
    """Runs per setting over draws (or subjects), and test images where there are several."""
    runs, draws = (judged[key].map("{:.0f}".format) for key in ("num_runs", "num_draws"))
    images = judged["num_test_images"].map(lambda n: f" × {n:.0f} images" if n > 1 else "")
    return (runs + " in " + draws + images).where(judged["num_runs"] > 0, "–")


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
        rows: label to groups of 8-bit RGB arrays, made square; all rows have as many groups.
        titles: one per group.
    """
    side, gap = next(iter(rows.values()))[0][0].shape[0], 1
    sizes = [max(map(len, groups)) for groups in zip(*rows.values(), strict=True)]
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


def trimap_picture(trimap: np.ndarray) -> np.ndarray:
    """A trimap in the thesis's colours: purple subject, green background, yellow border."""
    colours = np.array([(0, 0, 0), (88, 40, 130), (60, 150, 90), (250, 220, 60)], np.uint8)
    return colours[trimap]


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
