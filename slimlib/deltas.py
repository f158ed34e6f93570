"""Bjontegaard deltas between curves of accuracy over rate, and when to refuse them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_OVERLAP = 0.3
"""Least share that two curves must have in common, of all that they cover, for a delta."""


class NoOverlap(ValueError):
    """Two curves have too little in common for a mean difference to mean anything."""


@dataclass(frozen=True)
class Delta:
    """A Bjontegaard delta with what it was taken over.

    Attributes:
        value: percent of the anchor's rate (negative: saved), or points of accuracy (positive: gained).
        low, high: the range that both curves cover: of accuracy for a rate, of log2 of the rate for an accuracy.
        overlap: its share of all that either covers.
    """

    value: float
    low: float
    high: float
    overlap: float


Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]
"""Rates and accuracies of a method, in any order."""


def frontier(rates: Sequence[float] | np.ndarray, accuracies: Sequence[float] | np.ndarray) -> np.ndarray:
    """The points that no other point beats, (2, n), rate and accuracy strictly rising: what the deltas are taken of."""
    best: list[tuple[float, float]] = []
    # Of equal rates the most accurate comes first, so that the others fall away.
    for rate, accuracy in sorted(zip(rates, accuracies, strict=True), key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((float(rate), float(accuracy)))
    return np.array(best).T


def bd_rate(anchor: Curve, test: Curve, min_overlap: float = MIN_OVERLAP) -> Delta:
    """Mean difference of rate at equal accuracy, in percent of the anchor's (Bjontegaard, VCEG-M33, 2001).

    Both curves are reduced to their frontier and interpolated by monotone cubics (pchip).

    Raises:
        NoOverlap: they share less than `min_overlap` of the accuracies that either covers, or have under 3 points.
    """
    import bjontegaard

    a, t, low, high, share = _overlap(anchor, test, 1, min_overlap, "accuracies")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns below an overlap of its own choice
        value = bjontegaard.bd_rate(*a, *t, method="pchip", require_matching_points=False, min_overlap=0)
    return Delta(float(value), low, high, share)


def bd_accuracy(anchor: Curve, test: Curve, min_overlap: float = MIN_OVERLAP) -> Delta:
    """Mean difference of accuracy, in points, at equal rate (on a logarithmic axis); otherwise as `bd_rate`."""
    import bjontegaard

    a, t, low, high, share = _overlap(anchor, test, 0, min_overlap, "rates")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = bjontegaard.bd_psnr(*a, *t, method="pchip", require_matching_points=False, min_overlap=0)
    return Delta(float(value), low, high, share)


def _overlap(
    anchor: Curve, test: Curve, axis: int, least: float, what: str
) -> tuple[np.ndarray, np.ndarray, float, float, float]:
    """Both frontiers, and the range of one axis that they share."""
    a, t = frontier(*anchor), frontier(*test)
    if min(a.shape[-1], t.shape[-1]) < 3:
        raise NoOverlap(
            f"a curve needs 3 points that improve on each other; these have {a.shape[-1]} and {t.shape[-1]}"
        )
    u, v = (np.log2(c[0]) if axis == 0 else c[1] for c in (a, t))
    low, high = float(max(u.min(), v.min())), float(min(u.max(), v.max()))
    share = max(0.0, high - low) / float(max(u.max(), v.max()) - min(u.min(), v.min()))
    if share < least:
        (u0, u1), (v0, v1) = ((c[axis].min(), c[axis].max()) for c in (a, t))
        raise NoOverlap(
            f"the anchor covers {what} {u0:.4g} to {u1:.4g}, the other {v0:.4g} to {v1:.4g}: {share:.1%} of the whole "
            f"is common to both, {least:.0%} is needed. A number for the rest would be made up by the polynomial. "
            "Measure more points, so that the curves meet."
        )
    return a, t, low, high, share


def accuracy_at(curve: Curve, rate: float) -> float:
    """Accuracy of a curve's frontier at a rate, linear in the logarithm of the rate; NaN outside of what it covers."""
    rates, accuracies = frontier(*curve)
    if not rates[0] <= rate <= rates[-1]:
        return math.nan
    return float(np.interp(np.log(rate), np.log(rates), accuracies))
