"""Figures: every function draws into the axes it is given and returns them; no global settings are changed.

Call `plt.style.use(ASSETS / "slim.mplstyle")` once in a notebook. Each method has one colour everywhere;
learned codecs have a solid line, classic ones a dashed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

COLOURS = {
    "SLIM": "#0072b2",
    "SLIM, stage 1": "#56b4e9",
    "SLIM, no diffusion": "#004c78",
    "SLIM, no caption": "#7a9cc6",
    "SLIM, uniform weights": "#8c6bb1",
    "SLIM, feature matching": "#44aa99",
    "SLIM, LoRA": "#332288",
    "caption only": "#cc79a7",
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
"""One colour for each method, in every figure."""

CLASSIC = {"JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000", "best classic, payload"}
PART_COLOURS = {
    "header": "#595959",
    "caption": "#cc79a7",
    "hyper": "#56b4e9",
    "latent": "#0072b2",
    "rounding": "#c8c8c8",
}
"""One colour for each part of a stream."""

Picture = Image.Image | np.ndarray


def show(ax: Axes, image: Picture, title: str = "") -> Axes:
    """A picture without ticks or frame."""
    ax.imshow(np.asarray(image))
    return _bare(ax, title)


def show_map(ax: Axes, image: Picture, heat: np.ndarray, title: str = "", alpha: float = 0.55) -> Axes:
    """A picture in grey under a map (any size, any unit): where a machine looks, where bits went."""
    grey = _array(image).mean(2)
    height, width = grey.shape
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    ax.imshow(grey, cmap="gray", vmin=0, vmax=1)
    ax.imshow(np.asarray(heat), cmap="inferno", alpha=alpha, extent=extent, interpolation="nearest")
    return _bare(ax, title)


def show_error(ax: Axes, original: Picture, decoded: Picture, title: str = "", full: float = 0.25) -> Axes:
    """Absolute error, mean of the three colours: black is none, white is `full` of the range or more."""
    error = np.abs(_array(original) - _array(decoded)).mean(2)
    ax.imshow(error, cmap="gray", vmin=0, vmax=full)
    return _bare(ax, title)


def image_row(
    axes: Sequence[Axes],
    original: Picture,
    roi: np.ndarray,
    decoded: Picture,
    titles: Sequence[str] = ("original", "region of interest", "decoded", "error"),
) -> Sequence[Axes]:
    """Original, region of interest (H, W), reconstruction and error, always in this order, in four axes."""
    show(axes[0], original, titles[0])
    show_map(axes[1], original, roi, titles[1])
    show(axes[2], decoded, titles[2])
    show_error(axes[3], original, decoded, titles[3])
    return axes


def byte_bars(ax: Axes, rows: Mapping[str, Mapping[str, float]]) -> Axes:
    """Who spent what: a stacked bar of bytes for each row, the first on top.

    Args:
        rows: label to (part to bits), such as {"quality 0.5": codec.inspect(stream).bits}.
    """
    parts = list(dict.fromkeys(part for bits in rows.values() for part in bits))
    left = np.zeros(len(rows))
    for part in parts:
        sizes = np.array([max(bits.get(part, 0.0), 0.0) / 8 for bits in rows.values()])
        ax.barh(list(rows), sizes, left=left, color=PART_COLOURS.get(part, "#8c8c8c"), label=part)
        left += sizes
    for place, end in enumerate(left):
        ax.text(end, place, f" {end:.0f}", va="center")
    ax.invert_yaxis()
    ax.set_xlabel("Bytes")
    ax.grid(False, axis="y")
    ax.margins(x=0.1)
    ax.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return ax


def top5_bars(ax: Axes, guesses: Sequence[tuple[str, float]], truth: str | None = None, title: str = "") -> Axes:
    """The likeliest classes with their probabilities, best on top; the true one, if known, in colour."""
    names = [name for name, _ in guesses]
    colours = [COLOURS["SLIM"] if name == truth else "#bdbdbd" for name in names]
    ax.barh(range(len(names)), [100 * share for _, share in guesses], color=colours)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("Probability [%]")
    ax.grid(False, axis="y")
    ax.set_title(title)
    return ax


def rate_curve(
    ax: Axes,
    bpp: Sequence[float],
    accuracy: Sequence[float],
    method: str,
    interval: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Axes:
    """Accuracy against rate for one method of `COLOURS`.

    Args:
        bpp: bits per pixel of each point, whole files.
        accuracy: top-1 in [0, 1] of each point.
        method: a key of COLOURS; KeyError otherwise, so that no method goes without a colour of its own.
        interval: lower and upper ends of the confidence intervals, in [0, 1].
    """
    order = np.argsort(bpp)
    x, y = np.asarray(bpp, float)[order], 100 * np.asarray(accuracy, float)[order]
    style = "--" if method in CLASSIC else "-"
    ax.plot(x, y, style, marker="o", color=COLOURS[method], label=method)
    if interval is not None:
        low, high = (100 * np.asarray(end, float)[order] for end in interval)
        ax.fill_between(x, low, high, color=COLOURS[method], alpha=0.15, linewidth=0)
    ax.set_xlabel("Bit-rate [bpp]")
    ax.set_ylabel("Top-1 accuracy [%]")
    ax.set_title("(upper-left is better)")
    return ax


def log_rate(ax: Axes) -> Axes:
    """Make the bit-rate axis logarithmic, with plain numbers at 1 and 3 of each decade."""
    ticks = [digit * 10.0**power for power in range(-4, 2) for digit in (1, 3)]
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    ax.set_xticks([], minor=True)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("Bit-rate [bpp]")
    return ax


def interval_dots(
    ax: Axes, rows: Mapping[str, tuple[float, float, float]], label: str, reference: str | None = None
) -> Axes:
    """Values with their intervals, one above the other, the first on top.

    Args:
        rows: name to (value, low, high).
        label: of the horizontal axis, with its unit.
        reference: the row to compare with: drawn in colour, with a line through its value.
    """
    for place, (name, (value, low, high)) in enumerate(rows.items()):
        colour = COLOURS["SLIM"] if name == reference else "#595959"
        ax.plot([low, high], [place, place], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
        ax.plot([value], [place], "o", color=colour)
        if name == reference:
            ax.axvline(value, color=colour, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(label)
    ax.grid(False, axis="y")
    return ax


def _bare(ax: Axes, title: str) -> Axes:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(title)
    return ax


def _array(image: Picture) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, np.float64)
    return pixels / 255 if pixels.max() > 1 else pixels
