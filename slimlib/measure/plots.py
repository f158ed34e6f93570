"""What the notebooks show: figures, photographs as JPEG, Markdown and tables made by code.

What draws does so into the axes it is given, and returns them. `plt.style.use(ASSETS / "slim.mplstyle")` sets the style
of a notebook. Each method has one colour everywhere; classic codecs are dashed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

COLOURS = {
    "SLIM": "#0072b2",
    "SLIM, stage 1": "#56b4e9",
    "SLIM, uniform weights": "#8c6bb1",
    "SLIM, feature matching": "#44aa99",
    "SLIM, joint": "#332288",
    "caption only": "#cc79a7",
    "caption read": "#882255",
    "label only": "#000000",
    "hyperprior": "#009e73",
    "hyperprior, machine loss": "#6a9c2d",
    "JPEG": "#d55e00",
    "WebP": "#e69f00",
    "AVIF": "#a6761d",
    "JPEG XL": "#c51b7d",
    "JPEG 2000": "#b2182b",
    "best classic, payload": "#7f3b08",
    "uncompressed": "#595959",
}
DASHED = {"JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000", "best classic, payload"}
PART_COLOURS = {"header": "#595959", "caption": "#cc79a7", "hyper": "#56b4e9", "latent": "#0072b2"}
PART_COLOURS |= {"rounding": "#c8c8c8"}
"""One colour for each part of a stream."""

Pixels = Image.Image | np.ndarray  # Pillow's, or (H, W, 3) as bytes or in [0, 1]
ROW = ("original", "region of interest", "decoded", "error")  # titles of `image_row`


def show(ax: Axes, image: Pixels, title: str = "") -> Axes:
    """A picture without ticks or frame."""
    ax.imshow(np.asarray(image))
    return _bare(ax, title)


def show_map(ax: Axes, image: Pixels, heat: np.ndarray, title: str = "") -> Axes:
    """A picture in grey under a map (any size, any unit): where a machine looks, where bits went."""
    grey = _array(image).mean(2)
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    ax.imshow(heat, cmap="inferno", alpha=0.55, extent=extent, interpolation="nearest")
    return _bare(ax, title)


def error_picture(original: Pixels, decoded: Pixels, full: float = 0.25) -> Image.Image:
    """Absolute error, mean of the three colours: black is none, white is `full` of the range or more."""
    error = np.abs(_array(original) - _array(decoded)).mean(2) / full
    return Image.fromarray((255 * error.clip(0, 1)).round().astype(np.uint8)).convert("RGB")


def image_row(
    axes: Sequence[Axes], original: Pixels, roi: np.ndarray, decoded: Pixels, titles: Sequence[str] = ROW
) -> Sequence[Axes]:
    """Original, region of interest (H, W), reconstruction and error, always in this order, in four axes."""
    show(axes[0], original, titles[0])
    show_map(axes[1], original, roi, titles[1])
    show(axes[2], decoded, titles[2])
    show(axes[3], error_picture(original, decoded), titles[3])
    return axes


def byte_bars(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """The bytes of each part: a stacked bar for each row, the first on top.

    `rows` is label to (part to bits), such as {"quality 0.5": codec.inspect(stream).bits}.
    """
    sizes = pd.DataFrame(rows).T.fillna(0).clip(lower=0) / 8
    colours = [PART_COLOURS.get(part, "#8c8c8c") for part in sizes]
    sizes.plot.barh(stacked=True, ax=ax, width=0.8, color=colours, legend=False, rot=0)
    ax.bar_label(ax.containers[-1], [f" {size:.0f}" for size in sizes.sum(axis=1)])  # type: ignore[arg-type]
    ax.invert_yaxis()
    ax.set(xlabel="Bytes", xmargin=0.1)
    ax.grid(False, axis="y")
    ax.legend(ncols=len(colours), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def top5_bars(ax: Axes, guesses: Sequence[tuple[str, float]], truth: str | None = None, title: str = "") -> Axes:
    """The likeliest classes with their probabilities, best on top; the true one, if known, in colour."""
    names, shares = zip(*guesses, strict=True)
    colours = [COLOURS["SLIM"] if name == truth else "#bdbdbd" for name in names]
    ax.barh(range(len(names)), 100 * np.array(shares), color=colours, tick_label=names)
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="Probability [%]", title=title)
    ax.grid(False, axis="y")
    return ax


def rate_curve(ax: Axes, bpp: Sequence, accuracy: Sequence, method: str, interval: Sequence | None = None) -> Axes:
    """Top-1 accuracy against rate for one method of `COLOURS`: none goes without a colour of its own.

    Rates are bits per pixel of whole files; accuracies, and the lower and upper ends of their intervals, in [0, 1].
    """
    order, style = np.argsort(bpp), "--" if method in DASHED else "-"
    x, y = np.asarray(bpp, float)[order], 100 * np.asarray(accuracy, float)[order]
    ax.plot(x, y, style, marker="o", color=COLOURS[method], label=method)
    if interval is not None:
        low, high = (100 * np.asarray(end, float)[order] for end in interval)
        ax.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    ax.set(xlabel="Bit-rate [bpp]", ylabel="Top-1 accuracy [%]", title="(upper-left is better)")
    return ax


def log_rate(ax: Axes) -> Axes:
    """Make the bit-rate axis logarithmic, with plain numbers at 1 and 3 of each decade."""
    ax.set(xscale="log", xlabel="Bit-rate [bpp]")
    ticks = LogLocator(subs=(1, 3), numticks=99)
    ax.xaxis.set(major_locator=ticks, minor_locator=NullLocator(), major_formatter="{x:g}")
    return ax


def show_photographs(figure: Figure) -> None:
    """Show a figure as JPEG, at a sixth of the bytes of a PNG, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=100, pil_kwargs={"quality": 75})
    plt.close(figure)
    display({"image/jpeg": buffer.getvalue(), "text/plain": "figure"}, raw=True)


def say(text: str) -> None:
    """Show Markdown, such as a sentence with a number that was just computed."""
    display({"text/markdown": text, "text/plain": text}, raw=True)


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> None:
    """Show a line of names and rows under it as a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))


def _bare(ax: Axes, title: str) -> Axes:
    ax.set(xticks=[], yticks=[], title=title)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def _array(image: Pixels) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    return pixels / 255 if pixels.dtype == np.uint8 else pixels
