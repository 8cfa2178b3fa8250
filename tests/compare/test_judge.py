"""The comparison's statistics, against scipy and by hand."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "compare"))

import judge


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=9))
def test_sign_flip_is_scipys_exact_test(differences):
    expected = stats.permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert judge.sign_flip(differences) == pytest.approx(expected.pvalue, abs=1e-12)


def test_sign_flip_by_hand_and_at_sizes_that_no_enumeration_takes():
    assert judge.sign_flip([1, 2, 3]) == 2 / 8  # all or none flipped
    assert judge.sign_flip([1, 1, -1]) == 1.0
    assert judge.sign_flip([0.1] * 12) == 2 / 2**12
    assert judge.sign_flip([0.1] * 24) == 2 / 2**24


def test_holm():
    adjusted = judge.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert judge.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_interval_covers_and_takes_what_bca_cannot():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = judge.interval(rng.normal(0.1, 0.05, 12), n_resamples=999)
        assert low < high
        hits += low <= 0.1 <= high
    assert hits >= 52
    assert judge.interval([0.2, 0.2, 0.2]) == (0.2, 0.2)
    low, high = judge.interval([0.1, 0.3])
    assert 0.1 <= low <= high <= 0.3
    assert all(map(math.isnan, judge.interval([0.1])))


@pytest.mark.parametrize(
    "mean, low, high, p, expected",
    [
        (0.05, 0.02, 0.08, 0.01, "better"),
        (-0.01, -0.02, -0.005, 0.025, "worse"),  # judged before equivalence, however small
        (0.01, -0.01, 0.03, 0.3, "equivalent"),
        (0.01, -0.031, 0.03, 0.3, "undecided"),
        (0.05, 0.001, 0.1, 0.026, "undecided"),
    ],
)
def test_verdicts(mean, low, high, p, expected):
    assert judge.verdict(mean, low, high, p) == expected


def test_pairs_are_starts_and_few_of_them_are_not_judged():
    reference = {s: 0.5 + s / 100 for s in range(12)}
    shifted = {s: score - 0.2 - 0.001 * (s % 3) for s, score in reference.items()}
    found = judge.compare({"worse": shifted, "few": {3: 0.9, 99: 0.1}, "none": {99: 1.0}}, reference, whole=12)
    assert found["worse"]["verdict"] == "worse"
    assert found["worse"]["mean"] == pytest.approx(-0.201)
    assert found["worse"]["p"] == 2 / 2**12  # Holm over the judged ones: one
    assert found["few"]["n"] == 1
    assert "verdict" not in found["few"]
    assert "none" not in found


def record(scores, entropy=0.1, start=0.3, **more):
    checkpoints = [
        {"generation": 2 * i + 2, "pass@1": s, "pass@8": 0.8, "entropy": entropy} for i, s in enumerate(scores)
    ]
    return {"start_metrics": {"pass@1": start, "pass@8": 0.82}, "checkpoints": checkpoints, **more}


def test_collapse():
    assert not judge.collapsed(record([0.4, 0.5, 0.3]))
    assert judge.collapsed(record([0.4, 0.5, 0.2]))
    assert judge.collapsed(record([0.1, 0.1]))  # against the start
    assert judge.collapsed(record([0.4, 0.5], entropy=0.004))
    assert not judge.collapsed(record([0.4, 0.5], entropy=0.004) | {"start_metrics": {"pass@1": 0.3, "pass@8": 0.7}})
    assert judge.collapsed(record([0.4, 0.5], error="RuntimeError: NaN"))
    assert judge.collapsed(record([]))


def test_generations_to_the_target_are_censored():
    runs = [record([0.4, 0.5]), record([0.6, 0.4]), record([0.1, 0.1])]
    assert judge.generations_to_target(runs) == 4
    assert judge.generations_to_target([*runs, record([], error="x")]) == math.inf


def test_window():
    assert judge.window({1e-4: 0.6, 1e-3: 0.55, 3e-3: 0.0}) == (0.6, pytest.approx(1.15 / 3), 1e-3)


def test_the_middle_half_and_its_interval_by_strata():
    assert judge.interquartile_mean([7, 0, 1, 2, 3, 4, 5, 100]) == 3.5
    # resampled within each, a stratum of equals does not move; over all six the interval would be [0, 1]
    assert judge.stratified_interval([[1, 1, 1], [0, 0, 0]], np.mean) == (0.5, 0.5)
    low, high = judge.stratified_interval([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], judge.interquartile_mean)
    assert 0.25 < low < 0.45 < high < 0.65
    assert judge.wins({0: 0.5, 1: 0.5, 2: 0.4, 9: 1.0}, {0: 0.4, 1: 0.5, 2: 0.5}) == [1, 0.5, 0]
