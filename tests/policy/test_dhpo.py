"""DHPO against its spec: worked numbers (section 7), invariants (section 6), then real runs."""

import math
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

from trl_trust import DHPOConfig, DHPOTrainer, dhpo_loss
from trl_trust.policy.base import AGGREGATIONS, grpo_loss
from trl_trust.policy.dhpo import entropy_weight


seeds = st.integers(0, 10_000)
weights = st.floats(0, 1)
MIN_FORMS = ("joint_min", "per_branch_min")
VARIANTS = (*MIN_FORMS, "clip_only")
PATHS = ("token", "direct")
NORMALISERS = ("response_max", "batch_max", "min_max", "log_vocab")
WIDE = {"epsilon": 1.0, "epsilon_high": math.inf, "epsilon_sequence_low": 1.0, "epsilon_sequence_high": math.inf}


def with_entropies(batch, seed=0):
    g = torch.Generator().manual_seed(seed)
    return replace(batch, entropies=2 * torch.rand(batch.logps.shape, generator=g, dtype=torch.float64))


def worked():
    return policy_batch(
        ratio=[[0.7, 1.1, 1.5], [1.3, 0.9, 0.6]],
        logps=[[-1, -0.5, -0.2], [-2, -1, -0.1]],
        advantages=[1, -1],
        entropies=torch.tensor([[0.2, 1, 2], [0.5, 0, 1.5]], dtype=torch.float64),
    )


def ratios(batch):
    """Token ratio (B, T) and sequence ratio (B, 1), by the definition rather than by the helpers of the package."""
    log_ratio = batch.logps.detach() - batch.old_logps
    return log_ratio.exp(), ((log_ratio * batch.mask).sum(1) / batch.mask.sum(1)).exp().unsqueeze(1)


# -- worked numbers ---------------------------------------------------------------------------------------------------

GSPO = [[-0.174868] * 3, [0, 0, 0]]
GRPO = [[-0.116667, -0.183333, 0], [0.216667, 0.15, 0]]


@pytest.mark.parametrize(
    ("settings", "variant", "loss", "grad"),
    [
        ({}, "joint_min", -0.038239, [[-0.145767, -0.1791, -0.087434], [0.182396, 0.075, 0]]),
        ({}, "per_branch_min", -0.037301, [[-0.145767, -0.1791, -0.087434], [0.108333, 0.075, 0]]),
        ({}, "clip_only", -0.053968, [[-0.087434, -0.1791, -0.087434], [0, 0.075, 0]]),
        ("batch_max", "joint_min", -0.095388, [[-0.169048, -0.1791, 0], [0.16526, 0, 0]]),
        ("batch_max", "per_branch_min", -0.093981, [[-0.169048, -0.1791, 0], [0.054167, 0, 0]]),
        ("response_max", "joint_min", -0.093843, [[-0.169048, -0.1791, 0], [0.170972, 0, 0]]),
        ("response_max", "per_branch_min", -0.092592, [[-0.169048, -0.1791, 0], [0.072222, 0, 0]]),
        ({"token_weight": 1.0}, "joint_min", 0, GRPO),
        ({"token_weight": 1.0}, "per_branch_min", 0, GRPO),
        ({"token_weight": 0.0}, "joint_min", -0.074603, GSPO),
        ({"token_weight": 0.0}, "per_branch_min", -0.074603, GSPO),
    ],
)
def test_worked_numbers(settings, variant, loss, grad):
    if isinstance(settings, str):
        settings = {"mixing": "entropy", "entropy_normalizer": settings}
    settings = {"epsilon_sequence_low": 0.1, "epsilon_sequence_high": 0.1, **settings}
    got, got_grad, _ = loss_and_grad(dhpo_loss, worked(), "sequence", variant=variant, **settings)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got_grad, torch.tensor(grad, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [
        ("batch_max", [[0.1, 0.5, 1], [0.25, 0, 0.75]]),
        ("response_max", [[0.1, 0.5, 1], [1 / 3, 0, 1]]),
        ("min_max", [[0.1, 0.5, 1], [0.25, 0, 0.75]]),
        ("log_vocab", [[0.02, 0.1, 0.2], [0.05, 0, 0.15]]),
    ],
)
def test_worked_weights(normaliser, expected):
    batch = worked()
    got = entropy_weight(batch.entropies, batch.mask, normaliser, round(math.exp(10)))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_min_max_begins_at_the_least_entropy():
    entropies = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(entropy_weight(entropies, mask, "min_max"), torch.tensor([[0, 1, 0.5, 0]]))


