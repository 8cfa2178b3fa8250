"""The statistics of a report: intervals of proportions and means, and tests of a change. No torch.

Sources: E. B. Wilson, JASA 22 (1927), 209; R. G. Newcombe, Statistics in Medicine 17 (1998), 873 (method 10 for two
samples) and 2635 (method 10 for pairs); for the square-and-add rule on other intervals, G. Y. Zou and A. Donner,
Statistics in Medicine 27 (2008), 1693. The exact test and the bootstrap are scipy's.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist


def z_value(confidence: float = 0.95) -> float:
    """Two-sided normal quantile, 1.959964 for .95. Raises ValueError for a `confidence` outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be in (0, 1), such as 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (0, 1) where n is 0.

    Raises:
        ValueError: if `successes` is not in [0, n].
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes} must be in [0, n], and n is {n}")
    if n == 0:
        return 0.0, 1.0
    z2 = z_value(confidence) ** 2
    p = successes / n
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends the interval touches 0 and 1 exactly, which rounding would miss
    return (0.0 if successes == 0 else max(0.0, center - half)), (1.0 if successes == n else min(1.0, center + half))


def square_and_add(
    a: float, a_limits: tuple[float, float], b: float, b_limits: tuple[float, float], correlation: float = 0.0
) -> tuple[float, float]:
    """Interval of `a - b` from an interval of each (at the same confidence), which need not be symmetric."""
    a_down, a_up = a - a_limits[0], a_limits[1] - a
    b_down, b_up = b - b_limits[0], b_limits[1] - b
    low = a_down**2 - 2 * correlation * a_down * b_up + b_up**2
    high = a_up**2 - 2 * correlation * a_up * b_down + b_down**2
    return a - b - math.sqrt(max(0.0, low)), a - b + math.sqrt(max(0.0, high))


def newcombe(
    successes: float, n: int, other_successes: float, other_n: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of `successes / n - other_successes / other_n`, two independent samples (Newcombe's method 10).

    A one-sided limit at level L is the one of a two-sided interval at `confidence = 2 L - 1`.
    """
    if n == 0 or other_n == 0:
        return -1.0, 1.0
    return square_and_add(
        successes / n,
        wilson(successes, n, confidence),
        other_successes / other_n,
        wilson(other_successes, other_n, confidence),
    )


def newcombe_paired(both: int, gained: int, lost: int, neither: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of `(gained - lost) / n` where the same n items were asked twice (Newcombe 1998b, method 10).

    Args:
        both, neither: items that passed both times, or failed both times.
        gained, lost: items that passed only the second time, or only the first time.
    """
    n = both + gained + lost + neither
    if n == 0:
        return -1.0, 1.0
    after, before = both + gained, both + lost
    margins = after * before * (n - after) * (n - before)
    covariance = both * neither - gained * lost
    if covariance > 0:  # the method's continuity correction
        covariance = max(covariance - n / 2, 0)
    correlation = covariance / math.sqrt(margins) if margins else 0.0
    low, high = square_and_add(
        after / n, wilson(after, n, confidence), before / n, wilson(before, n, confidence), correlation
    )
    return max(-1.0, low), min(1.0, high)


def sign_test(losses: int, gains: int) -> float:
    """Exact one-sided p-value of a loss: P(X >= losses) with X ~ Binomial(losses + gains, 1/2)."""
    from scipy.stats import binomtest

    if losses < 0 or gains < 0:
        raise ValueError(f"losses={losses} and gains={gains} must be counts")
    return float(binomtest(losses, losses + gains, 0.5, alternative="greater").pvalue) if losses + gains else 1.0


def bootstrap(
    values: Sequence[float], confidence: float = 0.95, *, statistic=None, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `statistic(values, axis=...)`, the mean by default. Same seed, same interval.

    For a paired change, give it the differences. Raises ValueError for an empty or a non-finite sample.
    """
    import numpy as np
    from scipy import stats

    sample = np.asarray(values, dtype=float)  # (n,)
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"a bootstrap needs finite values and at least one, not {sample.size} of which some are not")
    statistic = np.mean if statistic is None else statistic
    if sample.size == 1 or (sample == sample[0]).all():
        value = float(statistic(sample, axis=-1))
        return value, value
    interval = stats.bootstrap(
        (sample,),
        statistic,
        confidence_level=confidence,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
