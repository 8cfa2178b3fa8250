"""DISPO against its spec: worked numbers (section 7), invariants (section 6), then real runs."""

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
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_trust import DISPOConfig, DISPOTrainer, dispo_loss
from trl_trust.policy.base import grpo_loss


WIDTHS = ("epsilon_pos_low", "epsilon_pos_high", "epsilon_neg_low", "epsilon_neg_high")
widths = st.floats(0, 200)
seeds = st.integers(0, 10_000)


def four(*values):
    return dict(zip(WIDTHS, values, strict=True))


def worked(mask=None):
    return policy_batch(
        ratio=[[0.5, 1.0, 20.0], [0.05, 1.0, 150.0]],
        logps=[[-1, -0.5, -0.2], [-2, -1, -0.1]],
        advantages=[1, -1],
        mask=mask,
    )


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "mask", "loss", "grad"),
    [
        ({}, None, -1.283333, [[-0.133333, -0.166667, -1.833333], [0.008333, 0.166667, 16.833333]]),
        ({}, [[1, 1, 0], [1, 1, 1]], -1.98, [[-0.16, -0.2, 0], [0.01, 0.2, 20.2]]),
        (four(0, 0, 0, 0), None, -0.233333, [[-1 / 6] * 3, [1 / 6] * 3]),
        (
            four(1, 4, 1, 4),
            None,
            0.066667,
            [[-0.083333, -0.166667, -0.833333], [0.008333, 0.166667, 0.833333]],
        ),
    ],
    ids=["defaults", "masked", "zero-widths", "cispo-5"],
)
def test_worked_numbers(settings, mask, loss, grad):
    got, got_grad, _ = loss_and_grad(dispo_loss, worked(mask), **settings)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got_grad, torch.tensor(grad, dtype=torch.float64), atol=1e-6, rtol=0)


def test_worked_weights_and_metrics():
    batch = worked()
    metrics = dispo_loss(batch).metrics
    weights = torch.tensor([[0.8, 1, 11], [0.05, 1, 101]], dtype=torch.float64)
    torch.testing.assert_close(metrics["dispo/weight/mean"], weights)
    got = {name: masked_mean(x, batch.mask) for name, x in metrics.items() if "clip_ratio" in name}
    assert got == pytest.approx(
        {
            "dispo/clip_ratio/pos_low": 1 / 6,
            "dispo/clip_ratio/pos_high": 1 / 6,
            "dispo/clip_ratio/neg_low": 0,
            "dispo/clip_ratio/neg_high": 1 / 6,
        }
    )


def test_sequence_mean_of_equal_lengths_is_the_token_mean():
    assert loss_and_grad(dispo_loss, worked(), "sequence")[0].item() == pytest.approx(-1.283333, abs=1e-6)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds)
def test_on_policy_it_is_reinforce_and_grpo(seed):  # 1
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, _ = loss_and_grad(dispo_loss, batch)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())
    _, grad, _ = loss_and_grad(dispo_loss, batch, "sequence")
    expected = -batch.advantages * batch.mask / (len(batch.mask) * batch.mask.sum(1, keepdim=True))
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(grad, loss_and_grad(grpo_loss, batch, "sequence")[1])


@given(seeds)
def test_zero_widths_are_reinforce_without_weights(seed):  # 3
    batch = random_policy_batch(seed)
    _, grad, _ = loss_and_grad(dispo_loss, batch, **four(0, 0, 0, 0))
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())


@given(seeds)
def test_no_bounds_give_the_unclipped_gradient(seed):  # 4
    batch = random_policy_batch(seed)
    _, grad, _ = loss_and_grad(dispo_loss, batch, **four(1, math.inf, 1, math.inf))
    ratio = torch.exp(batch.logps.detach() - batch.old_logps)
    torch.testing.assert_close(grad, -ratio * batch.advantages * batch.mask / batch.mask.sum())