def test_worked_metrics():
    batch = worked()
    settings = {"epsilon_sequence_low": 0.1, "epsilon_sequence_high": 0.1, "mixing": "entropy"}
    metrics = dhpo_loss(batch, **settings).metrics
    w = torch.tensor([0.1, 0.5, 1, 1 / 3, 0, 1], dtype=torch.float64)
    assert metrics["dhpo/clip_ratio/token"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert metrics["dhpo/clip_ratio/sequence"].tolist() == [[0], [1]]
    assert metrics["dhpo/clip_ratio/both"].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert metrics["dhpo/ratio/sequence_mean"].flatten().tolist() == pytest.approx([1.049206, 0.888749], abs=1e-6)
    assert masked_mean(metrics["dhpo/ratio/token_mean"], batch.mask) == pytest.approx(6.1 / 6)
    assert masked_mean(metrics["dhpo/weight/mean"], batch.mask) == pytest.approx(w.mean().item())
    assert metrics["dhpo/weight/std"].item() == pytest.approx(w.std(correction=0).item())
    assert "dhpo/weight/std" not in dhpo_loss(batch).metrics


# -- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MIN_FORMS)
@pytest.mark.parametrize("path", PATHS)
@given(seed=seeds)
def test_weight_one_is_grpo(variant, path, seed):  # 1
    batch = random_policy_batch(seed)
    settings = {"token_weight": 1.0, "variant": variant, "sequence_gradient": path, "epsilon_high": 0.28}
    for how in ("token", "sequence"):
        ours = loss_and_grad(dhpo_loss, batch, how, **settings)
        grpo = loss_and_grad(grpo_loss, batch, how, epsilon_high=0.28)
        assert torch.equal(ours[0], grpo[0]) and torch.equal(ours[1], grpo[1])


@pytest.mark.parametrize("variant", MIN_FORMS)
@pytest.mark.parametrize("path", PATHS)
@given(seed=seeds)
def test_weight_zero_is_gspo(variant, path, seed):  # 2
    batch = random_policy_batch(seed)
    settings = {"token_weight": 0.0, "variant": variant, "sequence_gradient": path}
    widths = {"epsilon": 0.1, "epsilon_high": 0.15, "importance_sampling_level": "sequence"}
    for how in ("token", "sequence"):
        ours = loss_and_grad(dhpo_loss, batch, how, **settings, epsilon_sequence_low=0.1, epsilon_sequence_high=0.15)
        gspo = loss_and_grad(grpo_loss, batch, how, **widths)
        torch.testing.assert_close(ours[0], gspo[0])
        torch.testing.assert_close(ours[1], gspo[1])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_clip_only_reduces_to_neither(weight):  # 3
    batch = policy_batch(ratio=[[1.5]], logps=[[-1.0]], advantages=[-1])  # beyond, on the side that GRPO and GSPO keep
    assert loss_and_grad(dhpo_loss, batch, token_weight=weight, variant="clip_only")[1].item() == 0
    assert loss_and_grad(dhpo_loss, batch, token_weight=weight)[1].item() == pytest.approx(1.5)


@given(seeds, weights, st.sampled_from(MIN_FORMS), st.sampled_from(PATHS))
def test_one_token_and_equal_widths_are_grpo(seed, w, variant, path):  # 4
    batch = random_policy_batch(seed, T=1)
    settings = {"epsilon_sequence_low": 0.2, "epsilon_sequence_high": 0.2}
    ours = loss_and_grad(dhpo_loss, batch, token_weight=w, variant=variant, sequence_gradient=path, **settings)
    torch.testing.assert_close(ours[1], loss_and_grad(grpo_loss, batch)[1])


@given(seeds, weights, st.sampled_from(VARIANTS))
def test_without_bounds_the_gradient_is_the_mix(seed, w, variant):  # 5
    batch = random_policy_batch(seed)
    _, grad, _ = loss_and_grad(dhpo_loss, batch, token_weight=w, variant=variant, **WIDE)
    ratio, s = ratios(batch)
    torch.testing.assert_close(grad, -(w * ratio + (1 - w) * s) * batch.advantages * batch.mask / batch.mask.sum())


@given(seeds, weights, st.sampled_from(VARIANTS), st.sampled_from(PATHS))
def test_on_policy_it_is_reinforce(seed, w, variant, path):  # 6
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, _ = loss_and_grad(dhpo_loss, batch, token_weight=w, variant=variant, sequence_gradient=path)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())


