"""The static explorer: one HTML file, in which every picture and number was made by the codec beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from slimlib.explorer.engine import Explorer, Settings, curves_of, data_url, first_of
from slimlib.images import to_images, to_tensor
from slimlib.measure.evaluation import RESULTS, read_table
from slimlib.utils import write_file

QUALITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
CHOICE = 0.4  # quality at which successes and failures are counted for the choice of the scenes


def build(out: Path, explorer: Explorer | None = None, count: int = 12, qualities: Sequence[float] = QUALITIES) -> str:
    """Compress, decode and compare `count` scenes at every quality, and write them as one page; returns the rule.

    Some minutes on one core. The page needs nothing but its own file.
    """
    if out.is_dir():  # before the minutes
        raise ValueError(f"{out} is a folder; name the file to write, such as {out / 'explorer.html'}")
    explorer = explorer or Explorer()
    table = read_table(RESULTS / "evaluation.csv")
    settings = Settings(weights=explorer.weights[0])
    rates = next(iter(curves_of(table).values()))
    share = float(np.interp(CHOICE, rates.quality, rates.top1_b)) / 100
    right = round(count * share)
    rule = (
        f"The {count} pictures: in an order drawn by seed 0, the first {right} test scenes that machine B classifies "
        f"correctly at quality {CHOICE:g}, and the first {count - right} that it does not, as in the whole table "
        f"({100 * share:.0f}% of {int(rates.scenes.max())}). Machine A was listened to in training; B and C were not."
    )
    chosen, scenes = _choose(explorer, settings, count, right), []
    for i, index in enumerate(tqdm(chosen, unit="scene")):
        wrong = explorer.scene(chosen[i - 1]).caption  # of the scene before: another object
        scenes.append(_scene(explorer, replace(settings, scene=index), wrong, qualities))
    data = explorer.constants() | {"qualities": qualities, "side": explorer.scenes.size, "scenes": scenes}
    text, here = json.dumps(data, separators=(",", ":")).replace("</", "<\\/"), Path(__file__).parent
    page = jinja2.Template((here / "static.html").read_text()).render(here=here, data=text, rule=rule)
    write_file(out, page.encode())
    return rule


def _choose(explorer: Explorer, settings: Settings, count: int, right: int) -> list[int]:
    """Test scenes in a random order, until there are so many that machine B has right, and so many that it has not."""
    left = {True: right, False: count - right}
    chosen = []
    for index in np.random.default_rng(0).permutation(len(explorer.scenes)).tolist():
        if not any(left.values()):
            break
        *_, view = explorer.look(replace(settings, scene=index, quality=CHOICE))
        hit = view.guesses["after"]["B"][0][0] == explorer.scene(index).truth
        if left[hit]:
            left[hit] -= 1
            chosen.append(index)
    return chosen


def _scene(explorer: Explorer, settings: Settings, wrong: str, qualities: Sequence[float]) -> dict[str, Any]:
    source = explorer.scene(settings.scene)
    words, pictures, steps = {"right": source.caption, "wrong": wrong, "none": ""}, [source.image], []
    for quality in qualities:
        asked = {kind: replace(settings, quality=quality, caption=text) for kind, text in words.items()}
        views = {kind: list(explorer.look(one))[-1] for kind, one in asked.items()}
        view = views["right"]
        rivals = list(explorer.rivals(source, view.report.size))
        row: dict[str, Any] = {"before": first_of(view.guesses["before"])}
        row["bits"] = view.report.bit_map.round(1).tolist()
        for kind, one in views.items():
            parts = {part: round(bits / 8, 1) for part, bits in one.report.bits.items()}
            row[kind] = {"bytes": one.report.size, "parts": parts, "seen": first_of(one.guesses["after"])}
        row["rivals"] = [{"name": r.name, "bytes": r.size, "fits": r.fits, "seen": first_of(r.guesses)} for r in rivals]
        after = [one.pictures["after"] for one in views.values()]
        pictures += [view.pictures["before"], *after, *(r.image for r in rivals)]
        steps.append(row)
    name = source.name.partition(": ")[2]
    known = {"name": name, "truth": source.truth, "words": words, "seen": first_of(source.guesses), "steps": steps}
    (sheet,) = to_images(make_grid(to_tensor(pictures), 8, 0)[None])  # side by side, in rows of eight
    return known | {"sprite": data_url(sheet, quality=60, method=6)}
