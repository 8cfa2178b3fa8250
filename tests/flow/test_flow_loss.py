"""The loss, its weights and advantages, in float64; and the policy gradient against an exact one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.flow.rollouts import group_advantages, roll_out, row_noise, step_table, stream
from trl_trust.flow.sage import KLWeight, StepBatch, sage_loss
from trl_trust.flow.steps import SDE_TYPES, log_prob


f64 = lambda x: torch.tensor(x, dtype=torch.float64)


def batch(ratio, advantage, scale=1.0, kl_pos=None, kl_vel=None) -> StepBatch:
    column = lambda x: f64(x).reshape(-1, 1)
    logps = column(ratio).log().requires_grad_()
    kls = [None if kl is None else column(kl) for kl in (kl_pos, kl_vel)]
    return StepBatch(logps, torch.zeros_like(logps), column(advantage), column(scale), *kls)


@pytest.mark.parametrize(
    ("advantage", "ratio", "worked", "moves"),
    [(1, 1.0002, -1.0001, False), (-1, 0.9997, 0.9999, False), (1, 0.9997, -0.9997, True), (-1, 1.0002, 1.0002, True)],
)
def test_worked_clip(advantage, ratio, worked, moves):
    step = batch(ratio, float(advantage), scale=1.0)
    out = sage_loss(step)
    assert out.per_token_loss.item() == pytest.approx(worked, abs=1e-12)
    (grad,) = torch.autograd.grad(out.per_token_loss.sum(), step.logps)
    assert (grad.item() != 0) == moves
    assert out.metrics["sage/clip_ratio"].item() == float(not moves)


def test_the_equalizer_scales_the_policy_term_and_not_the_kl():
    kwargs = dict(kl_pos=[2.0], kl_vel=[3.0])
    loss = lambda scale: sage_loss(batch([1.0], [1.5], scale, **kwargs), 0.1).per_token_loss.item()
    assert loss(1.0) == pytest.approx(-1.5 + 0.1 * (2.0 + 0.1 * 3.0))
    assert loss(4.0) == pytest.approx(-6.0 + 0.1 * (2.0 + 0.1 * 3.0))


def test_without_scale_and_kl_it_is_flow_grpo():
    g = torch.Generator().manual_seed(0)
    ratio, advantage = torch.rand(50, generator=g).double() + 0.5, torch.randn(50, generator=g).double()
    ours = sage_loss(batch(ratio.tolist(), advantage.tolist(), [1.0] * 50), 0.0, epsilon=0.2).per_token_loss.squeeze()
    theirs = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_policy_that_ran_away_stays_finite():
    step = batch([1.0], [-1.0])
    away = StepBatch(step.logps + 500.0, step.old_logps, step.advantages, step.step_scale)
    loss = sage_loss(away).per_token_loss
    assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), step.logps)[0].isfinite().all()


# -- lambda ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "controller"])
def test_fifty_calls_of_the_ramp(schedule):
    weight = KLWeight(schedule, 1e-5, 1e-7, 100)
    for _ in range(50):
        weight.update(1.0)
    assert weight.value == pytest.approx(5.05e-6, rel=1e-12)
    for _ in range(50):
        weight.update(1.0)
    assert weight.value == pytest.approx(1e-5, rel=1e-12)


def test_the_controller_lowers_the_weight_where_the_kl_is_high():
    weight = KLWeight("controller", 1e-2, 1e-4, 1)
    weight.update(0.0)
    start = weight.value
    assert weight.update(1.0) == pytest.approx(0.9 * start)
    for _ in range(200):
        weight.update(1.0)
    assert weight.value == 1e-4  # clamped
    for _ in range(15):
        weight.update(0.0)
    assert 1e-4 < weight.value < 1e-2  # the window of ten has to empty first
    again = KLWeight("controller", 1e-2, 1e-4, 1)
    again.load_state_dict(weight.state_dict())
    assert again.update(0.0) == weight.update(0.0)


def test_constant_weight():
    weight = KLWeight("constant", 0.3, 0.0, 5)
    assert [weight.value, weight.update(9.0)] == [0.3, 0.3]


# -- advantages ------------------------------------------------------------------------------------------------------


def test_worked_advantages():
    rewards = f64([0.0, 1.0])
    assert group_advantages(rewards, 2).tolist() == pytest.approx([-1, 1])
    assert group_advantages(rewards, 2, "group_trl").tolist() == pytest.approx([-0.70701, 0.70701], abs=5e-6)
    assert group_advantages(rewards, 2, "none").tolist() == [-0.5, 0.5]
    assert group_advantages(f64([0.0, 1.0, 2.0, 5.0]), 2, "batch").tolist() == pytest.approx(
        [x / f64([0.0, 1.0, 2.0, 5.0]).std(correction=0).item() for x in (-0.5, 0.5, -1.5, 1.5)]
    )
    assert group_advantages(f64([0.0] * 99 + [1.0]), 100, adv_clip=5.0).max().item() == 5.0


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=8, max_size=8),
    st.sampled_from(["group", "group_trl", "batch", "none"]),
)
def test_advantages_are_finite_centered_and_zero_without_a_reward(values, how):
    rewards = f64(values)
    found = group_advantages(rewards, 4, how)
    assert found.isfinite().all() and (found[rewards.isnan()] == 0).all()
    scale = found.abs().max().clamp(min=1.0)
    assert (found.view(2, 4).sum(1).abs() <= 1e-6 * scale).all()


@given(st.floats(-1e3, 1e3), st.sampled_from(["group", "group_trl", "batch", "none"]))
def test_equal_rewards_give_exactly_nothing(value, how):
    assert group_advantages(f64([value] * 3 + [0.0, 1.0, 2.0]), 3, how)[:3].tolist() == [0.0] * 3


# -- streams of noise ------------------------------------------------------------------------------------------------


def test_noise_depends_on_the_row_and_not_on_the_process():
    whole = row_noise((2, 3), 7, 1, range(6), 0)
    torch.testing.assert_close(whole[4:], row_noise((2, 3), 7, 1, [4, 5], 0), rtol=0, atol=0)
    keys = [(a, b, c, d) for a in (0, 1) for b in range(3) for c in range(8) for d in (-4, -1, 0, 1)]
    assert len({stream(*key) for key in keys}) == len(keys)


# -- the grid --------------------------------------------------------------------------------------------------------


def test_first_step():
    sigma = lambda **kw: step_table(4, 1.0, 0.7, **kw).variances[0].sqrt().item()
    assert sigma() == pytest.approx(1.4299, abs=6e-5)
    assert sigma(first_step="flow_cap") == pytest.approx(0.7, abs=1e-12)
    assert sigma(first_step="ode") == 0.0
    assert step_table(4, 1.0, 0.7, first_step="ode", deterministic_steps=[2]).random == (1, 3)
    assert step_table(4, 1.0, 0.7, "cps").random == (0, 1, 2)


def test_a_grid_that_the_clamp_swallows_is_refused():
    with pytest.raises(ValueError, match=r"sigma_clamp=0.003: the grid of num_inference_steps=100 and shift=5 "):
        step_table(100, 5.0, 0.5)
    assert (step_table(100, 5.0, 0.5, sigma_clamp=1e-3).variances > 0).all()
    with pytest.raises(ValueError, match="every step is deterministic"):
        step_table(2, 1.0, 0.5, deterministic_steps=[0, 1])


# -- the policy gradient ---------------------------------------------------------------------------------------------
# A flow in the plane whose velocity is affine in x, with parameters theta: v = a x + b + theta[0:2] + theta[2] x.
# Every rule's chain is then Gaussian, and the expected reward, quadratic in its end, has a closed form.

T, ETA = 5, 0.6
MEAN = f64([1.0, -0.5])


def affine_velocity(x, steps, theta, sigmas):
    s = sigmas[steps].unsqueeze(1)
    before = (1 - s) ** 2 * 0.25 + s**2  # data N(MEAN, .25): the exact velocity
    slope = (s - (1 - s) * 0.25) / before
    return slope * (x - (1 - s) * MEAN) - MEAN + theta[:2] + theta[2] * x


def expected_reward(theta, table, held=()):
    """E[-(x0 - 1.2)_1^2 + .5 x0_2] by propagating mean and variance; steps in `held` stay at theta = 0."""
    mean, spread = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for i in range(len(table)):
        th = torch.zeros_like(theta) if i in held else theta
        steps = torch.full((2,), i)
        ends = torch.stack([mean, mean + 1.0])
        mu, sigma = table.mean(affine_velocity(ends, steps, th, table.sigmas), ends, steps)
        mean, slope = mu[0], mu[1] - mu[0]  # each coordinate is on its own
        spread = slope**2 * spread + sigma[0]
    return -((mean[0] - 1.2) ** 2) - spread[0] + 0.5 * mean[1]


@pytest.mark.parametrize("rule", SDE_TYPES)
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(rule, capsys):
    table = step_table(T, 1.5, ETA, rule, grad_equalizer=False)
    held = tuple(set(range(T)) - set(table.random))
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(expected_reward(zero, table, held), zero)
    shift = lambda i, h: expected_reward(h * torch.eye(3, dtype=torch.float64)[i], table, held)
    differences = torch.stack([(shift(i, 1e-5) - shift(i, -1e-5)) / 2e-5 for i in range(3)])
    torch.testing.assert_close(exact, differences, rtol=1e-6, atol=1e-8)

    estimates = []
    for part in range(40):
        g = torch.Generator().manual_seed(part)
        draw = lambda i, g=g: torch.randn(4000, 2, generator=g, dtype=torch.float64)
        move = lambda x, steps: affine_velocity(x, steps, zero.detach(), table.sigmas)
        latents, means = roll_out(move, draw(-1), table, draw)
        end = latents[:, -1]
        reward = -((end[:, 0] - 1.2) ** 2) + 0.5 * end[:, 1]
        advantages = group_advantages(reward, 4, "none") * 4 / 3  # the group's mean holds the sample itself
        total = 0.0
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for i in table.random:
            steps = torch.full((4000,), i)
            mu, sigma = table.mean(affine_velocity(latents[:, i], steps, theta, table.sigmas), latents[:, i], steps)
            logps = log_prob(latents[:, i + 1], mu, sigma, "sum").unsqueeze(1)
            old_logps = log_prob(latents[:, i + 1], means[:, i], sigma, "sum").unsqueeze(1)
            assert torch.equal((logps - old_logps).exp(), torch.ones_like(logps))  # on-policy: exactly 1
            one = StepBatch(logps, old_logps, advantages.unsqueeze(1), torch.ones_like(logps))
            total = total + sage_loss(one, epsilon=10.0).per_token_loss.mean()
        (grad,) = torch.autograd.grad(-total, theta)
        estimates.append(grad)
    estimates = torch.stack(estimates)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * error).all(), (estimates.mean(0), exact, error)
    assert (error < 0.1 * exact.abs().max()).all()  # or anything would pass
    if held:
        (full,) = torch.autograd.grad(expected_reward(zero, table), zero)
        with capsys.disabled():
            print(f"\n{rule}: steps {held} have no log-probability: {exact.tolist()} against {full.tolist()} in full")
        assert not torch.allclose(exact, full, rtol=0.02)