@given(seeds, st.sampled_from(NORMALISERS), st.sampled_from(VARIANTS))
def test_the_weight_is_a_constant(seed, normaliser, variant):  # 7
    batch = with_entropies(random_policy_batch(seed), seed)
    batch = replace(batch, entropies=batch.entropies.requires_grad_())
    settings = {"mixing": "entropy", "entropy_normalizer": normaliser, "variant": variant}
    total = dhpo_loss(batch, 50, **settings).per_token_loss.sum()
    assert torch.autograd.grad(total, batch.entropies, allow_unused=True) == (None,)


@given(seeds, st.floats(0.5, 5))
def test_only_the_normalised_entropy_matters(seed, factor):  # 7: another H with the same w
    batch = with_entropies(random_policy_batch(seed), seed)
    other = replace(batch, entropies=factor * batch.entropies)
    one, two = (loss_and_grad(dhpo_loss, b, mixing="entropy")[1] for b in (batch, other))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


@given(seeds, st.floats(0, 3))
def test_the_mix_of_minima_is_the_more_pessimistic(seed, spread):  # 8
    batch = with_entropies(random_policy_batch(seed, spread=spread), seed)
    branch, joint = (dhpo_loss(batch, mixing="entropy", variant=v).per_token_loss for v in reversed(MIN_FORMS))
    assert (branch >= joint - 1e-12).all()  # losses, so the objective is the smaller one


@given(seeds, st.floats(0.05, 0.95))
def test_each_branch_dies_beyond_its_own_band(seed, w):  # 9
    batch = random_policy_batch(seed)
    widths = {"epsilon_sequence_low": 0.1, "epsilon_sequence_high": 0.15}
    ratio, s = ratios(batch)
    up, down = batch.advantages > 0, batch.advantages < 0
    token_dead = (up & (ratio > 1.2)) | (down & (ratio < 0.8))
    sequence_dead = (up & (s > 1.15)) | (down & (s < 0.9))
    alive = w * ratio * ~token_dead + (1 - w) * s * ~sequence_dead
    _, grad, out = loss_and_grad(dhpo_loss, batch, token_weight=w, variant="per_branch_min", **widths)
    torch.testing.assert_close(grad, -alive * batch.advantages * batch.mask / batch.mask.sum())
    joint = loss_and_grad(dhpo_loss, batch, token_weight=w, **widths)[1]
    assert (joint[token_dead & sequence_dead] == 0).all()
    assert torch.equal(out.metrics["dhpo/clip_ratio/token"].bool(), token_dead)
    assert torch.equal(out.metrics["dhpo/clip_ratio/sequence"].bool(), sequence_dead)
    assert torch.equal(out.metrics["dhpo/clip_ratio/both"].bool(), token_dead & sequence_dead)