@given(seeds)
def test_no_live_token_loses_its_gradient(seed):  # 5
    batch = random_policy_batch(seed, spread=2.0)
    _, grad, _ = loss_and_grad(dispo_loss, batch)
    assert ((grad != 0) == ((batch.mask > 0) & (batch.advantages != 0))).all()


@given(seeds)
def test_inside_both_bands_the_gradient_is_dapos(seed):  # 6
    batch = random_policy_batch(seed, spread=0.02)
    _, grad, _ = loss_and_grad(dispo_loss, batch)
    _, dapo, _ = loss_and_grad(grpo_loss, batch, epsilon=0.2, epsilon_high=0.28)
    torch.testing.assert_close(grad, dapo)


@given(seeds, widths, widths, st.sampled_from(WIDTHS))
def test_a_width_moves_only_its_own_tokens(seed, one, other, name):  # 7
    batch = random_policy_batch(seed, spread=3.0)
    first, second = (loss_and_grad(dispo_loss, batch, **{name: w})[1] for w in (one, other))
    ratio = torch.exp(batch.logps.detach() - batch.old_logps)
    own_sign = batch.advantages > 0 if "pos" in name else batch.advantages <= 0
    own_side = ratio > 1 if "high" in name else ratio < 1
    assert torch.equal(first[~(own_sign & own_side)], second[~(own_sign & own_side)])


@given(seeds, widths, widths, st.sampled_from(WIDTHS))
def test_weights_are_monotone_in_the_widths(seed, one, other, name):  # 8
    small, large = sorted((one, other))
    batch = random_policy_batch(seed, spread=3.0)
    lesser, greater = (dispo_loss(batch, **{name: w}).metrics["dispo/weight/mean"] for w in (small, large))
    assert (greater >= lesser).all() if "high" in name else (greater <= lesser).all()


@given(seeds)
def test_masked_inputs_and_constants(seed):  # 9
    batch = random_policy_batch(seed)
    noisy = torch.where(batch.mask > 0, batch.logps.detach(), -5.0).requires_grad_()
    other = replace(batch, logps=noisy, old_logps=torch.where(batch.mask > 0, batch.old_logps, -0.1))
    one, two = loss_and_grad(dispo_loss, batch), loss_and_grad(dispo_loss, other)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    constant = replace(batch, old_logps=batch.old_logps.requires_grad_())
    total = dispo_loss(constant).per_token_loss.sum()
    assert torch.autograd.grad(total, constant.old_logps, allow_unused=True) == (None,)


def test_equal_rewards_teach_nothing():  # 10
    batch = replace(random_policy_batch(3), advantages=torch.zeros(4, 1, dtype=torch.float64))
    loss, grad, out = loss_and_grad(dispo_loss, batch)
    assert loss == 0 and (grad == 0).all()
    assert all(x.sum() == 0 for name, x in out.metrics.items() if "clip_ratio" in name)


@given(seeds)
def test_selection_by_correctness_equals_selection_by_sign_for_binary_rewards(seed):  # 11
    batch = random_policy_batch(seed, spread=2.0)
    rewards = (batch.advantages.squeeze(1) > 0).double()
    by_sign = loss_and_grad(dispo_loss, batch)
    by_reward = loss_and_grad(dispo_loss, replace(batch, rewards=rewards), select="correct")
    assert torch.equal(by_sign[0], by_reward[0]) and torch.equal(by_sign[1], by_reward[1])


def test_selection_by_correctness_reads_the_reward_not_the_sign():
    batch = replace(worked(), rewards=torch.tensor([0.4, 0.2], dtype=torch.float64))  # nobody is correct
    weight = dispo_loss(batch, select="correct").metrics["dispo/weight/mean"]
    torch.testing.assert_close(weight[0], torch.tensor([0.5, 1.0, 20.0], dtype=torch.float64))
    weight = dispo_loss(batch, select="correct", correct_threshold=0.3).metrics["dispo/weight/mean"]
    torch.testing.assert_close(weight[0], torch.tensor([0.8, 1.0, 11.0], dtype=torch.float64))


