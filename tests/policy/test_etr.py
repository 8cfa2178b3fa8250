"""ETR against its spec: worked numbers (section 7), invariants (section 6), then real runs."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
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

from trl_trust import ETRConfig, ETRTrainer, etr_loss
from trl_trust.policy.base import AGGREGATIONS, grpo_loss
from trl_trust.policy.etr import etr_bounds, outcome_variance


seeds = st.integers(0, 10_000)
lambdas = st.floats(0, 5)
shapes = st.sampled_from(["linear", "tanh", "centered"])
OFF = {"lambda_micro": 0.0, "lambda_macro": 0.0}
HALF = {"lambda_micro": 0.5, "lambda_macro": 0.5}


def with_variance(batch, variance):
    return replace(batch, extras={"outcome_variance": torch.as_tensor(variance, dtype=torch.float64)})


def worked():
    ratio = torch.tensor([[0.75, 1.25, 1.5], [0.5, 0.65, 1.5]], dtype=torch.float64)
    batch = policy_batch(logps=ratio.log(), old_logps=torch.zeros(2, 3), advantages=[1, -1])
    return with_variance(batch, [0.25, 0.25])


def binary_group(p, n=8, sample_std=False):
    """(n, 1) advantages of a group of n with n p successes."""
    rewards = (torch.arange(n) < round(n * p)).double()
    std = rewards.std() + 1e-4 if sample_std else rewards.std(correction=0)
    return ((rewards - rewards.mean()) / std).unsqueeze(1)


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "k", "epsilon", "loss", "grad"),
    [
        (OFF, 1, 0.2, -0.008333, [[-0.125, 0, 0], [0, 0, 0.25]]),
        ({}, 1.5, 0.3, -0.066667, [[-0.125, -0.208333, 0], [0, 0, 0.25]]),
        (HALF, 2.25, 0.45, -0.125, [[-0.125, -0.208333, 0], [0, 0.108333, 0.25]]),
        ({**HALF, "phi": "tanh"}, 2.071196, 0.414239, -0.113080, [[-0.125, -0.208333, 0], [0, 0.108333, 0.25]]),
    ],
    ids=["grpo", "micro", "micro-macro", "tanh"],
)
def test_worked_numbers(settings, k, epsilon, loss, grad):
    got, got_grad, out = loss_and_grad(etr_loss, worked(), "sequence", **settings)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got_grad, torch.tensor(grad, dtype=torch.float64), atol=1e-6, rtol=0)
    for name, value in (("scale/mean", k), ("epsilon/low_mean", epsilon), ("epsilon/high_mean", epsilon)):
        assert out.metrics[f"etr/{name}"].flatten().tolist() == pytest.approx([value] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("p", "a_pos", "a_neg", "eps_pos", "eps_neg", "mean", "mean_trl"),
    [
        (1 / 8, 2.6458, -0.3780, 0.4646, 0.2378, 0.2661, 0.2619),
        (1 / 4, 1.7321, -0.5774, 0.3732, 0.2577, 0.2866, 0.2810),
        (3 / 8, 1.2910, -0.7746, 0.3291, 0.2775, 0.2968, 0.2906),
        (1 / 2, 1, -1, 0.3, 0.3, 0.3, 0.2935),
    ],
)
def test_worked_widths(p, a_pos, a_neg, eps_pos, eps_neg, mean, mean_trl):
    advantages = binary_group(p)
    low, high, _ = etr_bounds(advantages)
    assert torch.equal(low, high)
    assert [advantages[0].item(), advantages[-1].item()] == pytest.approx([a_pos, a_neg], abs=5e-5)
    assert [high[0].item(), low[-1].item(), low.mean().item()] == pytest.approx([eps_pos, eps_neg, mean], abs=6e-5)
    assert etr_bounds(binary_group(p, sample_std=True))[0].mean().item() == pytest.approx(mean_trl, abs=6e-5)


@pytest.mark.parametrize(("p", "eps_pos", "eps_neg"), [(1 / 8, 0.3646, 0.1378), (1 / 2, 0.2, 0.2)])
def test_worked_centred_widths(p, eps_pos, eps_neg):
    low, _, _ = etr_bounds(binary_group(p), phi="centered")
    assert [low[0].item(), low[-1].item()] == pytest.approx([eps_pos, eps_neg], abs=5e-5)


def test_worked_metrics():
    batch = worked()
    metrics = etr_loss(batch).metrics
    got = {name: masked_mean(x, batch.mask) for name, x in metrics.items() if "clip_ratio" in name}
    # widths 0.3: above are 1.5 (A > 0), below are 0.5 and 0.65 (A < 0); plain 0.2 cuts 1.25 as well
    assert got == pytest.approx(
        {"etr/clip_ratio/low": 2 / 6, "etr/clip_ratio/high": 1 / 6, "etr/clip_ratio/base": 4 / 6}
    )


# -- the group's variance ---------------------------------------------------------------------------------------------


def test_outcome_variance_of_passes_and_failures():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert outcome_variance(rewards).flatten().tolist() == pytest.approx([3 / 16, 1 / 4, 0])
    assert outcome_variance(6 * rewards - 2, (-2, 4)).flatten().tolist() == pytest.approx([3 / 16, 1 / 4, 0])


def test_outcome_variance_is_limited_and_ignores_unscored_responses():
    assert outcome_variance(torch.tensor([[0.0, 10.0]])).item() == 0.25
    nan = math.nan
    assert outcome_variance(torch.tensor([[1.0, 0, nan, nan], [nan] * 4])).flatten().tolist() == [0.25, 0]


@given(st.integers(0, 8), st.sampled_from(["variance", "std"]))
def test_macro_scale_is_symmetric_and_widest_at_one_half(successes, macro):  # 3
    scale = lambda p: etr_bounds(
        torch.zeros(1, 1).double(), torch.tensor([[p * (1 - p)]]).double(), lambda_macro=0.7, macro=macro
    )[2].item()
    p = successes / 8
    assert scale(p) == pytest.approx(scale(1 - p)) and scale(p) <= scale(0.5) == pytest.approx(1.7)
    assert scale(0.0) == scale(1.0) == 1.0
    assert p in (0, 1) or scale(p) > 1


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([None, 0.28]), st.sampled_from([None, 1.1, 3.0]), st.sampled_from(["token", "sequence"]))
def test_without_elasticity_it_is_grpo(seed, high, delta, level):  # 1
    batch = random_policy_batch(seed, spread=1.0)
    settings = {"epsilon_high": high, "delta": delta, "importance_sampling_level": level}
    ours, theirs = loss_and_grad(etr_loss, batch, **OFF, **settings), loss_and_grad(grpo_loss, batch, **settings)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@given(seeds, lambdas, shapes)
def test_on_policy_it_is_grpo_whatever_the_elasticity(seed, strength, phi):  # 2
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    grad = loss_and_grad(etr_loss, batch, lambda_micro=strength, phi=phi)[1]
    assert torch.equal(grad, loss_and_grad(grpo_loss, batch)[1])


def test_widths_are_constants():  # 3
    advantages = torch.tensor([[1.5], [-0.5]], requires_grad=True)
    assert not any(x.requires_grad for x in etr_bounds(advantages))


@given(seeds, lambdas, shapes)
def test_a_token_loses_its_gradient_exactly_beyond_its_own_bound(seed, strength, phi):  # 4
    batch = random_policy_batch(seed, spread=1.0)
    _, grad, _ = loss_and_grad(etr_loss, batch, "sequence", lambda_micro=strength, phi=phi)
    low, high, _ = etr_bounds(batch.advantages, lambda_micro=strength, phi=phi)
    A, ratio = batch.advantages, torch.exp(batch.logps.detach() - batch.old_logps)
    cut = ((A > 0) & (ratio > 1 + high)) | ((A < 0) & (ratio < 1 - low))
    coefficient = batch.mask / (len(batch.mask) * batch.mask.sum(1, keepdim=True))
    torch.testing.assert_close(grad, torch.where(cut, 0.0, -ratio * A * coefficient))
    assert (grad[cut] == 0).all()


@given(seeds, lambdas, lambdas, st.sampled_from(["linear", "tanh"]))
def test_more_elasticity_never_cuts_more(seed, one, other, phi):  # 5
    less, more = sorted((one, other))
    batch = random_policy_batch(seed, spread=1.0)
    alive = lambda strength: loss_and_grad(etr_loss, batch, lambda_micro=strength, phi=phi)[1] != 0
    grpo, narrow, wide = loss_and_grad(grpo_loss, batch)[1] != 0, alive(less), alive(more)
    assert (narrow | ~grpo).all() and (wide | ~narrow).all()


@given(seeds, lambdas, shapes)
def test_larger_advantages_have_wider_bands(seed, strength, phi):  # 6
    advantages = random_policy_batch(seed, B=8).advantages
    order = advantages.abs().flatten().argsort()
    scale = etr_bounds(advantages, lambda_micro=strength, phi=phi)[2].flatten()[order]
    assert (scale.diff() >= 0).all()


@given(st.integers(1, 7), st.floats(0, 0.7))
def test_the_macro_effect_is_implicit(successes, strength):  # 7
    p = successes / 8
    factor = 1 + 2 * strength * math.sqrt(p * (1 - p))
    low, _, _ = etr_bounds(binary_group(p), lambda_micro=strength)
    assert low.mean().item() == pytest.approx(0.2 * factor)
    factor = 1 + 2 * strength * math.sqrt(p * (1 - p) * 7 / 8)
    low, _, _ = etr_bounds(binary_group(p, sample_std=True), lambda_micro=strength)
    assert low.mean().item() == pytest.approx(0.2 * factor, rel=2e-4)


def test_without_limits_the_upper_bound_goes_and_the_lower_stays_above_zero():  # 8
    batch = replace(random_policy_batch(3, spread=3.0, masked=False))
    batch = replace(batch, old_logps=torch.where(torch.arange(6) == 0, batch.logps.detach() + 8.0, batch.old_logps))
    _, grad, _ = loss_and_grad(etr_loss, batch, lambda_micro=1e9, scale_max=1e9)
    A, ratio = batch.advantages, torch.exp(batch.logps.detach() - batch.old_logps)  # first column: e^-8 = 0.0003
    expected = torch.where((A < 0) & (ratio < 0.001), 0.0, -ratio * A / batch.mask.sum())
    torch.testing.assert_close(grad, expected)
    assert (grad[:, :1][A < 0] == 0).all() and (A < 0).any()


@given(seeds)
def test_masked_inputs_change_nothing(seed):  # 9
    batch = random_policy_batch(seed)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -5.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.1),
    )
    for level in ("token", "sequence"):
        one, two = (loss_and_grad(etr_loss, b, importance_sampling_level=level) for b in (batch, other))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert all(torch.equal(x[live], two[2].metrics[n][live]) for n, x in one[2].metrics.items() if "clip" in n)


def test_equal_rewards_teach_nothing():  # 9
    batch = replace(random_policy_batch(3, spread=1.0), advantages=torch.zeros(4, 1, dtype=torch.float64))
    loss, grad, out = loss_and_grad(etr_loss, batch)
    assert loss == 0 and (grad == 0).all()
    assert all(x.sum() == 0 for name, x in out.metrics.items() if "clip_ratio" in name)
    assert out.metrics["etr/scale/mean"].isnan().all()


def test_advantages_per_token():
    batch = replace(worked(), advantages=torch.tensor([[1.0, 1, 2], [-1, -1, -2]], dtype=torch.float64))
    low, high, _ = etr_bounds(batch.advantages)
    torch.testing.assert_close(high, torch.tensor([[0.3, 0.3, 0.4]] * 2, dtype=torch.float64))
    assert torch.equal(low, high)
    # 1.5 is above 1.4, 0.5 below 0.7; 1.25, 0.75 and, for A < 0, 1.5 are inside
    alive = loss_and_grad(etr_loss, batch)[1] != 0
    assert alive.tolist() == [[True, True, False], [False, False, True]]


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lambda_micro", -0.1, "must be a finite number >= 0"),
        ("lambda_micro", math.inf, "must be a finite number >= 0"),
        ("lambda_macro", math.nan, "must be a finite number >= 0"),
        ("scale_min", 4.0, "must be a number > 0 and at most scale_max=3.0"),
        ("scale_max", math.inf, "must be a finite number"),
        ("reward_range", [1.0, 0.0], "the lower one first"),
        ("reward_range", [0.0, math.inf], "two finite numbers"),
        ("reward_range", [0.0], "two finite numbers"),
        ("epsilon", 0.0, r"must be a number in \(0, 1\)"),
        ("epsilon", 1.0, r"must be a number in \(0, 1\)"),
        ("epsilon_high", 0.0, "must be a finite number > 0"),
        ("loss_type", "cispo", "aggregation only"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(ETRConfig, **{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_advantages_in_reward_units_warn():
    with pytest.warns(UserWarning, match="scale_rewards='none' with lambda_micro=0.5"):
        tiny_config(ETRConfig, scale_rewards="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tiny_config(ETRConfig, scale_rewards="none", lambda_micro=0.0)
        tiny_config(ETRConfig)


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_without_elasticity_it_trains_exactly_as_stock_grpo(loss_type, tiny_model_path, tmp_path):  # 1
    common = dict(loss_type=loss_type, epsilon=0.05, epsilon_high=0.08)  # narrow, so that many tokens are cut
    ours = tiny_run(ETRTrainer, tiny_model_path, tiny_config(ETRConfig, tmp_path / "a", **common, **OFF))
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "b", **common))
    assert parameter_gap(ours.model, stock.model) == 0.0
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3
    assert max(entry.get("trust/cut", 0.0) for entry in ours.state.log_history) > 0


def test_elasticity_spares_tokens_in_a_run(tiny_model_path, tmp_path):
    args = tiny_config(ETRConfig, tmp_path, epsilon=0.02, lambda_micro=2.0, lambda_macro=1.0)
    log = tiny_run(ETRTrainer, tiny_model_path, args).state.log_history
    assert all(name in log[0] for name in ("etr/scale/min", "etr/epsilon/low_mean", "etr/clip_ratio/low"))
    cut = log[2]["etr/clip_ratio/low"] + log[2]["etr/clip_ratio/high"]
    assert 0 < cut < log[2]["etr/clip_ratio/base"]
    assert cut == pytest.approx(log[2]["trust/cut"])
    assert 1 < log[2]["etr/scale/min"] <= log[2]["etr/scale/mean"] <= log[2]["etr/scale/max"] <= 3


def test_the_variance_of_whole_groups_reaches_the_loss(tiny_model_path, tmp_path):
    seen = []

    class Watch(ETRTrainer):
        def policy_loss(self, batch):
            seen.append((batch.rewards.clone(), batch.group.clone(), batch.extras["outcome_variance"].clone()))
            return super().policy_loss(batch)

    tiny_run(Watch, tiny_model_path, tiny_config(ETRConfig, tmp_path, lambda_macro=0.5))
    rewards, group, variance = (torch.cat(x) for x in zip(*seen, strict=True))  # one generation, 16 rows
    assert not torch.equal(group, group.sort().values)  # shuffled: no micro-batch holds whole groups
    assert variance.max() > 0
    for g in range(4):
        expected = rewards[group == g].var(correction=0)
        torch.testing.assert_close(variance[group == g], expected.expand(4))


def test_the_range_of_rewards_normalises_the_variance(tiny_model_path, tmp_path):
    def variances(**settings):
        seen = []

        class Watch(ETRTrainer):
            def policy_loss(self, batch):
                seen.append(batch.extras["outcome_variance"].clone())
                return super().policy_loss(batch)

        args = tiny_config(ETRConfig, tmp_path, lambda_macro=0.5, max_steps=1, **settings)
        tiny_run(Watch, tiny_model_path, args)
        return torch.cat(seen)

    plain = variances()
    assert plain.max() > 0
    torch.testing.assert_close(variances(reward_range=[-1.0, 3.0]), plain / 16)


def test_lora(tiny_model_path, tmp_path):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = tiny_config(ETRConfig, tmp_path, lambda_macro=0.5)
    trainer = tiny_run(ETRTrainer, tiny_model_path, args, peft_config=peft_config)
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().max() > 0 for p in moved)
