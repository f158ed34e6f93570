"""What can be said about accuracies and rates: intervals, curves, Bjontegaard deltas, and when to refuse these."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bjontegaard
import numpy as np
import pandas as pd
from scipy.stats import binomtest

MIN_OVERLAP = 0.3  # least share that two curves must have in common, of all that they cover, for a delta
ENDS = 0.025, 0.975  # quantiles that bound the middle 95% of all resamples
Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # rates and accuracies, in any order


class NoOverlap(ValueError):
    """Two curves have too little in common for a mean difference to mean anything."""


@dataclass(frozen=True)
class Delta:
    """A Bjontegaard delta with what it was taken over."""

    value: float = math.nan  # percent of the anchor's rate (negative: saved), or points of accuracy (positive: gained)
    low: float = math.nan  # the range that both curves cover: of accuracy for a rate, of log2(rate) for an accuracy
    high: float = math.nan
    overlap: float = math.nan  # its share of all that either covers


def interval(hits: Sequence | np.ndarray, clusters: Sequence | np.ndarray | None = None) -> tuple[float, float]:
    """95% interval of an accuracy, in percent; never of width 0, and NaN where there are no hits or misses to count.

    Hits that are independent have Wilson's interval (1927). Pictures of one object are not: where `clusters` says which
    hits belong together, whole clusters are resampled with replacement (Efron, 1979), and the interval is at least as
    wide as Wilson's. Where all or no hits are right, resampling sees no spread: Wilson's is of the number of clusters.
    """
    hits = np.asarray(hits, float)
    if not (known := np.isfinite(hits)).any():
        return math.nan, math.nan
    values, of = hits[known], (np.arange(len(hits)) if clusters is None else np.asarray(clusters))[known]
    _, members = np.unique(of, return_inverse=True)
    sizes, right = np.bincount(members), np.bincount(members, values)
    share, n = values.mean(), len(values) if 0 < values.mean() < 1 else len(sizes)
    low, high = binomtest(round(share * n), n).proportion_ci(method="wilson")
    if len(sizes) < len(values):
        picks = _resamples(len(sizes))
        ends = np.quantile(picks @ right / (picks @ sizes), ENDS)
        low, high = min(low, ends[0]), max(high, ends[1])
    return 100 * float(low), 100 * float(high)


@functools.lru_cache(4)  # a table asks for the same ones in every row
def _resamples(n: int) -> np.ndarray:
    """How often each of n clusters is drawn in resamples with replacement, (2000, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2_000)


def clusters_of(results: pd.DataFrame) -> pd.Series:
    """What is resampled together, for each row of results by scene: the scenes of a cut-out; else each scene alone."""
    scenes = results["scene"].astype(str)
    return results["cutout"].fillna(scenes) if "cutout" in results else scenes


def frontier(rates: Sequence[float] | np.ndarray, accuracies: Sequence[float] | np.ndarray) -> np.ndarray:
    """The points that no other point beats, (2, n), rate and accuracy strictly rising: what the deltas are taken of.

    Points without a rate or an accuracy (NaN, or a rate of 0) do not count.
    """
    points = np.array([rates, accuracies], float)
    points = points[:, np.isfinite(points).all(0) & (points[0] > 0)]
    points = points[:, np.lexsort((-points[1], points[0]))]  # of equal rates the most accurate first: the others go
    return points[:, np.diff(np.maximum.accumulate(np.r_[-np.inf, points[1]])) > 0]


def accuracy_at(curve: Curve, rate: float) -> float:
    """Accuracy of a curve's frontier at a rate, linear in the logarithm of the rate; NaN outside of what it covers."""
    rates, accuracies = frontier(*curve)
    if not len(rates) or not rates[0] <= rate <= rates[-1]:
        return math.nan
    return float(np.interp(np.log(rate), np.log(rates), accuracies))


def bd_rate(anchor: Curve, test: Curve, min_overlap: float = MIN_OVERLAP) -> Delta:
    """Mean difference of rate at equal accuracy, in percent of the anchor's (Bjontegaard, VCEG-M33, 2001).

    Both curves are reduced to their frontier and interpolated by monotone cubics (pchip). NoOverlap where they share
    less than `min_overlap` of the accuracies that either covers, or have under 3 points.
    """
    return _delta("bd_rate", anchor, test, min_overlap)


def bd_accuracy(anchor: Curve, test: Curve, min_overlap: float = MIN_OVERLAP) -> Delta:
    """Mean difference of accuracy, in points, at equal rate (on a logarithmic axis); otherwise as `bd_rate`."""
    return _delta("bd_psnr", anchor, test, min_overlap)  # the package's name for a gain on the vertical axis


