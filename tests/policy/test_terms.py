"""The pieces that several policy terms are made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.policy.terms import (
    LOG_RATIO_LIMIT,
    PolicyBatch,
    beyond,
    clipped_surrogate,
    importance_ratio,
    k3,
)


def test_k3_is_the_divergence_in_expectation():
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    new = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()
    estimate = (old.exp() * k3(new - old)).sum()
    torch.testing.assert_close(estimate, (old.exp() * (old - new)).sum())


def test_the_ratio_is_capped_without_a_gradient():
    logps = torch.tensor([0.5, 100.0, -100.0], dtype=torch.float64, requires_grad=True)
    ratio = importance_ratio(logps, torch.zeros_like(logps))
    limit = torch.tensor(LOG_RATIO_LIMIT, dtype=torch.float64)
    torch.testing.assert_close(ratio, torch.stack([logps[0].exp(), limit.exp(), (-limit).exp()]))
    (gradient,) = torch.autograd.grad(ratio.sum(), logps)
    assert gradient[0] != 0 and gradient[1:].eq(0).all()


@given(st.floats(0.2, 3.0), st.sampled_from([-1.0, 1.0]))
def test_beyond_is_where_the_surrogate_has_no_gradient(r, a):
    ratio = torch.tensor([[r]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[a]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(clipped_surrogate(ratio, advantages, 0.2, 0.3).sum(), ratio)
    assert beyond(ratio, advantages, 0.2, 0.3).item() == (gradient.item() == 0)


@pytest.mark.parametrize(
    "name, shape",
    [("old_logps", (2, 4)), ("mask", (3,)), ("advantages", (2,)), ("rewards", (2, 1)), ("group", (3,))],
)
def test_a_wrong_shape_is_named_at_the_door(name, shape):
    good = {"logps": torch.zeros(2, 3), "old_logps": torch.zeros(2, 3), "mask": torch.ones(2, 3)}
    good |= {"advantages": torch.zeros(2, 1), "rewards": torch.zeros(2), "group": torch.zeros(2)}
    PolicyBatch(**good)
    with pytest.raises(ValueError, match=rf"^{name} has shape .*expected"):
        PolicyBatch(**good | {name: torch.zeros(shape)})
