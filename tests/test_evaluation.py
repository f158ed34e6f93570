"""The evaluation: intervals that cover, files that count, a table that can be read back."""

from __future__ import annotations

import csv

import numpy as np

from slimlib.codec import SlimCodec
from slimlib.evaluation import as_text, evaluate, interval, save_rows
from slimlib.machines import load_machine
from slimlib.scales import Scale
from slimlib.scenes import PocketScenes


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = interval(rng.random(200) < 0.7, draws=400)
        covered += low <= 70 <= high
    assert covered >= 88


def test_rates_are_file_lengths(tmp_path):
    scale = Scale.from_name("pocket")
    codec = SlimCodec.from_pretrained(scale)
    scenes = [PocketScenes("test")[i] for i in range(3)]
    machines = load_machine(scale.machine_a), load_machine(scale.machine_b)
    rows = evaluate(codec, scenes, *machines, qualities=[0.2, 0.9], progress=False)
    for row in rows:
        sizes = [len(codec.compress(scene.image, row.quality)) for scene in scenes]
        assert np.isclose(row.bpp, 8 * np.mean(sizes) / 128**2)
        assert row.caption_bytes + row.hyper_bytes + row.latent_bytes < np.mean(sizes)
        assert 0 <= row.roi_bits <= 1 and row.top1_b_low <= row.top1_b <= row.top1_b_high
    assert rows[1].bpp > rows[0].bpp and rows[1].roi_psnr > rows[0].roi_psnr
    assert len(as_text(rows).splitlines()) == 3
    save_rows(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open() as file:
        assert [float(line["quality"]) for line in csv.DictReader(file)] == [0.2, 0.9]
