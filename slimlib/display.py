"""What the notebooks show beside plots: photographs as JPEG, Markdown made by code, tables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure


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
    """Show rows as a Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    say("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines))
