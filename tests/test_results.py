"""The shipped tables: of the shipped weights, and in agreement with one another."""

from __future__ import annotations

import json
import math

import pytest

from slimlib import evaluation
from slimlib.deltas import bd_rate
from slimlib.evaluation import MAIN, PIXEL_FOLDERS, RESULTS, SLIM_FOLDERS, Comparison, Row, Timing, load_rows
from slimlib.scales import ASSETS

ROWS: list[Row] = load_rows(RESULTS / "evaluation.csv")
ABOUT = json.loads((RESULTS / "evaluation.json").read_text())


def of(method: str, variant: str = "") -> list[Row]:
    return [row for row in ROWS if (row.method, row.variant) == (method, variant)]


@pytest.mark.parametrize("name", sorted(ABOUT["weights"]))
def test_the_table_is_of_the_shipped_weights(name: str) -> None:
    pocket = ASSETS / "pocket"
    parts = [pocket / part for part in ("ldm", "captioner", "machine_a", "machine_b")]
    if name in SLIM_FOLDERS:
        folders = [*parts, pocket / SLIM_FOLDERS[name]]
    elif name in PIXEL_FOLDERS:
        folders = [*parts[2:], pocket / PIXEL_FOLDERS[name]]
    else:
        folders = parts if name == "uncompressed" else parts[2:]
    assert evaluation.weights_key(*folders) == ABOUT["weights"][name], "the weights have changed: run `make reproduce`"


def test_all_that_is_shipped_was_measured() -> None:
    shipped = [name for name, sub in {**SLIM_FOLDERS, **PIXEL_FOLDERS}.items() if (ASSETS / "pocket" / sub).is_dir()]
    assert set(shipped) <= {row.method for row in ROWS}
    assert set(MAIN) | set(PIXEL_FOLDERS) <= set(shipped)
    for name in (*MAIN, *PIXEL_FOLDERS, "uncompressed"):
        assert all(row.scenes >= 1000 for row in of(name)), name
    assert all(row.top1_b_low <= row.top1_b <= row.top1_b_high for row in ROWS)
    assert ABOUT["command"].startswith("python -m slimlib.evaluation --reproduce")


def test_the_deltas_follow_from_the_table() -> None:
    curves = {name: ([r.bpp for r in of(name)], [r.top1_b for r in of(name)]) for name in MAIN}
    checked = 0
    for row in load_rows(RESULTS / "comparisons.csv", Comparison):
        if row.machine == "b" and row.anchor in curves and row.test in curves and not math.isnan(row.bd_rate):
            assert bd_rate(curves[row.anchor], curves[row.test]).value == pytest.approx(row.bd_rate, abs=0.5)
            assert row.bd_rate_low <= row.bd_rate <= row.bd_rate_high
            checked += 1
    assert checked >= 2


def test_the_codec_adds_little_to_its_networks() -> None:
    timings = {t.what: t.value for t in load_rows(RESULTS / "times.csv", Timing)}
    for side in ("encode", "decode"):
        assert timings[f"{side}: against these"] < 1.3
