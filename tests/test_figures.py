from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sdaug_utils.evidence import figures
from sdaug_utils.study import figures_folder

SHIPPED = Path(__file__).parents[1] / "figures" / "miniature"


def table():
    rows = [
        {
            "arm": arm,
            "real_percent": percent,
            "published": np.nan if arm == "custom" else 0.6,
            "published_gain_points": 1.0,
            "published_gain_relative": 2.0,
            "synthetic_per_class": 0,
            "score": 0.7,
            "score_low": 0.65,
            "score_high": 0.75,
            "gain_points": 3.0,
            "gain_points_low": -1.0,
            "gain_points_high": 7.0,
            "gain_relative": 4.0,
        }
        for arm in ("custom", "baseline")
        for percent in (5, 100)
    ]
    return pd.DataFrame(rows)


def test_a_figure_is_saved_three_times_with_its_numbers(tmp_path):
    figure, axes = plt.subplots()
    figures.curves(axes, table(), "real_percent", "score", "score_low", "score_high")
    assert [line.get_label() for line in axes.get_lines()] == ["Baseline", "Custom"]
    assert axes.get_xscale() == "log"
    figures.save(figure, "smoke", "fig", table())
    plt.close(figure)
    folder = figures_folder("smoke")
    assert folder.is_relative_to(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["fig.csv", "fig.pdf", "fig.png"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "fig.csv"), table(), check_dtype=False)


def test_published_and_reproduced_stand_side_by_side():
    shown = figures.side_by_side(table())
    assert shown.index.tolist() == [
        ("100", "Baseline", 0),
        ("100", "Custom", 0),
        ("5", "Baseline", 0),
        ("5", "Custom", 0),
    ]
    row = shown.loc[("5", "Custom", 0)]
    assert row["published"] == "–"
    assert row["reproduced"] == "0.700"
    assert row["95 %"] == "[0.650, 0.750]"
    assert row["95 % "] == "[-1.0, +7.0]"
    assert shown.loc[("5", "Baseline", 0), "gain (points)"] == "–"


def test_sheets_show_every_image(tmp_path):
    images = [np.full((8, 8, 3), level, np.uint8) for level in (0, 100, 200)]
    rows = {"first": [images[:1], images], "second": [images[:1], images]}
    figure = figures.sheet(rows, ["real", "made"])
    [axes] = figure.axes
    mosaic = np.asarray(axes.images[0].get_array())
    shown = [mosaic[12, column].tolist() for column in (4, 15, 24, 33)]
    assert shown == [[0] * 3, [0] * 3, [100] * 3, [200] * 3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["real", "made"]
    plt.close(figure)
    figures.save_sheet({"a": images, "b": images}, tmp_path / "sheet.png", scale=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 28, 3 * 18)


def test_amounts_have_a_panel_per_percentage_and_a_line_for_the_baseline():
    rows = [
        {"arm": arm, "real_percent": percent, "synthetic_per_class": count, "score": 0.5}
        for percent in (100, 5)
        for arm, count in (("baseline", 0), ("dreambooth", 5), ("dreambooth", 50))
    ]
    ours = pd.DataFrame(rows).assign(score_low=0.4, score_high=0.6)
    figure = figures.amounts(pd.DataFrame(rows), ours, [100, 5])
    assert [axes.get_title() for axes in figure.axes] == [
        "Published (thesis), 100 % real",
        "Published (thesis), 5 % real",
        "Reproduced, 100 % real",
        "Reproduced, 5 % real",
    ]
    for axes in figure.axes:
        assert {line.get_label() for line in axes.get_lines()} == {"DreamBooth", "Baseline"}
    plt.close(figure)
    alone = ours.assign(real_percent=ours["real_percent"].where(ours["arm"] == "baseline", 0))
    figure = figures.amounts(pd.DataFrame(rows), alone, [0], [100, 5])
    labels = {line.get_label() for line in figure.axes[1].get_lines()}
    assert labels == {"DreamBooth", "100 % real images only", "5 % real images only"}
    plt.close(figure)


def test_rows_of_a_sheet_may_differ_in_length():
    image = np.zeros((8, 8, 3), np.uint8)
    figure = figures.sheet({"short": [[image]], "long": [[image] * 3]}, ["inputs"])
    mosaic = np.asarray(figure.axes[0].images[0].get_array())
    assert mosaic[4, 14].tolist() == [255] * 3
    assert mosaic[14, 14].tolist() == [0] * 3
    plt.close(figure)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.png")), ids=lambda path: path.stem)
def test_nothing_of_a_shipped_figure_is_cut_off(path):
    grey = np.asarray(Image.open(path).convert("L"))
    border = np.concatenate([grey[:2].ravel(), grey[-2:].ravel(), grey[:, :2].ravel()])
    assert min(border.min(), grey[:, -2:].min()) > 250


def test_variants_have_labels_and_markers_of_their_own():
    arms = ["baseline", "baseline+slow", "randaugment+slow", "stable-diffusion-prompt+a {}"]
    labels = [figures.label_of(arm) for arm in arms]
    assert labels == [
        *("Baseline", "Baseline + slow", "RandAugment + slow", "Stable Diffusion prompt + a {}")
    ]
    outside = figures.arm_style("controlnet-canny+outside")
    assert outside[2] == figures.arm_style("controlnet-canny")[2]
    styles = {figures.arm_style(f"stable-diffusion-prompt+{name}")[2] for name in "abc"}
    assert len(styles) > 1
    assert figures.in_order(arms) == arms
