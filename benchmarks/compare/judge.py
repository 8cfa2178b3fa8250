"""How runs are judged: the rules of README.md as functions. No torch, no files."""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median

import numpy as np
from scipy import stats


ALPHA = 0.025  # of each of two looks
CONFIDENCE = 1 - ALPHA
MARGIN = 0.03
TARGET = 0.5


def interval(differences: Sequence[float], n_resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """BCa bootstrap interval of the mean at `CONFIDENCE`; the value itself where all are equal; NaN below two."""
    d = np.asarray(differences, dtype=float)  # (n,)
    if len(d) < 2:
        return math.nan, math.nan
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    ask = dict(confidence_level=CONFIDENCE, n_resamples=n_resamples, rng=np.random.default_rng(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two values can leave BCa without an acceleration
        found = stats.bootstrap((d,), np.mean, method="BCa", **ask).confidence_interval
    if not np.isfinite([found.low, found.high]).all():
        found = stats.bootstrap((d,), np.mean, method="percentile", **ask).confidence_interval
    return float(found.low), float(found.high)


def sign_flip(differences: Sequence[float]) -> float:
    """Exact two-sided p of the mean under all 2^n flips of signs, by sums of halves; n up to some 40."""
    d = np.asarray(differences, dtype=float)  # (n,)
    sums = lambda part: np.array([np.dot(signs, part) for signs in product((-1, 1), repeat=len(part))])
    first, second = sums(d[: len(d) // 2]), np.sort(sums(d[len(d) // 2 :]))
    observed = abs(d.sum()) - 1e-9  # flips that give the same sum count, whatever the order of its terms
    above = len(second) - np.searchsorted(second, observed - first, side="left")
    below = np.searchsorted(second, -observed - first, side="right")
    return float(min(len(first) * len(second), (above + below).sum()) / (len(first) * len(second)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6 (1979), 65)."""
    adjusted, largest = {}, 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def verdict(mean: float, low: float, high: float, p: float) -> str:
    """Rule 5. `p` is adjusted."""
    if p <= ALPHA:
        return "better" if mean > 0 else "worse"
    return "equivalent" if low >= -MARGIN and high <= MARGIN else "undecided"


def compare(
    runs: Mapping[str, Mapping[int, float]], reference: Mapping[int, float], whole: int
) -> dict[str, dict[str, float | str]]:
    """Judge entries against the reference, paired by start.

    Args:
        runs: Score by start, for every entry but the reference.
        reference: Score by start of the reference.
        whole: Pairs below which an entry is not judged.

    Returns:
        `n`, `mean`, `low`, `high` for every entry with a pair; `p` (adjusted over the judged) and `verdict` for those
        with at least `whole`.
    """
    found, p_values = {}, {}
    for name, scores in runs.items():
        differences = [scores[start] - reference[start] for start in sorted(set(scores) & set(reference))]
        if not differences:
            continue
        low, high = interval(differences)
        found[name] = {"n": len(differences), "mean": float(np.mean(differences)), "low": low, "high": high}
        if len(differences) >= whole:
            p_values[name] = sign_flip(differences)
    for name, p in holm(p_values).items():
        row = found[name]
        row |= {"p": p, "verdict": verdict(row["mean"], row["low"], row["high"], p)}
    return found


def interquartile_mean(scores, axis: int = -1):
    """Mean of the middle half of scores (..., n)."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def stratified_interval(
    strata: Sequence[Sequence[float]], statistic, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval, at `CONFIDENCE`, of a statistic of all values, each stratum resampled in itself.

    Args:
        strata: the values of each, a regime's scores by start.
        statistic: of an array (n_resamples, n) along `axis=1`.
    """
    rng = np.random.default_rng(seed)
    draw = lambda values: np.asarray(values, dtype=float)[rng.integers(len(values), size=(n_resamples, len(values)))]
    found = statistic(np.concatenate([draw(values) for values in strata], axis=1), axis=1)  # (n_resamples,)
    low, high = np.quantile(found, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def wins(scores: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """By start: 1 where the score is above the reference's, 1/2 where they are equal, else 0."""
    return [(np.sign(scores[s] - reference[s]) + 1) / 2 for s in sorted(set(scores) & set(reference))]


def collapsed(record: Mapping) -> bool:
    """Rule 7."""
    if "error" in record or not record["checkpoints"]:
        return True
    start, last = record["start_metrics"], record["checkpoints"][-1]
    best = max(start["pass@1"], *(c["pass@1"] for c in record["checkpoints"]))
    spent = last["entropy"] is not None and last["entropy"] < 0.005 and last["pass@8"] < start["pass@8"]
    return last["pass@1"] < best / 2 or spent


def generations_to_target(records: Sequence[Mapping]) -> float:
    """Median over runs of the first checkpoint at `TARGET`; infinite where half of them or more do not get there."""
    first = [
        next((c["generation"] for c in r["checkpoints"] if c["pass@1"] >= TARGET), math.inf)
        for r in records
        if "error" not in r
    ] + [math.inf for r in records if "error" in r]
    return median(first) if first else math.inf


def window(scores: Mapping[float, float]) -> tuple[float, float, float]:
    """Best mean score, mean over the rates, and the largest rate at which the score is at least 90 % of the best."""
    best = max(scores.values())
    return best, sum(scores.values()) / len(scores), max(r for r, s in scores.items() if s >= 0.9 * best)