@given(seeds, weights)
def test_the_clipped_mix_lies_between_the_clipped_ratios(seed, w):  # 10
    batch = replace(random_policy_batch(seed, spread=1.0), advantages=torch.ones(4, 1, dtype=torch.float64))
    m_bar = -dhpo_loss(batch, token_weight=w, variant="clip_only").per_token_loss.detach()
    ratio, s = ratios(batch)
    r_bar, s_bar = ratio.clamp(0.8, 1.2), s.clamp(1 - 3e-4, 1 + 4e-4).expand_as(ratio)
    assert (m_bar >= torch.min(r_bar, s_bar) - 1e-12).all() and (m_bar <= torch.max(r_bar, s_bar) + 1e-12).all()


@given(seeds, weights)
def test_gradient_paths_agree_where_weights_and_gates_are_uniform(seed, w):  # 11
    batch = with_entropies(random_policy_batch(seed), seed)
    token, direct = (
        loss_and_grad(dhpo_loss, batch, token_weight=w, sequence_gradient=path, **WIDE)[1] for path in PATHS
    )
    torch.testing.assert_close(token, direct)
    token, direct = (
        loss_and_grad(dhpo_loss, batch, mixing="entropy", sequence_gradient=path, **WIDE)[1] for path in PATHS
    )
    torch.testing.assert_close(token.sum(1), direct.sum(1))


def test_gradient_paths_differ_per_token_under_entropy_mixing():  # 11
    token, direct = (
        loss_and_grad(dhpo_loss, worked(), mixing="entropy", sequence_gradient=path, **WIDE)[1] for path in PATHS
    )
    assert (token - direct).abs().min() > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
