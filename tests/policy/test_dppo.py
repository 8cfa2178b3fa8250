"""DPPO against its spec: worked numbers (section 7), invariants (section 6), then real runs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    loss_and_grad,
    masked_mean,
    parameter_gap,
    policy_batch,
    random_policy_batch,
    tiny_config,
    tiny_run,
)
from trl import GRPOConfig, GRPOTrainer

from trl_trust import DPPOConfig, DPPOTrainer, dppo_loss
from trl_trust.policy.dppo import binary_divergence


seeds = st.integers(0, 10_000)
divergences = st.sampled_from(["tv", "kl"])


def from_probabilities(mu, pi, advantages, **fields):
    return policy_batch(
        logps=torch.tensor(pi, dtype=torch.float64).log(),
        old_logps=torch.tensor(mu, dtype=torch.float64).log(),
        advantages=advantages,
        **fields,
    )


def dropped(batch, **settings):
    return dppo_loss(batch, **settings).metrics["dppo/mask_ratio/all"].bool()


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mu", "pi", "sign", "d_kl", "tv_drops", "kl_drops"),
    [
        (0.01, 0.02, +1, 0.003119, False, False),
        (0.05, 0.15, +1, 0.050734, False, True),
        (0.50, 0.64, +1, 0.040822, False, False),
        (0.80, 0.97, +1, 0.225276, True, True),
        (0.80, 0.97, -1, 0.225276, False, False),
        (0.60, 0.50, -1, 0.020136, False, False),
        (0.95, 0.70, -1, 0.200525, True, True),
        (0.30, 0.10, -1, 0.153664, True, True),
        (0.0001, 0.01, -1, 0.009489, False, False),
    ],
)
def test_table_of_tokens(mu, pi, sign, d_kl, tv_drops, kl_drops):
    batch = from_probabilities([[mu]], [[pi]], [sign])
    kl = dppo_loss(batch, divergence="kl")
    assert kl.metrics["dppo/divergence/mean"].item() == pytest.approx(d_kl, abs=1e-6)
    assert dropped(batch).item() is tv_drops
    assert dropped(batch, divergence="kl").item() is kl_drops


@pytest.mark.parametrize(("mu", "pi", "d_kl"), [(0.5, 1.0, 8.517193), (1.0, 0.9, 0.105361), (1.0, 1.0, 0.0)])
def test_divergence_at_the_edge(mu, pi, d_kl):
    got = binary_divergence(torch.tensor(pi).double().log(), torch.tensor(mu).double().log(), "kl")
    assert got.item() == pytest.approx(d_kl, abs=1e-6)


MU = [[0.01, 0.80, 0.05], [0.60, 0.30, 0.0001]]
PI = [[0.02, 0.97, 0.15], [0.50, 0.10, 0.01]]


@pytest.mark.parametrize(
    ("settings", "loss", "grad"),
    [
        ({}, -13.194270, [[-0.333333, 0, -0.5], [0.138889, 0, 3.333333]]),
        ({"ratio_cap": None}, -74.596539, [[-0.333333, 0, -0.5], [0.138889, 0, 16.666667]]),
        ({"divergence": "kl"}, -14.142830, [[-0.333333, 0, 0], [0.138889, 0, 3.333333]]),
        ({"surrogate": "ratio"}, 15.972222, [[-0.333333, 0, -0.5], [0.138889, 0, 16.666667]]),
    ],
    ids=["tv", "uncapped", "kl", "tv-ratio"],
)
def test_worked_loss(settings, loss, grad):
    got, got_grad, _ = loss_and_grad(dppo_loss, from_probabilities(MU, PI, [1, -1]), **settings)
    assert got.item() == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(got_grad, torch.tensor(grad, dtype=torch.float64), atol=1e-6, rtol=0)


def test_metrics_of_the_worked_loss():
    batch = from_probabilities(MU, PI, [1, -1])
    metrics = dppo_loss(batch).metrics
    fractions = {name: masked_mean(metrics[f"dppo/{name}"], batch.mask) for name in ("mask_ratio/pos", "ratio/capped")}
    assert fractions == pytest.approx({"mask_ratio/pos": 1 / 6, "ratio/capped": 1 / 6})
    assert masked_mean(metrics["dppo/mask_ratio/neg"], batch.mask) == pytest.approx(1 / 6)
    assert metrics["dppo/prob_diff/max"].max().item() == pytest.approx(0.17)
    assert metrics["dppo/prob_diff/min"].min().item() == pytest.approx(-0.20)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds, divergences)
def test_on_policy_it_is_reinforce(seed, divergence):  # 1
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, _ = loss_and_grad(dppo_loss, batch, divergence=divergence)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())


@given(seeds, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_total_variation_is_a_ratio_band(seed, low, high):  # 3
    batch = random_policy_batch(seed, spread=1.0)
    ratio, mu = torch.exp(batch.logps.detach() - batch.old_logps), batch.old_logps.exp()
    inside = torch.where(batch.advantages > 0, ratio <= 1 + high / mu, ratio >= 1 - low / mu)
    drop = dropped(batch, delta_low=low, delta_high=high)
    assert torch.equal(drop, ~inside & (batch.advantages != 0))
    never = ((batch.advantages > 0) & (mu >= 1 - high)) | ((batch.advantages < 0) & (mu <= low))
    assert not drop[never].any()


@given(seeds, divergences)
def test_a_token_that_moved_against_its_advantage_is_kept(seed, divergence):  # 4
    batch = random_policy_batch(seed, spread=3.0)
    against = (batch.logps.detach() - batch.old_logps) * batch.advantages < 0
    assert not dropped(batch, divergence=divergence, delta_low=0.0, delta_high=0.0)[against].any()


@given(seeds)
def test_pinsker(seed):  # 5
    batch = random_policy_batch(seed, spread=2.0)
    pi, mu = batch.logps.detach(), batch.old_logps
    tv, kl = binary_divergence(pi, mu, "tv"), binary_divergence(pi, mu, "kl")
    assert (kl >= 2 * tv.square() - 1e-7).all()
    with_advantage = (pi - mu) * batch.advantages > 0
    assert dropped(batch, divergence="kl")[with_advantage & (tv > math.sqrt(0.05 / 2) + 1e-6)].all()


@given(seeds)
def test_surrogates_agree_below_the_cap(seed):  # 6
    batch = random_policy_batch(seed, spread=2.0)
    _, logp, _ = loss_and_grad(dppo_loss, batch, ratio_cap=2.0)
    _, live, _ = loss_and_grad(dppo_loss, batch, surrogate="ratio")
    ratio = torch.exp(batch.logps.detach() - batch.old_logps)
    torch.testing.assert_close(logp[ratio <= 2], live[ratio <= 2])
    beyond = (ratio > 2) & ~dropped(batch)
    expected = -2.0 * batch.advantages * batch.mask / batch.mask.sum()
    torch.testing.assert_close(logp[beyond], expected.expand_as(ratio)[beyond])


@given(seeds, divergences, st.sampled_from(["logp", "ratio"]))
def test_dropped_tokens_have_exactly_no_gradient(seed, divergence, surrogate):  # 7
    batch = random_policy_batch(seed, spread=2.0)
    _, grad, _ = loss_and_grad(dppo_loss, batch, divergence=divergence, surrogate=surrogate)
    drop = dropped(batch, divergence=divergence)
    assert (grad[drop] == 0).all()
    assert (grad[~drop & (batch.mask > 0)] != 0).all()
    flat = replace(batch, advantages=torch.zeros_like(batch.advantages))
    assert (loss_and_grad(dppo_loss, flat, divergence=divergence, surrogate=surrogate)[1] == 0).all()


@given(seeds, st.floats(0, 0.5), st.sampled_from(["delta_low", "delta_high"]))
def test_a_threshold_moves_only_its_own_sign(seed, delta, name):  # 8
    batch = random_policy_batch(seed, spread=2.0)
    default, moved = dropped(batch), dropped(batch, **{name: delta})
    others = (batch.advantages > 0) if name == "delta_low" else (batch.advantages < 0)
    assert torch.equal(default[others.squeeze(1)], moved[others.squeeze(1)])


@given(seeds, divergences)
def test_zero_thresholds_drop_all_that_moved_with_their_advantage(seed, divergence):  # 9
    batch = random_policy_batch(seed)
    moved = (batch.logps.detach().exp() - batch.old_logps.exp()) * batch.advantages > 0
    moved = moved & (binary_divergence(batch.logps.detach(), batch.old_logps, divergence) > 0)
    assert torch.equal(dropped(batch, divergence=divergence, delta_low=0.0, delta_high=0.0), moved)


@given(seeds)
def test_symmetric_mask_ignores_the_advantage(seed):  # 10
    batch = random_policy_batch(seed, spread=2.0)
    symmetric = dropped(batch, mask_mode="symmetric")
    assert torch.equal(symmetric, dropped(replace(batch, advantages=-batch.advantages), mask_mode="symmetric"))
    assert symmetric[dropped(batch)].all()


@given(seeds)
def test_with_a_sampler_old_logps_do_not_matter(seed):  # 11, the pure part
    batch = random_policy_batch(seed)
    sampled = replace(batch, sampling_logps=batch.old_logps + 0.1)
    one = loss_and_grad(dppo_loss, sampled)
    two = loss_and_grad(dppo_loss, replace(sampled, old_logps=batch.old_logps - 1.0))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    old = loss_and_grad(dppo_loss, sampled, anchor="old")
    assert torch.equal(old[1], loss_and_grad(dppo_loss, batch)[1])


def test_certain_tokens_stay_finite_in_float32():  # 12
    zero = torch.zeros(1, 1)
    for logps, old in ((zero, zero - 0.7), (zero - 0.7, zero), (zero, zero)):
        batch = policy_batch(logps=logps, old_logps=old, advantages=[1.0])
        batch = replace(batch, logps=logps.clone().requires_grad_(), old_logps=old, mask=torch.ones(1, 1))
        loss, grad, out = loss_and_grad(dppo_loss, batch, divergence="kl")
        assert loss.isfinite() and grad.isfinite().all() and out.metrics["dppo/divergence/mean"].isfinite().all()


@given(seeds, divergences)
def test_masked_inputs_change_nothing(seed, divergence):  # 13
    batch = random_policy_batch(seed)
    batch = replace(batch, sampling_logps=batch.old_logps - 0.05)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -7.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.2),
        sampling_logps=torch.where(live, batch.sampling_logps, torch.nan),
    )
    one, two = (loss_and_grad(dppo_loss, b, divergence=divergence) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_unscored_tokens_fall_back_to_the_old_policy():
    batch = random_policy_batch(5, masked=False)
    sampling = batch.old_logps - 0.3
    sampling[0, 1] = torch.nan
    mixed = replace(batch, sampling_logps=sampling)
    expected = replace(batch, old_logps=torch.where(sampling.isnan(), batch.old_logps, sampling))
    assert torch.equal(loss_and_grad(dppo_loss, mixed)[1], loss_and_grad(dppo_loss, expected)[1])


@given(seeds)
def test_the_penalty_pulls_every_live_token(seed):
    batch = random_policy_batch(seed, spread=2.0)
    plain, pulled = (loss_and_grad(dppo_loss, batch, log_ratio_penalty=p)[1] for p in (0.0, 0.1))
    d = batch.logps.detach() - batch.old_logps
    torch.testing.assert_close(pulled - plain, 2 * 0.1 * d * batch.mask / batch.mask.sum())


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta_low": -0.1}, "must be a finite number >= 0, or None"),
        ({"delta_high": math.nan}, "must be a finite number >= 0, or None"),
        ({"surrogate": "ratio", "ratio_cap": 5.0}, "with surrogate='ratio' leave it out"),
        ({"anchor": "sampling"}, "set use_vllm=True or anchor='auto'"),
        ({"log_ratio_penalty": -1.0}, "must be a finite number >= 0"),
        ({"epsilon": 0.15}, "`delta_low` and `delta_high`"),
        ({"delta": 4.0}, "`ratio_cap`"),
        ({"importance_sampling_level": "sequence"}, "single tokens"),
        ({"loss_type": "luspo"}, "aggregation only"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(DPPOConfig, **settings)
    name, value = list(settings.items())[-1]
    assert name in str(error.value) and str(value) in str(error.value)


# -- real runs --------------------------------------------------------------------------------------------------------


def test_a_region_of_everything_trains_exactly_as_cispo(tiny_model_path, tmp_path):  # 2
    ours = tiny_config(DPPOConfig, tmp_path / "a", delta_low=1.0, delta_high=1.0, anchor="old", ratio_cap=1.5)
    cispo = tiny_config(GRPOConfig, tmp_path / "b", loss_type="cispo", epsilon_high=1.5)
    ours, stock = tiny_run(DPPOTrainer, tiny_model_path, ours), tiny_run(GRPOTrainer, tiny_model_path, cispo)
    assert parameter_gap(ours.model, stock.model) == 0.0


def test_the_region_acts_in_a_run(tiny_model_path, tmp_path):
    args = tiny_config(DPPOConfig, tmp_path, delta_low=0.001, delta_high=0.001)
    log = tiny_run(DPPOTrainer, tiny_model_path, args).state.log_history
    assert log[0]["dppo/mask_ratio/all"] == 0.0  # the first mini-batch is on-policy
    assert log[2]["dppo/mask_ratio/all"] > 0.0
    assert log[2]["trust/cut"] == pytest.approx(log[2]["dppo/mask_ratio/all"])