def test_advantages_per_token():
    batch = worked()
    spread = replace(batch, advantages=batch.advantages.expand(2, 3))
    assert torch.equal(loss_and_grad(dispo_loss, batch)[1], loss_and_grad(dispo_loss, spread)[1])


def test_the_band_is_of_each_token_by_its_own_advantage():
    batch = policy_batch(ratio=[[0.5, 0.5, 150.0, 150.0]], logps=[[-1, -1, -1, -1]], advantages=[[3, -1, -1, 3]])
    weight = dispo_loss(batch).metrics["dispo/weight/mean"]
    torch.testing.assert_close(weight, torch.tensor([[0.8, 0.5, 101.0, 11.0]], dtype=torch.float64))


def test_bounds_have_the_precision_of_the_loss():
    batch = policy_batch(ratio=[[0.5, 20.0]], logps=[[-1, -1]], advantages=[1])
    weight = dispo_loss(batch, epsilon_pos_low=0.3, epsilon_pos_high=10.1).metrics["dispo/weight/mean"]
    assert weight.tolist() == [[1 - 0.3, 1 + 10.1]]  # as float64 has them


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epsilon_pos_low", -0.1, "must be a finite number >= 0"),
        ("epsilon_pos_low", math.inf, "must be a finite number >= 0"),
        ("epsilon_neg_low", math.nan, "must be a finite number >= 0"),
        ("epsilon_pos_high", -1, "must be a number >= 0"),
        ("epsilon_neg_high", math.nan, "must be a number >= 0"),
        ("select", "reward", "must be 'advantage' or 'correct'"),
        ("correct_threshold", math.inf, "must be a finite number"),
        ("epsilon", 0.1, "use `epsilon_pos_low`"),
        ("epsilon_high", 0.28, "use `epsilon_pos_high`"),
        ("delta", 4.0, "use `epsilon_neg_high`"),
        ("importance_sampling_level", "sequence", "single tokens"),
        ("loss_type", "cispo", "aggregation only"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(DISPOConfig, **{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_infinite_upper_bounds_are_legal():
    assert tiny_config(DISPOConfig, epsilon_pos_high=math.inf, epsilon_neg_high=math.inf).epsilon_neg_high == math.inf


# -- real runs --------------------------------------------------------------------------------------------------------


def test_equal_widths_train_exactly_as_cispo(tiny_model_path, tmp_path):  # 2
    dispo = tiny_config(DISPOConfig, tmp_path / "a", **four(1, 4, 1, 4))
    cispo = tiny_config(GRPOConfig, tmp_path / "b", loss_type="cispo", epsilon_high=5.0)
    ours, stock = tiny_run(DISPOTrainer, tiny_model_path, dispo), tiny_run(GRPOTrainer, tiny_model_path, cispo)
    assert parameter_gap(ours.model, stock.model) == 0.0
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


def test_rewards_reach_the_loss_through_the_shuffle(tiny_model_path, tmp_path):
    seen = []

    class Watch(DISPOTrainer):
        def policy_loss(self, batch):
            seen.append((batch.rewards.clone(), batch.group.clone(), batch.advantages.squeeze(1).clone()))
            return super().policy_loss(batch)

    args = tiny_config(DISPOConfig, tmp_path, select="correct", correct_threshold=0.5)
    tiny_run(Watch, tiny_model_path, args)
    rewards, group, advantages = (torch.cat(x) for x in zip(*seen, strict=True))  # one generation, 16 rows
    assert not torch.equal(group, group.sort().values)  # shuffled
    for g in range(4):
        r = rewards[group == g]
        assert len(r) == 4
        torch.testing.assert_close(advantages[group == g], (r - r.mean()) / (r.std() + 1e-4))
