"""Intervals that cover, frontiers, deltas, and which deltas are refused."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from slimlib.measure.metrics import NoOverlap, accuracy_at, bd_accuracy, bd_rate, compare, frontier, interval, mcnemar
from slimlib.scales import ASSETS

RATES, ACCURACIES = np.array([0.1, 0.2, 0.4, 0.8]), np.array([40.0, 60, 75, 85])


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    ends = [interval(rng.random(200) < 0.7) for _ in range(100)]
    assert sum(low <= 70 <= high for low, high in ends) >= 88
    assert all(math.isnan(end) for end in interval([]))


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 8), (8, 8), (5, 8), (0, 1000), (1000, 1000), (760, 1000)])
def test_the_interval_of_independent_hits_is_wilsons(hits: int, n: int) -> None:
    share, z = hits / n, 1.959964
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    low, high = interval(np.arange(n) < hits)
    assert (low, high) == pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-4) and low < high
    assert interval(np.arange(n) < hits, [f"picture {i}" for i in range(n)]) == (low, high), "clusters of one"
    assert interval([*(np.arange(n) < hits), math.nan]) == (low, high), "what nobody has looked at does not count"


def test_the_interval_of_clusters_is_that_of_resampling_them() -> None:
    """Forty cut-outs of which each is known or not: a thousand of their scenes say no more than forty."""
    rng = np.random.default_rng(2)
    cutouts = np.repeat([f"a thing {i}" for i in range(40)], 25)
    hits = np.repeat(rng.random(40) < 0.6, 25) ^ (rng.random(1000) < 0.05)
    by_cutout = hits.reshape(40, 25).mean(1)
    resampled = 100 * np.quantile(by_cutout[rng.integers(40, size=(4000, 40))].mean(1), [0.025, 0.975])
    shuffled = rng.permutation(1000)
    assert interval(hits[shuffled], cutouts[shuffled]) == pytest.approx(resampled, abs=1.5)
    narrow, wide = (np.diff(interval(hits, clusters))[0] for clusters in (None, cutouts))
    assert wide > 4 * narrow


@pytest.mark.parametrize("right", [0, 1])
def test_clusters_that_all_agree_are_no_certainty(right: int) -> None:
    assert interval([right] * 1000, np.repeat(range(8), 125)) == interval([right] * 8)
    assert interval([right] * 9, ["one"] * 9) == interval([right])
    assert interval([1, 0] * 8, np.repeat(range(8), 2)) == interval([1, 0] * 8), "at least as wide as Wilson's"


@pytest.mark.parametrize(
    "hole", [(math.nan, 50.0), (0.05, math.nan), (math.nan, math.nan), (0.05, math.inf), (0.0, 30.0)]
)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_hole_in_a_curve_does_not_hide_the_rest(hole: tuple[float, float], at: int) -> None:
    curve = np.insert(RATES, at, hole[0]), np.insert(ACCURACIES, at, hole[1])
    assert np.array_equal(frontier(*curve), frontier(RATES, ACCURACIES))
    assert bd_rate((RATES * 2, ACCURACIES), curve).value == pytest.approx(-50)
    assert frontier([hole[0]], [hole[1]]).shape == (2, 0) and math.isnan(accuracy_at(([hole[0]], [hole[1]]), 0.05))


def test_the_frontier_rises_strictly() -> None:
    rates, accuracies = [3, 1, 2, 4, 2, 5, 1], [60, 50, 40, 60, 55, 70, 45]
    assert frontier(rates, accuracies).tolist() == [[1, 2, 3, 5], [50, 55, 60, 70]]


def test_half_the_rate_is_minus_fifty_percent() -> None:
    delta = bd_rate((RATES, ACCURACIES), (RATES / 2, ACCURACIES))
    assert delta.value == pytest.approx(-50) and (delta.low, delta.high, delta.overlap) == (40, 85, 1)
    gained = bd_accuracy((RATES, ACCURACIES), (RATES, ACCURACIES + 3))
    assert gained.value == pytest.approx(3) and gained.overlap == 1
    assert (gained.low, gained.high) == pytest.approx((math.log2(0.1), math.log2(0.8)))
    # A point that another beats must change nothing.
    worse = bd_rate((np.append(RATES, 0.5), np.append(ACCURACIES, 50)), (RATES / 2, ACCURACIES))
    assert worse.value == pytest.approx(-50)
    assert accuracy_at((RATES, ACCURACIES), 0.2) == pytest.approx(60)
    assert accuracy_at((RATES, ACCURACIES), 0.2 * 2**0.5) == pytest.approx(67.5), "linear in the logarithm"
    assert math.isnan(accuracy_at((RATES, ACCURACIES), 0.05))


def test_curves_that_do_not_meet_are_refused() -> None:
    low = ([0.1, 0.2, 0.4], [10.0, 20, 30])
    with pytest.raises(NoOverlap, match="10 to 30, the other 40 to 60: 0.0%"):
        bd_rate(low, ([0.1, 0.2, 0.4], [40.0, 50, 60]))
    with pytest.raises(NoOverlap, match="10.0% of the whole"):
        bd_rate(low, ([0.1, 0.2, 0.4], [28.0, 29, 30]))
    with pytest.raises(NoOverlap, match="covers rates 0.1 to 0.4, the other 1 to 4"):
        bd_accuracy(low, ([1.0, 2, 4], [10.0, 20, 30]))
    with pytest.raises(NoOverlap, match="3 points"):
        bd_rate(low, ([0.1, 0.2], [10.0, 20]))
    assert bd_rate(low, ([0.1, 0.2, 0.4], [24.0, 29, 30])).overlap == pytest.approx(0.3), "just enough"


def test_the_published_artefact() -> None:
    """Cubics through curves that share no accuracy give the published "-88.6%", but for rounding; ours refuses."""
    table = pd.read_csv(ASSETS / "reference" / "imagenet_resnet50_rate_accuracy.csv")
    assert table.source.notna().all()
    points = table.dropna(subset="bpp").groupby("method")[["bpp", "top1_percent"]]
    curves = {name: of.to_numpy().T for name, of in points}
    anchor, test = curves["TIC (human codec)"], curves["Adapt-ICMH"]
    polynomials = [np.polyint(np.polyfit(curve[1], np.log(curve[0]), 3)) for curve in (anchor, test)]
    low, high = max(anchor[1].min(), test[1].min()), min(anchor[1].max(), test[1].max())
    assert low > high, "nothing is common to both"
    a, t = ((np.polyval(p, high) - np.polyval(p, low)) / (high - low) for p in polynomials)
    assert 100 * (np.exp(t - a) - 1) == pytest.approx(-88.6, abs=0.5)
    with pytest.raises(NoOverlap, match=r"51\.1 to 68\.3, the other 69\.8 to 75\.6"):
        bd_rate(anchor, test)
    fair = bd_rate(anchor, curves["TransTIC"])  # these do meet
    assert -60 < fair.value < -55 and (fair.low, fair.high) == (59.3, 68.3)


def curve(sizes: list[float], shares: list[float], scenes: int = 200) -> pd.DataFrame:
    """Results of a method that is right on the easiest scenes, for machine B; A is right on half as many."""
    order = np.random.default_rng(0).permutation(200)[:scenes]
    return pd.concat(
        pd.DataFrame({"method": "m", "variant": "", "quality": q, "scene": range(scenes), "size": size}).assign(
            top1_b=order < 200 * share, top1_a=order < 100 * share
        )
        for q, (size, share) in enumerate(zip(sizes, shares, strict=True))
    )


def test_comparing_with_a_paired_bootstrap() -> None:
    sizes, shares = [100, 200, 400, 800], [0.3, 0.5, 0.7, 0.85]
    anchor, test = curve(sizes, shares), curve([size / 2 for size in sizes], shares)
    delta = compare(anchor, test, draws=50)
    assert delta["bd_rate"] == pytest.approx(-50) and delta["scenes"] == 200 and not delta["refused"]
    assert (delta["from_accuracy"], delta["to_accuracy"], delta["overlap"]) == (30, 85, 1)
    # Paired: the same scenes are right in both, so chance hardly moves the difference.
    assert -51 < delta["bd_rate_low"] <= -50 <= delta["bd_rate_high"] < -49
    assert 10 < delta["bd_accuracy_low"] < delta["bd_accuracy"] < delta["bd_accuracy_high"] < 24
    assert compare(anchor, test, "a", draws=2)["to_accuracy"] == 42.5
    fewer = compare(anchor, curve(sizes, shares, scenes=150), draws=2)
    assert fewer["scenes"] == 150 and fewer["bd_rate"] == pytest.approx(0), "scenes that both have"


def test_scenes_of_a_cutout_are_resampled_together() -> None:
    """Ten scenes of each of twenty cut-outs, all of them right or wrong: chance moves far more than it seems."""
    sizes, shares = [100, 200, 400, 800], [0.3, 0.5, 0.7, 0.85]
    anchor, test = curve(sizes, shares), curve(sizes, [share + 0.05 for share in shares])
    rank = {scene: i for i, scene in enumerate(np.argsort(np.random.default_rng(0).permutation(200)))}
    cutouts = anchor.scene.map(lambda scene: f"a thing {rank[scene] // 10}")
    alone, together = (compare(anchor.assign(**column), test) for column in ({}, {"cutout": cutouts.to_numpy()}))
    width = {
        name: delta["bd_accuracy_high"] - delta["bd_accuracy_low"] for name, delta in (("1", alone), ("2", together))
    }
    assert together["bd_accuracy"] == alone["bd_accuracy"] and width["2"] > 1.5 * width["1"]
    each = compare(anchor.assign(cutout=anchor.scene.map("picture {}".format)), test)
    assert each == pytest.approx(alone, nan_ok=True), "each picture a cluster of its own"
    nothing = compare(anchor, test.assign(scene=test.scene + 1000), draws=2)
    assert nothing["scenes"] == 0 and "no scene" in nothing["refused"] and math.isnan(nothing["bd_rate"])


def test_a_refused_comparison_says_why() -> None:
    sizes, shares = [100, 200, 400, 800], [0.3, 0.5, 0.7, 0.85]
    flat = compare(curve(sizes, shares), curve([9, 10, 11], [0.9] * 3), draws=5)
    assert math.isnan(flat["bd_rate"]) and math.isnan(flat["bd_rate_high"]) and "3 points" in flat["refused"]
    far = compare(curve(sizes, shares), curve([9, 10, 11], [0.4, 0.5, 0.8]), draws=5)
    assert far["bd_rate"] < -90 and math.isnan(far["bd_accuracy"]) and "rates 100 to 800, the other 9" in far["refused"]


def test_mcnemars_test_at_the_lowest_common_rate() -> None:
    """20 scenes; at 50 bytes one method is right in 8 more and in 1 fewer; no other rates are so near."""
    anchor, test = np.zeros((2, 20)), np.zeros((2, 20))
    anchor[1, :10], test[0, 1:18], test[1, :] = 1, 1, 1
    sizes = np.array([[10.0], [50.0]]) * np.ones((2, 20)), np.array([[49.0], [51.0]]) * np.ones((2, 20))
    found = mcnemar((sizes[0], 100 * anchor), (sizes[1], 100 * test))
    assert (found["at_bytes"], found["won"], found["lost"]) == (50, 8, 1)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar((sizes[0], anchor), (sizes[0], anchor))["p"] == 1
    assert math.isnan(mcnemar((sizes[0], anchor), (sizes[1] + 9, test))["p"]), "it spends more everywhere"
    for rate, expected in ((9.5, 10), (5.0, 50)):  # both are near: the lower rate; else the nearest
        sizes[1][0] = rate
        sizes[1][1] = 49
        assert mcnemar((sizes[0], anchor), (sizes[1], test))["at_bytes"] == expected
    assert math.isnan(mcnemar((sizes[0][:, :0], anchor[:, :0]), (sizes[1][:, :0], test[:, :0]))["p"]), "no scenes"