@given(seed=seeds)
def test_masked_inputs_change_nothing(path, normaliser, seed):  # 12
    batch = with_entropies(random_policy_batch(seed), seed)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -5.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.1),
        entropies=torch.where(live, batch.entropies, 100.0),
    )
    settings = {"mixing": "entropy", "entropy_normalizer": normaliser, "sequence_gradient": path}
    one, two = (loss_and_grad(dhpo_loss, b, "token", vocab_size=50, **settings) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for name, x in one[2].metrics.items():
        keep = live if x.shape == live.shape else ...
        assert torch.equal(x[keep], two[2].metrics[name][keep])


@given(seeds, st.sampled_from(VARIANTS))
def test_the_other_direction_is_the_complement(seed, variant):  # 13
    batch = with_entropies(random_policy_batch(seed), seed)
    mirrored = replace(batch, entropies=math.log(50) - batch.entropies)  # 1 - w, as w is the entropy over log 50
    settings = {"vocab_size": 50, "mixing": "entropy", "entropy_normalizer": "log_vocab", "variant": variant}
    sequence = loss_and_grad(dhpo_loss, batch, entropy_to="sequence", **settings)
    token = loss_and_grad(dhpo_loss, mirrored, entropy_to="token", **settings)
    torch.testing.assert_close(sequence[0], token[0])
    torch.testing.assert_close(sequence[1], token[1], rtol=1e-6, atol=1e-7)
    # not of gradients, which are both 0 where `clip_only` has cut every token
    weights = [loss_and_grad(dhpo_loss, batch, entropy_to=to, **settings)[2].metrics for to in ("token", "sequence")]
    assert not torch.allclose(*(metrics["dhpo/weight/mean"] for metrics in weights))


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_responses_contribute_nothing(normaliser, variant):
    batch = with_entropies(random_policy_batch(3))
    for empty in (batch.mask * torch.tensor([[1.0], [0], [1], [0]]), torch.zeros_like(batch.mask)):
        masked = replace(batch, mask=empty)
        loss, grad, _ = loss_and_grad(
            dhpo_loss, masked, vocab_size=50, mixing="entropy", entropy_normalizer=normaliser, variant=variant
        )
        assert loss.isfinite() and grad.isfinite().all() and (grad[empty == 0] == 0).all()


def test_advantages_per_token():
    batch = worked()
    spread = replace(batch, advantages=batch.advantages.expand(2, 3))
    for variant in VARIANTS:
        one, two = (loss_and_grad(dhpo_loss, b, variant=variant)[1] for b in (batch, spread))
        assert torch.equal(one, two)


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("token_weight", 1.5, r"must be a number in \[0, 1\]"),
        ("token_weight", math.nan, r"must be a number in \[0, 1\]"),
        ("epsilon", 1.5, r"must be a number in \[0, 1\]"),
        ("epsilon_high", -0.1, "must be a number >= 0"),
        ("epsilon_sequence_low", -1e-4, r"must be a number in \[0, 1\]"),
        ("epsilon_sequence_high", math.nan, "must be a number >= 0"),
        ("epsilon_sequence_high", None, "must be a number >= 0"),
        ("delta", 4.0, "each branch has its own band"),
        ("importance_sampling_level", "sequence", "DHPO contains both levels"),
        ("loss_type", "luspo", "aggregation only"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(DHPOConfig, **{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_infinite_upper_bounds_are_legal():
    assert tiny_config(DHPOConfig, **WIDE).epsilon_sequence_high == math.inf


# -- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MIN_FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_weight_one_trains_exactly_as_stock_grpo(variant, path, tiny_model_path, tmp_path):  # 1
    common = dict(epsilon=0.05, epsilon_high=0.08)  # narrow, so that many tokens are cut
    args = tiny_config(DHPOConfig, tmp_path / "a", **common, token_weight=1.0, variant=variant, sequence_gradient=path)
    ours = tiny_run(DHPOTrainer, tiny_model_path, args)
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "b", **common))
    assert parameter_gap(ours.model, stock.model) == 0.0
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3
    assert max(entry.get("dhpo/clip_ratio/token", 0.0) for entry in ours.state.log_history) > 0


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_weight_zero_trains_as_stock_gspo(loss_type, path, tiny_model_path, tmp_path):  # 2
    # Not to the bit: GSPO sums a response's coefficients before it multiplies, here each token is multiplied first.
    # Plain SGD, since Adam would turn the rounding of a gradient near 0 into a whole step.
    common = dict(loss_type=loss_type, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant")
    ours = dict(token_weight=0.0, sequence_gradient=path, epsilon_sequence_low=1e-3, epsilon_sequence_high=2e-3)
    gspo = dict(importance_sampling_level="sequence", epsilon=1e-3, epsilon_high=2e-3)
    ours = tiny_run(DHPOTrainer, tiny_model_path, tiny_config(DHPOConfig, tmp_path / "a", **common, **ours))
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "b", **common, **gspo))
    assert parameter_gap(ours.model, stock.model) < 1e-6
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-2
    assert max(entry.get("dhpo/clip_ratio/sequence", 0.0) for entry in ours.state.log_history) > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_entropy_guided_runs(variant, normaliser, tiny_model_path, tmp_path):
    args = tiny_config(DHPOConfig, tmp_path, mixing="entropy", variant=variant, entropy_normalizer=normaliser)
    trainer = tiny_run(DHPOTrainer, tiny_model_path, args)
    log = trainer.state.log_history
    assert all(0 < entry["dhpo/weight/mean"] < 1 and entry["dhpo/weight/std"] > 0 for entry in log[:4])
    assert log[0]["dhpo/clip_ratio/sequence"] == 0 and log[0]["dhpo/ratio/sequence_mean"] == pytest.approx(1)
    assert log[3]["dhpo/clip_ratio/sequence"] > 0
    assert parameter_gap(trainer.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


def test_lora(tiny_model_path, tmp_path):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = tiny_config(DHPOConfig, tmp_path, mixing="entropy", entropy_normalizer="log_vocab")
    trainer = tiny_run(DHPOTrainer, tiny_model_path, args, peft_config=peft_config)
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().max() > 0 for p in moved)
