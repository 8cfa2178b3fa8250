"""KL and TV: worked numbers, limits, and DPPO's two-outcome divergences as the case V = 2."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.divergence import kl_divergence, total_variation
from trl_trust.policy.dppo import binary_divergence


def test_worked_numbers():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.0204110, abs=5e-8)
    assert total_variation(p, q).item() == pytest.approx(0.1, abs=1e-12)
    assert math.sqrt(kl_divergence(p, q).item() / 2) == pytest.approx(0.1010223, abs=5e-8)


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0, 20))
def test_pinsker_sign_and_self(seed, V, spread):
    g = torch.Generator().manual_seed(seed)
    p, q = torch.randn(3, V, generator=g) * spread, torch.randn(3, V, generator=g) * spread
    kl, tv = kl_divergence(p, q), total_variation(p, q)
    assert kl.dtype == torch.float64 and kl.shape == tv.shape == (3,)
    assert (kl >= 0).all() and (tv >= 0).all() and (tv <= 1 + 1e-12).all()
    assert (tv <= (kl / 2).sqrt() + 1e-9).all()
    assert (kl_divergence(p, p) == 0).all() and (total_variation(p, p) == 0).all()


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_two_outcomes_are_dppos(pi, mu):
    law = lambda p: torch.tensor([[p, 1 - p]], dtype=torch.float64).log()
    of_token = lambda p: torch.tensor([[p]], dtype=torch.float64).log()
    assert total_variation(law(mu), law(pi)).item() == pytest.approx(
        binary_divergence(of_token(pi), of_token(mu), "tv").item(), abs=1e-12
    )
    # DPPO guards its logarithm by 1e-8
    assert kl_divergence(law(mu), law(pi)).item() == pytest.approx(
        binary_divergence(of_token(pi), of_token(mu), "kl").item(), abs=1e-6
    )


def test_two_outcomes_bound_the_whole_vocabulary_from_below():
    g = torch.Generator().manual_seed(0)
    pi, mu = (torch.randn(50, 30, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    for token in range(30):
        assert (binary_divergence(pi[:, [token]], mu[:, [token]], "tv")[:, 0] <= total_variation(mu, pi) + 1e-12).all()
        assert (binary_divergence(pi[:, [token]], mu[:, [token]], "kl")[:, 0] <= kl_divergence(mu, pi) + 1e-6).all()


def test_tokens_without_probability():
    p = torch.tensor([0.0, -math.inf, 0.0])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p).item() == 0.0
    assert total_variation(p, q).item() == pytest.approx(1 / 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3\) and \(2, 4\)"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
