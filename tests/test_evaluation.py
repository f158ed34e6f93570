"""The evaluation: intervals that cover, files that count, deltas that are refused, a run that survives being killed."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slimlib import evaluation
from slimlib.codec import SlimCodec
from slimlib.deltas import NoOverlap, accuracy_at, bd_accuracy, bd_rate, frontier
from slimlib.evaluation import (
    Ceiling,
    Classic,
    Row,
    SceneResult,
    Setting,
    Slim,
    Store,
    as_text,
    compare,
    evaluate,
    interval,
    load_rows,
    measure_times,
    save_rows,
    summarise,
    weights_key,
)
from slimlib.machines import load_machine
from slimlib.scales import ASSETS, Scale
from slimlib.scenes import PocketScenes


@pytest.fixture(scope="module")
def codec() -> SlimCodec:
    return SlimCodec.from_pretrained("pocket", exact=False)


@pytest.fixture(scope="module")
def machines() -> tuple:
    scale = Scale.from_name("pocket")
    return load_machine(scale.machine_a), load_machine(scale.machine_b)


# ---- numbers


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = interval(rng.random(200) < 0.7, draws=400)
        covered += low <= 70 <= high
    assert covered >= 88
    assert all(math.isnan(end) for end in interval([]))


def test_the_interval_is_that_of_resampling() -> None:
    hits = np.random.default_rng(2).random(150) < 0.4
    picks = np.random.default_rng(3).integers(150, size=(4_000, 150))
    resampled = 100 * np.quantile(hits[picks].mean(1), [0.025, 0.975])
    assert np.allclose(interval(hits, draws=4_000), resampled, atol=1.4)


def test_the_frontier_rises_strictly() -> None:
    rates, accuracies = [3, 1, 2, 4, 2, 5], [60, 50, 40, 60, 55, 70]
    assert frontier(rates, accuracies).tolist() == [[1, 2, 3, 5], [50, 55, 60, 70]]


def test_half_the_rate_is_minus_fifty_percent() -> None:
    rates, accuracies = np.array([0.1, 0.2, 0.4, 0.8]), np.array([40.0, 60, 75, 85])
    delta = bd_rate((rates, accuracies), (rates / 2, accuracies))
    assert delta.value == pytest.approx(-50) and (delta.low, delta.high, delta.overlap) == (40, 85, 1)
    gained = bd_accuracy((rates, accuracies), (rates, accuracies + 3))
    assert gained.value == pytest.approx(3) and gained.overlap == 1
    # A point that another beats must change nothing.
    worse = bd_rate((np.append(rates, 0.5), np.append(accuracies, 50)), (rates / 2, accuracies))
    assert worse.value == pytest.approx(-50)
    assert accuracy_at((rates, accuracies), 0.2) == pytest.approx(60)
    assert 60 < accuracy_at((rates, accuracies), 0.3) < 75
    assert math.isnan(accuracy_at((rates, accuracies), 0.05))


def test_curves_that_do_not_meet_are_refused() -> None:
    low = ([0.1, 0.2, 0.4], [10.0, 20, 30])
    with pytest.raises(NoOverlap, match="10 to 30, the other 40 to 60: 0.0%"):
        bd_rate(low, ([0.1, 0.2, 0.4], [40.0, 50, 60]))
    with pytest.raises(NoOverlap, match="10.0% of the whole"):
        bd_rate(low, ([0.1, 0.2, 0.4], [28.0, 29, 30]))
    with pytest.raises(NoOverlap, match="rates"):
        bd_accuracy(low, ([1.0, 2, 4], [10.0, 20, 30]))
    with pytest.raises(NoOverlap, match="3 points"):
        bd_rate(low, ([0.1, 0.2], [10.0, 20]))


def test_the_published_artefact() -> None:
    """Cubics through curves that share no accuracy give the published "-88.6%", but for rounding; ours refuses."""
    curves: dict[str, list[tuple[float, float]]] = {}
    with (ASSETS / "reference" / "imagenet_resnet50_rate_accuracy.csv").open() as file:
        for line in csv.DictReader(file):
            assert line["source"]
            if line["bpp"]:
                curves.setdefault(line["method"], []).append((float(line["bpp"]), float(line["top1_percent"])))
    anchor, test = (np.array(curves[name]).T for name in ("TIC (human codec)", "Adapt-ICMH"))
    polynomials = [np.polyint(np.polyfit(curve[1], np.log(curve[0]), 3)) for curve in (anchor, test)]
    low, high = max(anchor[1].min(), test[1].min()), min(anchor[1].max(), test[1].max())
    assert low > high, "nothing is common to both"
    a, t = ((np.polyval(p, high) - np.polyval(p, low)) / (high - low) for p in polynomials)
    assert 100 * (np.exp(t - a) - 1) == pytest.approx(-88.6, abs=0.5)
    with pytest.raises(NoOverlap, match=r"51\.1 to 68\.3, the other 69\.8 to 75\.6"):
        bd_rate(anchor, test)
    fair = bd_rate(anchor, np.array(curves["TransTIC"]).T)  # these do meet
    assert -60 < fair.value < -55 and (fair.low, fair.high) == (59.3, 68.3)


def _results(size: float, hits: np.ndarray) -> list[SceneResult]:
    rest = (0.1, 0.2, 1.0, 2.0)
    return [
        SceneResult(i, i, i % 4 > 0, size, size - 7, 1, 2, size - 10, 0.5, bool(h), bool(h), *rest)
        for i, h in enumerate(hits)
    ]


def test_comparing_with_a_paired_bootstrap() -> None:
    order = np.random.default_rng(0).permutation(200)
    shares = [(100, 0.3), (200, 0.5), (400, 0.7), (800, 0.85)]
    anchor = [_results(size, order < 200 * share) for size, share in shares]
    test = [_results(size / 2, order < 200 * share) for size, share in shares]
    delta = compare(("there", "here"), anchor, test, "b", draws=50)
    assert delta.bd_rate == pytest.approx(-50) and delta.scenes == 200 and not delta.refused
    # Paired: the same scenes are right in both, so chance hardly moves the difference.
    assert delta.bd_rate_low <= -50 <= delta.bd_rate_high and delta.bd_rate_high - delta.bd_rate_low < 2
    assert delta.bd_accuracy > 10
    bare = compare(("there", "here"), anchor, test, "a", (True, False), draws=5)
    assert bare.bd_rate > delta.bd_rate, "an anchor without its headers is harder to beat"
    apart = compare(("there", "here"), anchor[:3], [_results(9, order < 180)] * 3, draws=5)
    assert math.isnan(apart.bd_rate) and "3 points" in apart.refused


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    results = _results(64, np.array([1, 1, 1, 0, 1, 0, 0, 1]))
    results[3] = replace(results[3], encode_ms=math.nan)
    row = summarise(Setting("SLIM", "no caption", 0.2), results)
    assert (row.scenes, row.bpp, row.header_bytes) == (8, 8 * 64 / 128**2, 7)
    assert (row.top1_b, row.top1_b_seen, row.top1_b_unseen) == (62.5, 50, 100)  # scenes 0 and 4 are unseen
    assert row.roi_psnr == pytest.approx(10) and row.encode_ms == 1
    save_rows([row], tmp_path / "rows.csv")
    (again,) = load_rows(tmp_path / "rows.csv")
    assert again.method == "SLIM" and again.scenes == 8 and again.bpp == row.bpp
    save_rows(results, tmp_path / "scenes.csv")
    back = load_rows(tmp_path / "scenes.csv", SceneResult)
    assert back[:3] == results[:3] and math.isnan(back[3].encode_ms)
    with pytest.raises(ValueError, match="no table of Row"):
        load_rows(tmp_path / "scenes.csv", Row)
    assert len(as_text([row, row]).splitlines()) == 3


def test_ablations_come_with_the_method_on_their_scenes() -> None:
    hits = np.arange(10) < 5
    results = {
        Setting("SLIM", "", 0.2): _results(64, hits),
        Setting("SLIM", "K = 1", 0.2): _results(64, hits[:4]),
        Setting("uncompressed", "VAE"): _results(64, hits),
        Setting("uncompressed"): _results(64, hits),
    }
    rows = evaluation.table(results)
    assert len(rows) == 5 and (rows[-1].method, rows[-1].variant) == ("SLIM", evaluation.AS_IT_IS)
    assert (rows[-1].scenes, rows[-1].top1_b, rows[0].top1_b) == (4, 100, 50)


# ---- runs


def test_rates_are_file_lengths(codec: SlimCodec, machines: tuple) -> None:
    variants = ["", "no caption", "wrong caption", "oracle crop", "no diffusion", "K = 1", "t0 = 50", "caption only"]
    method = Slim("SLIM, stage 1", codec, (0.2, 0.9), variants, timed=1)
    results = evaluate([(method, 2)], machines, progress=False)
    assert [str(s) for s in results][:3] == ["SLIM, stage 1 at 0.2", "SLIM, stage 1 at 0.9"] + [
        "SLIM, stage 1 (no caption) at 0.2"
    ]
    scenes = [PocketScenes("test")[i] for i in range(2)]
    rows = {s: summarise(s, r) for s, r in results.items()}
    for quality in (0.2, 0.9):
        row = rows[Setting(method.name, "", quality)]
        sizes = [len(codec.compress(scene.image, quality)) for scene in scenes]
        assert np.isclose(row.bpp, 8 * np.mean(sizes) / 128**2, rtol=0.02)
        assert row.header_bytes == 7 and row.caption_bytes + row.hyper_bytes + row.latent_bytes < np.mean(sizes)
        assert 0 <= row.roi_bits <= 1 and row.top1_b_low <= row.top1_b <= row.top1_b_high
        assert row.encode_ms > 1 and row.decode_ms > 1
        same = ("no diffusion", "K = 1", "t0 = 50")
        assert all(rows[Setting(method.name, v, quality)].bpp == row.bpp for v in same), "the file is the same"
        none = rows[Setting(method.name, "no caption", quality)]
        assert none.bpp < row.bpp and none.caption_bytes == 0
    low, high = (rows[Setting(method.name, "", q)] for q in (0.2, 0.9))
    assert high.bpp > low.bpp and high.roi_psnr > low.roi_psnr
    alone = rows[Setting(method.name, "caption only", 0.0)]
    assert alone.bpp < low.bpp and alone.latent_bytes == 0 and alone.roi_psnr < high.roi_psnr


def test_decoded_pictures_are_those_of_the_codec(codec: SlimCodec) -> None:
    batch = evaluation.Batch([0, 1])
    ((_, x_hat, _),) = Slim("SLIM", codec, (0.5,), timed=0).run(batch, [Setting("SLIM", "", 0.5)])
    decoded = evaluation.to_tensor(codec.decompress(codec.compress(batch.images, 0.5)))
    assert (x_hat - decoded).abs().mean() < 1 / 255


def test_a_killed_run_goes_on(codec: SlimCodec, machines: tuple, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "BATCH", 2)
    store, method = Store(tmp_path), Classic("jpeg", (20, 80), key="k")
    whole = evaluate([(method, 4)], machines, store, progress=False)
    path = store.path(method, Setting("JPEG", "1/2", 80))
    assert path.relative_to(tmp_path).as_posix() == "jpeg-k/1-2-80.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")  # as if it had stopped after the first batch
    ran: list[tuple[list[int], int]] = []
    run = Classic.run

    def watched(self, batch, wanted):
        ran.append((batch.indices, len(wanted)))
        yield from run(self, batch, wanted)

    monkeypatch.setattr(Classic, "run", watched)
    again = evaluate([(method, 4)], machines, store, progress=False)
    assert ran == [([2, 3], 1)], "only what was missing"
    assert [[r.size for r in of] for of in again.values()] == [[r.size for r in of] for of in whole.values()]
    more = evaluate([(method, 4), (Ceiling(codec, "k"), 2)], machines, store, progress=False)
    assert len(more[Setting("uncompressed")]) == 2 and len(ran) == 1
    assert math.isinf(summarise(Setting("JPEG"), more[Setting("JPEG", "", 20)]).roi_psnr) is False


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    one = weights_key(tmp_path / "one")
    assert one == weights_key(tmp_path / "two") and len(one) == 8
    (tmp_path / "two" / "card.json").write_text("figures")
    assert one == weights_key(tmp_path / "two"), "a card is no weight"
    (tmp_path / "two" / "config.json").write_text("{} ")
    assert one != weights_key(tmp_path / "two")


def test_times_come_with_what_they_are_compared_to(codec: SlimCodec) -> None:
    timings = {t.what: t for t in measure_times(codec, [PocketScenes("test")[0]], repeats=1)}
    for side in ("encode", "decode"):
        parts = [t.value for name, t in timings.items() if name.startswith(f"{side}: ") and t.unit == "ms"]
        assert parts[-1] == pytest.approx(sum(parts[:-1]))
        ratio = timings[f"{side}: against these"]
        assert ratio.unit == "times" and ratio.value == pytest.approx(timings[side].value / parts[-1])
    assert timings["peak memory of the process"].value > 100
    assert codec.exact is False and torch.get_num_threads() >= 1


def test_the_command_refuses_unknown_methods() -> None:
    with pytest.raises(SystemExit, match="no method nonsense; there are: .*JPEG"):
        evaluation.main(["--scenes", "1", "--only", "nonsense", "--quiet"])