def _delta(function: str, anchor: Curve, test: Curve, min_overlap: float) -> Delta:
    a, t = frontier(*anchor), frontier(*test)
    if min(a.shape[1], t.shape[1]) < 3:
        raise NoOverlap(f"a curve needs 3 points that improve on each other; these have {a.shape[1]} and {t.shape[1]}")
    axis, what = (1, "accuracies") if function == "bd_rate" else (0, "rates")
    u, v = (curve[1] if axis else np.log2(curve[0]) for curve in (a, t))
    low, high = float(max(u.min(), v.min())), float(min(u.max(), v.max()))
    share = max(0.0, high - low) / float(max(u.max(), v.max()) - min(u.min(), v.min()))
    if share < min_overlap:
        (u0, u1), (v0, v1) = ((curve[axis].min(), curve[axis].max()) for curve in (a, t))
        raise NoOverlap(
            f"the anchor covers {what} {u0:.4g} to {u1:.4g}, the other {v0:.4g} to {v1:.4g}: {share:.1%} of the whole "
            f"is common to both, {min_overlap:.0%} is needed. A number for the rest would be made up by the "
            "polynomial. Measure more points, so that the curves meet."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns below an overlap of its own choice
        value = getattr(bjontegaard, function)(*a, *t, method="pchip", require_matching_points=False, min_overlap=0)
    return Delta(float(value), low, high, share)


def compare(anchor: pd.DataFrame, test: pd.DataFrame, machine: str = "b", draws: int = 200) -> dict[str, Any]:
    """Both deltas between two curves, with 95% intervals from a paired bootstrap over the scenes that both have.

    Results are by scene (see `evaluation.evaluate`), each setting is a point of a curve, and `machine` says whose hits
    count. Scenes of one cut-out are resampled together (`clusters_of`); draws in which the curves do not overlap enough
    are left out.

    Returns:
        scenes; bd_rate in percent, bd_rate_low, bd_rate_high; from_accuracy, to_accuracy, overlap, the range it was
        taken over and its share of the whole; lost_draws, those left out for bd_rate; bd_accuracy in points,
        bd_accuracy_low, bd_accuracy_high; what `mcnemar` says; refused, the reason why a delta is missing (NaN), or "".
    """
    hits = f"top1_{machine}"
    sides = [side.pivot(index=["method", "variant", "quality"], columns="scene") for side in (anchor, test)]
    scenes = sorted(set.intersection(*(set(side[hits].dropna(axis=1)) for side in sides)))
    points = [(side["size"][scenes].to_numpy(float), 100 * side[hits][scenes].to_numpy(float)) for side in sides]
    rng, refused = np.random.default_rng(0), "" if scenes else "no scene is common to both"
    side = max(anchor, test, key=lambda rows: "cutout" in rows)
    cluster = dict(zip(side["scene"], clusters_of(side), strict=True))
    codes, names = pd.factorize(np.array([cluster[scene] for scene in scenes], object))
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    turns = [rng.integers(len(members), size=len(members)) for _ in range(draws)] if scenes else []
    picks = [np.arange(len(scenes)), *(np.concatenate([members[code] for code in turn]) for turn in turns)]
    found: dict[str, Any] = {"scenes": len(scenes)}
    for name, function in (("bd_rate", bd_rate), ("bd_accuracy", bd_accuracy)):
        deltas: list[Delta] = []
        for pick in picks if scenes else ():
            try:
                one, other = ((size[:, pick].mean(1), right[:, pick].mean(1)) for size, right in points)
                deltas.append(function(one, other))
            except NoOverlap as error:
                if not deltas:  # the scenes as they are
                    refused = str(error)
                    break
        whole, *others = deltas or [Delta()]
        low, high = np.quantile([delta.value for delta in others] or [math.nan], ENDS)
        found |= {name: whole.value, f"{name}_low": float(low), f"{name}_high": float(high)}
        if name == "bd_rate":
            found |= {"from_accuracy": whole.low, "to_accuracy": whole.high, "overlap": whole.overlap}
            found["lost_draws"] = draws - len(others)
    return found | mcnemar(*points) | {"refused": refused}


def mcnemar(anchor: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """The paired test at a fixed rate (McNemar, 1947, exact): do the two methods fail on the same pictures?

    Compared is the pair of settings of the lowest rate in which `test` spends 90 to 100% of `anchor`'s bytes, or the
    nearest below. Both are (sizes, hits), (settings, scenes). Returns at_bytes, the mean size of the anchor's files;
    won, lost, the scenes that `test` alone gets right, or wrong; and p, too small where many scenes show one object.
    """
    sizes, others = anchor[0].sum(1), test[0].sum(1)  # of the same scenes
    less = {(i, j): 1 - b / a for i, a in enumerate(sizes) for j, b in enumerate(others) if 0 < b <= a}
    if not less:
        return dict.fromkeys(("at_bytes", "won", "lost", "p"), math.nan)
    one, other = min(less, key=lambda pair: (max(less[pair], 0.1), sizes[pair[0]]))
    change = np.sign(test[1][other] - anchor[1][one])
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    p = binomtest(won, won + lost).pvalue if won + lost else 1.0
    return {"at_bytes": float(anchor[0][one].mean()), "won": won, "lost": lost, "p": float(p)}
