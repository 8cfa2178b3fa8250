"""Statistics against the worked numbers, against scipy, and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from trl_trust.evaluation.stats import bootstrap, newcombe, newcombe_paired, sign_test, wilson, z_value


@pytest.mark.parametrize(
    "k, n, low, high",
    [
        (28, 32, 0.7193, 0.9503),
        (32, 32, 0.8928, 1),
        (0, 32, 0, 0.1072),
        (16, 32, 0.3363, 0.6637),
        (30, 64, 0.3518, 0.5893),
        (0, 5, 0, 0.4345),
    ],
)
def test_wilson_worked_numbers(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_z_is_the_normal_quantile():
    assert z_value(0.95) == pytest.approx(1.959964, abs=5e-7)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_is_scipys(kn, confidence):
    k, n = kn
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert wilson(k, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("n, mean, least", [(32, 0.9527, 0.9204), (64, 0.9510, 0.9300), (128, 0.9507, 0.9335)])
def test_wilson_coverage(n, mean, least):
    k = np.arange(n + 1)
    limits = np.array([wilson(int(x), n) for x in k])  # (n + 1, 2)
    p = np.linspace(0.05, 0.95, 901)[:, None]
    covered = ((limits[:, 0] <= p) & (p <= limits[:, 1])) * binom.pmf(k, n, p)
    coverage = covered.sum(1)
    assert coverage.mean() == pytest.approx(mean, abs=5e-4)
    assert coverage.min() == pytest.approx(least, abs=2e-3)


def test_wilson_without_items_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes=3 must be in"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="confidence=1"):
        wilson(1, 2, confidence=1)


def test_newcombe_is_the_published_example():
    # Newcombe 1998a, example (a): 56/70 - 48/80, method 10
    assert newcombe(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_newcombe_paired_is_the_published_example():
    # Newcombe 1998b, table II, example (a): 36, 12, 2, 0 of 50 pairs, method 10
    assert newcombe_paired(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


@given(*[st.integers(0, 60)] * 4)
def test_newcombe_paired_is_antisymmetric_and_holds_the_estimate(both, gained, lost, neither):
    low, high = newcombe_paired(both, gained, lost, neither)
    other_low, other_high = newcombe_paired(both, lost, gained, neither)
    assert (low, high) == pytest.approx((-other_high, -other_low), abs=1e-12)
    n = max(1, both + gained + lost + neither)
    assert -1 <= low <= (gained - lost) / n <= high <= 1


def test_sign_test_worked_number():
    assert sign_test(6, 1) == 0.0625
    assert sign_test(0, 0) == 1.0
    assert sign_test(0, 5) == 1.0
    with pytest.raises(ValueError, match="losses=-1"):
        sign_test(-1, 2)


def test_bootstrap_is_repeatable_and_covers():
    rng = np.random.default_rng(0)
    sample = rng.exponential(size=60)
    assert bootstrap(sample, seed=3) == bootstrap(sample, seed=3) != bootstrap(sample, seed=4)
    hits = 0
    for _ in range(120):
        low, high = bootstrap(rng.normal(size=50), n_resamples=300)
        hits += low <= 0 <= high
    assert 105 <= hits <= 119  # .95 of 120 is 114; a percentile interval at n 50 covers a little less


def test_bootstrap_of_a_constant_and_of_nothing():
    assert bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="finite values"):
        bootstrap([])
    with pytest.raises(ValueError, match="finite values"):
        bootstrap([1.0, float("inf")])
