import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from sdaug_utils import figures


def table():
    rows = [
        {
            "arm": arm,
            "real_percent": percent,
            "published_accuracy": np.nan if arm == "custom" else 0.6,
            "published_gain_points": 1.0,
            "published_gain_relative": 2.0,
            "accuracy": 0.7,
            "accuracy_low": 0.65,
            "accuracy_high": 0.75,
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
    figures.curves(axes, table(), "real_percent", "accuracy", "accuracy_low", "accuracy_high")
    assert [line.get_label() for line in axes.get_lines()] == ["Baseline", "Custom"]
    assert axes.get_xscale() == "log"
    figures.save(figure, "smoke", "fig", table())
    plt.close(figure)
    folder = figures.folder("smoke")
    assert folder.is_relative_to(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["fig.csv", "fig.pdf", "fig.png"]
    pd.testing.assert_frame_equal(pd.read_csv(folder / "fig.csv"), table())


def test_published_and_reproduced_stand_side_by_side():
    shown = figures.side_by_side(table())
    assert shown.index.tolist() == [
        ("100", "Baseline"),
        ("100", "Custom"),
        ("5", "Baseline"),
        ("5", "Custom"),
    ]
    row = shown.loc[("5", "Custom")]
    assert row["published"] == "–"
    assert row["reproduced"] == "0.700"
    assert row["95 %"] == "[0.650, 0.750]"
    assert row["95 % "] == "[-1.0, +7.0]"
    assert shown.loc[("5", "Baseline"), "gain (points)"] == "–"


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
