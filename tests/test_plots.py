"""Figures: they draw what they are given, return their axes, and change nothing global. Tables and Markdown."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from slimlib.measure import plots
from slimlib.scales import ASSETS


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def test_everything_draws_with_the_style(image: Image.Image) -> None:
    with plt.style.context(ASSETS / "slim.mplstyle"):
        before = dict(mpl.rcParams)
        figure, axes = plt.subplots(2, 4)
        returned = plots.image_row(axes[0], image, np.ones((8, 12)), Image.new("RGB", image.size))
        assert [ax.get_title(loc="left") for ax in returned] == ["original", "region of interest", "decoded", "error"]
        shown = [ax.images[-1].get_array() for ax in returned]
        assert [array.shape[:2] for array in shown] == [(32, 48), (8, 12), (32, 48), (32, 48)]
        assert np.array_equal(shown[0], np.asarray(image)) and shown[1].min() == 1 and not shown[2].any()
        grey = np.asarray(image).mean(2) / 255  # under the map; all of it is error
        assert np.allclose(returned[1].images[0].get_array(), grey)
        assert np.allclose(shown[3] / 255, np.minimum(grey / 0.25, 1)[..., None], atol=0.5 / 255)
        ax = axes[1]
        assert plots.show_map(ax[0], image, np.random.rand(2, 3)) is ax[0]
        bars = {"q = 0": {"header": 56.0, "latent": 160.0, "rounding": -3.0}, "q = 1": {"header": 56, "caption": 80}}
        assert plots.byte_bars(ax[1], bars) is ax[1]
        assert [text.get_text() for text in ax[1].texts] == [" 27", " 17"] and ax[1].yaxis_inverted()
        widths = {c.get_label(): [bar.get_width() for bar in c] for c in ax[1].containers}
        assert widths == {"header": [7, 7], "latent": [20, 0], "rounding": [0, 0], "caption": [0, 10]}
        assert ax[1].containers[0][0].get_facecolor() == mpl.colors.to_rgba(plots.PART_COLOURS["header"])
        assert plots.top5_bars(ax[2], [("fox", 0.7), ("lion", 0.2)], truth="lion") is ax[2]
        assert [round(bar.get_width()) for bar in ax[2].patches] == [70, 20] and ax[2].yaxis_inverted()
        assert ax[2].patches[1].get_facecolor() == mpl.colors.to_rgba(plots.COLOURS["SLIM"])
        curve = ([0.2, 0.1], [0.8, 0.6], "JPEG", ([0.7, 0.5], [0.9, 0.7]))
        assert plots.rate_curve(ax[3], *curve) is ax[3]
        (line,) = ax[3].lines
        assert line.get_linestyle() == "--" and line.get_xydata() == pytest.approx(np.array([[0.1, 60], [0.2, 80]]))
        assert ax[3].collections[0].get_datalim(ax[3].transData).extents == pytest.approx([0.1, 50, 0.2, 90])
        assert plots.log_rate(ax[3]) is ax[3]
        figure.canvas.draw()
        ax[3].set_xlim(0.02, 2)
        ticks = [tick.get_text() for tick in ax[3].get_xticklabels() if 0.02 < tick.get_position()[0] < 2]
        assert ticks == ["0.03", "0.1", "0.3", "1"]
        assert dict(mpl.rcParams) == before
        plt.close(figure)


def test_a_hole_in_a_curve_does_not_hide_the_rest() -> None:
    ax = plt.figure().add_subplot()
    holes = (
        [0.1, np.nan, 0.2, 0.3],
        [np.nan, 0.5, 0.6, 0.8],
        "JPEG",
        ([np.nan] * 2 + [0.5, 0.7], [np.nan] * 2 + [0.7, 0.9]),
    )
    plots.rate_curve(ax, *holes)
    ax.figure.canvas.draw()
    assert ax.dataLim.extents == pytest.approx([0.2, 50, 0.3, 90]) and ax.lines[0].get_marker() == "o"
    plt.close("all")


def test_every_method_has_a_colour_of_its_own() -> None:
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
    assert set(plots.COLOURS) >= plots.DASHED
    with pytest.raises(KeyError):
        plots.rate_curve(plt.figure().add_subplot(), [1], [1], "unheard of")
    plt.close("all")


def test_what_notebooks_show(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict] = []
    monkeypatch.setattr(plots, "display", lambda data, raw: shown.append(data))
    plots.say("**42** bytes")
    plots.table(["a", ""], [[1, "x"], [2.5, "y"]])
    plots.show_photographs(plt.figure())
    lines = "| a |  |\n| --- | --- |\n| 1 | x |\n| 2.5 | y |"
    assert [data.get("text/markdown") for data in shown[:2]] == ["**42** bytes", lines]
    assert shown[2]["image/jpeg"][:2] == b"\xff\xd8" and not plt.get_fignums()
