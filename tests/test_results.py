"""The shipped tables: of the shipped weights, readable by pandas, and in agreement with one another."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from slimlib.measure.evaluation import RESULTS, WORDS, read_table, summarise, weights_key
from slimlib.measure.methods import MAIN, PIXEL_FOLDERS, SLIM_FOLDERS
from slimlib.measure.metrics import bd_rate
from slimlib.scales import ASSETS

TABLE, ABOUT = read_table(RESULTS / "evaluation.csv"), json.loads((RESULTS / "evaluation.json").read_text())
POCKET = ASSETS / "pocket"


NOT_SHIPPED = {"SLIM, feature matching", "SLIM, joint"}  # weights that only a table needs


@pytest.mark.parametrize("name", sorted(ABOUT["weights"].keys() - NOT_SHIPPED))
def test_the_table_is_of_the_shipped_weights(name: str) -> None:
    machines = [POCKET / f"machine_{name}" for name in ("a", "a2", "b", "c", "d")]
    parts = [POCKET / "ldm", POCKET / "captioner", *machines]
    if name in (*SLIM_FOLDERS, *WORDS):
        folders = [*parts, POCKET / SLIM_FOLDERS.get(name, SLIM_FOLDERS[MAIN[0]])]
    elif name in PIXEL_FOLDERS:
        folders = [*machines, POCKET / PIXEL_FOLDERS[name]]
    else:
        folders = parts if name == "uncompressed" else machines
    assert weights_key(*folders) == ABOUT["weights"][name], "the weights have changed: run `make reproduce`"


def test_all_that_is_shipped_was_measured() -> None:
    shipped = {name for name, sub in {**SLIM_FOLDERS, **PIXEL_FOLDERS}.items() if (POCKET / sub).is_dir()}
    assert {*MAIN, *PIXEL_FOLDERS} == shipped == {*SLIM_FOLDERS, *PIXEL_FOLDERS} & {*TABLE.method} - NOT_SHIPPED
    whole = TABLE[TABLE.method.isin([*MAIN, *PIXEL_FOLDERS, *WORDS, "uncompressed"]) & TABLE.variant.isin(["", "VAE"])]
    assert whole.scenes.ge(1000).all() and len(whole) == 5 * 6 + 2 + 2
    names = ["top1_a", "top1_a2", "top1_b", "top1_c", "found_d"]
    for name in names + [f"{name}_unseen" for name in names]:
        assert TABLE[name].between(TABLE[f"{name}_low"], TABLE[f"{name}_high"]).all()
    assert "--reproduce" in ABOUT["command"]


@pytest.mark.parametrize("name", ["evaluation", "comparisons", "times"])
def test_tables_are_written_as_they_are_read(name: str) -> None:
    path = RESULTS / f"{name}.csv"
    for table in (pd.read_csv(path), read_table(path)):
        assert table.to_csv(index=False, float_format="%.6g") == path.read_text()


def test_the_deltas_follow_from_the_table() -> None:
    curves = {name: (of.bpp, of.top1_b) for name, of in TABLE[TABLE.variant == ""].groupby("method")}
    rows = read_table(RESULTS / "comparisons.csv")
    rows = rows[(rows.machine == "b") & rows.anchor.isin(MAIN) & rows.test.isin(MAIN)].dropna(subset="bd_rate")
    assert len(rows) >= 2 and rows.bd_rate.between(rows.bd_rate_low, rows.bd_rate_high).all()
    for row in rows.itertuples():
        assert bd_rate(curves[row.anchor], curves[row.test]).value == pytest.approx(row.bd_rate, abs=0.5)


def test_the_table_follows_from_the_results_by_scene() -> None:
    results = read_table(RESULTS / "scenes.csv.gz")
    results = results[results.method.isin([MAIN[0], "hyperprior", "WebP", *WORDS])]
    table = TABLE[TABLE.method.isin(results.method.unique())].reset_index(drop=True)
    pd.testing.assert_frame_equal(summarise(results), table, rtol=1e-4, check_dtype=False)


def test_the_codec_adds_little_to_its_networks() -> None:
    times = read_table(RESULTS / "times.csv").set_index("what")["value"]
    assert times["encode: against these"] < 1.3 and times["decode: against these"] < 1.3
