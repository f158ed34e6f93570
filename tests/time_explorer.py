"""How long the explorer takes from a move of its slider to the pictures, on a page without a browser.

python tests/time_explorer.py [MOVES]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import slimlib.explorer  # noqa: F401 (says how threads wait, before torch is imported)
from slimlib.explorer.page import SIZES, Page


def main(moves: int = 100, page: Page | None = None) -> None:
    page, times = page or Page(), []
    others = [size for size in SIZES if size != page.controls["size"].value]
    for size in itertools.islice(itertools.cycle(others), moves):
        page.controls["size"].value = size
        assert page.wait()
        times.append([1000 * page.answered["before"], 1000 * page.answered["after"]])
    (first, finished), (late, last) = np.percentile(times, [50, 95], axis=0)
    print(f"{len(times)} moves of the slider")
    print(f"first picture and bytes: median {first:.0f} ms, 95th percentile {late:.0f} ms")
    print(f"finished picture: median {finished:.0f} ms, 95th percentile {last:.0f} ms")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
