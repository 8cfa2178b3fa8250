"""The adversary over groups: the specification's worked numbers, its closed form, and its limits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.robust.weights import group_means, raise_groups, row_weights, shortfall, variant_chances


HALVES = torch.tensor([0.5, 0.5], dtype=torch.float64)


def float64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def near(got, *wanted, atol=1e-12):
    torch.testing.assert_close(got, float64(*wanted), rtol=0, atol=atol)


def test_worked_step():
    losses = shortfall(float64(0.9, 0.4))
    near(losses, 0.1, 0.6)
    q = raise_groups(HALVES, losses, eta=0.1)
    a, b = 0.5 * math.exp(0.01), 0.5 * math.exp(0.06)
    assert (round(a, 6), round(b, 6)) == (0.505025, 0.530918)
    near(q, a / (a + b), b / (a + b))
    near(q, 0.4875, 0.5125, atol=5e-5)
    weights = row_weights(float64(0.4875, 0.5125), torch.tensor([0, 0, 1, 0]))
    near(weights, 0.65, 0.65, 2.05, 0.65)


def test_ten_steps_are_the_closed_form():
    q = HALVES
    for _ in range(10):
        q = raise_groups(q, float64(0.1, 0.6), eta=0.1)
    near(q, 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)))
    near(q, 0.37754, 0.62246, atol=5e-6)


def test_a_group_that_was_not_seen_is_not_raised():
    q = raise_groups(float64(0.2, 0.3, 0.5), float64(0.4, math.nan, 0.8), eta=0.5)
    grown = float64(0.2 * math.exp(0.2), 0.3, 0.5 * math.exp(0.4))
    torch.testing.assert_close(q, grown / grown.sum())


def test_an_infinite_loss_leaves_q_finite():
    near(raise_groups(HALVES, float64(math.inf, math.nan), eta=0.1), 0.5, 0.5)


def test_no_loss_is_too_large_and_no_share_dies():
    q = HALVES
    for _ in range(5):
        q = raise_groups(q, float64(0.0, 1e4), eta=1.0)
    assert q[0] > 0 and q[1] == 1
    weights = row_weights(q, torch.tensor([0, 0]))  # a batch of nothing but the dead group
    assert weights.tolist() == [1, 1]


def test_the_floor_holds_at_any_size_of_the_losses():
    q = HALVES
    for _ in range(1000):
        q = raise_groups(q, float64(0.0, 5.0), eta=1.0, q_min=0.1)
    assert 0.1 / 1.2 <= q[0] <= 0.1
    shifted = raise_groups(q, float64(50.0, 55.0), eta=1.0, q_min=0.1)  # the same difference
    torch.testing.assert_close(shifted, raise_groups(q, float64(0.0, 5.0), eta=1.0, q_min=0.1))
    near(raise_groups(HALVES, float64(7.0, 7.0), eta=1.0, q_min=0.4), 0.5, 0.5)


def test_means_leave_out_what_is_not_finite():
    values = torch.tensor([1.0, math.nan, 3.0, math.inf, 2.0])
    means, counts = group_means(values, torch.tensor([0, 0, 0, 1, 2]), num_groups=4)
    near(counts, 2, 0, 1, 0)
    assert means[0] == 2 and means[2] == 2 and means[[1, 3]].isnan().all()


def test_rewards_outside_their_range_are_clipped():
    near(shortfall(float64(-3, 0, 1, 5), (-1, 1)), 1, 0.5, 0, 0)
    with pytest.raises(ValueError, match=r"reward_range must be two finite numbers.* got \(1.0, 1.0\)"):
        shortfall(HALVES, (1.0, 1.0))


def test_plain_weighting_leaves_the_frequency_out():
    groups = torch.tensor([0, 0, 0, 1])
    near(row_weights(HALVES, groups, "plain"), 1, 1, 1, 1)
    near(row_weights(HALVES, groups), 2 / 3, 2 / 3, 2 / 3, 2)


def test_a_rare_group_is_cut():
    groups = torch.tensor([0] * 99 + [1])
    assert row_weights(HALVES, groups, max_weight=math.inf)[-1] == pytest.approx(50)
    cut = row_weights(HALVES, groups, max_weight=10)
    rest = 50 / 99  # what the other rows weigh before the second scaling
    assert cut[-1] == pytest.approx(10 / (0.01 * 10 + 0.99 * rest))


@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.sampled_from(["frequency", "plain"]),
    st.floats(1, 100),
)
def test_the_mean_weight_is_one(q, groups, weighting, max_weight):
    q, groups = float64(*q), torch.tensor(groups) % len(q)
    weights = row_weights(q / q.sum(), groups, weighting, max_weight)
    assert weights.shape == groups.shape and (weights > 0).all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-9)
    if len(groups.unique()) == 1:
        assert (weights == 1).all()  # to the bit: one group is the host


@given(st.lists(st.floats(0, 30), min_size=1, max_size=6), st.floats(0, 5))
def test_q_stays_a_distribution_that_follows_the_losses(losses, eta):
    losses = float64(*losses)
    q = raise_groups(torch.full_like(losses, 1 / len(losses)), losses, eta)
    assert q.sum().item() == pytest.approx(1, abs=1e-9) and (q > 0).all()
    order = torch.argsort(losses)
    assert (q[order].diff() >= -1e-15).all()
    assert len(losses) > 1 or q.item() == 1


def test_no_step_is_the_same_q_to_the_bit():
    q = float64(0.3, 0.2, 0.5)
    assert torch.equal(raise_groups(q, float64(1, 2, 3), eta=0), q)


def test_worked_chances_of_variants():
    near(variant_chances(float64(0.1, 0.4, 0.5, 0), 0.05), 0.125, 0.375, 0.55 / 1.2, 0.05 / 1.2)
