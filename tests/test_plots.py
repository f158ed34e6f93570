"""Figures: they draw what they are given, return their axes, and change nothing global."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from slimlib import plots
from slimlib.scales import ASSETS


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def test_everything_draws_with_the_style(image: Image.Image) -> None:
    with plt.style.context(ASSETS / "slim.mplstyle"):
        before = dict(mpl.rcParams)
        figure, axes = plt.subplots(2, 4)
        returned = plots.image_row(axes[0], image, np.ones((8, 12)), image)
        assert [ax.get_title(loc="left") for ax in returned] == ["original", "region of interest", "decoded", "error"]
        assert axes[0, 3].images[0].get_array().max() == 0
        ax = axes[1]
        assert plots.show_map(ax[0], image, np.random.rand(2, 3)) is ax[0]
        assert plots.byte_bars(ax[1], {"q = 0": {"header": 56.0, "latent": 160.0, "rounding": -3.0}}) is ax[1]
        assert ax[1].texts[0].get_text() == " 27"
        assert plots.top5_bars(ax[2], [("fox", 0.7), ("lion", 0.2)], truth="fox") is ax[2]
        curve = ([0.2, 0.1], [0.8, 0.6], "JPEG", ([0.7, 0.5], [0.9, 0.7]))
        assert plots.rate_curve(ax[3], *curve) is ax[3]
        assert ax[3].lines[0].get_linestyle() == "--"
        assert ax[3].lines[0].get_xdata().tolist() == [0.1, 0.2]
        dots = {"SLIM": (50.0, 40.0, 60.0), "no caption": (45.0, 36.0, 55.0)}
        assert plots.interval_dots(axes[0, 0], dots, "Top-1 accuracy [%]", "SLIM") is axes[0, 0]
        assert [text.get_text() for text in axes[0, 0].get_yticklabels()] == list(dots)
        assert axes[0, 0].get_ylim()[0] > axes[0, 0].get_ylim()[1], "the first is on top"
        assert plots.log_rate(ax[3]) is ax[3]
        assert [tick.get_text() for tick in ax[3].get_xticklabels()] in (["0.1"], [])  # 0.3 is beyond the curve
        figure.canvas.draw()
        assert dict(mpl.rcParams) == before
        plt.close(figure)


def test_every_method_has_a_colour_of_its_own() -> None:
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
    assert set(plots.COLOURS) >= plots.CLASSIC
    with pytest.raises(KeyError):
        plots.rate_curve(plt.figure().add_subplot(), [1], [1], "unheard of")
    plt.close("all")
