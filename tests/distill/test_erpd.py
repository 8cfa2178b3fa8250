"""ERPD against its spec: worked numbers (section 6), invariants (section 5), then real runs of both stages."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny import (
    ZeRO3,
    leave,
    loss_and_grad,
    on_two_processes,
    parameter_gap,
    policy_batch,
    random_policy_batch,
    tiny_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.integrations import deepspeed
from trl.experimental.gkd import GKDTrainer

from trl_trust import cli
from trl_trust.distill import rounds
from trl_trust.distill.erpd import (
    SIGNALS,
    ERPDConfig,
    ERPDTeacherTrainer,
    ERPDTrainer,
    erpd_signal,
    erpd_student_loss,
    erpd_teacher_loss,
    frozen_kl,
    signal_scale_of,
    signal_statistics,
)
from trl_trust.frozen.logps import completion_logps
from trl_trust.frozen.sampling import RolloutsConfig, write_rollouts
from trl_trust.frozen.store import load_rollouts
from trl_trust.quickstart.task import problems


seeds = st.integers(0, 10_000)
f64 = lambda x: torch.tensor(x, dtype=torch.float64)
close = lambda got, expected: torch.testing.assert_close(got, f64(expected), atol=1e-6, rtol=0)

# one response of three tokens, section 6
TEACHER, BASE, UNLEARNED = (f64([p]).log() for p in ((0.6, 0.05, 0.3), (0.4, 0.2, 0.3), (0.2, 0.4, 0.3)))
WORKED = {"teacher": TEACHER, "base": BASE, "old": BASE, "unlearned": UNLEARNED}


def one_token(rho, advantage, **fields):
    return policy_batch(logps=[[math.log(rho) - 2.0]], old_logps=[[-2.0]], advantages=[advantage], **fields)


def summed(margin, advantage=1.0, reward=1.0, T=4, **fields):
    """A response whose log-ratio to base sums to `margin`."""
    old = torch.full((1, T), -1.5, dtype=torch.float64)
    rewards = f64([reward])
    return policy_batch(logps=old + margin / T, old_logps=old, advantages=[advantage], rewards=rewards, **fields)


def with_base(batch, base_logps=None):
    return replace(batch, ref_logps=batch.old_logps if base_logps is None else base_logps)


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "tau", "f", "slope"),
    [
        (1, 1, 2, 1),
        (1, 1.05, 1.904762, 1),
        (1.5, 1, 2.489837, 0.940015),
        (1.5, 1.05, 2.393585, 0.934140),
        (3, 1, 3.523188, 0.419974),
        (0.2, 1, 1.240102, 0.855639),
    ],
)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_worked_sapo(rho, tau, f, slope, side):
    taus = {"sapo_temperature_pos": tau if side > 0 else 9.0, "sapo_temperature_neg": 9.0 if side > 0 else tau}
    loss, grad, _ = loss_and_grad(erpd_teacher_loss, one_token(rho, side), teacher_loss="sapo", **taus)
    close(loss, -side * f)
    close(grad / rho, [[-side * slope]])  # `grad` is by log rho


@pytest.mark.parametrize(
    ("settings", "margin", "reward", "loss", "slope"),
    [
        ({"teacher_loss": "ce"}, 4, 1.0, 0.513015, -0.401312),
        ({"teacher_loss": "ce"}, 4, 0.0, 0.913015, 0.598688),
        ({"teacher_target": "sign"}, 4, 1.0, 0.36, -1.2),
        ({"teacher_target": "sign"}, -2, 0.0, 0.64, 1.6),
        ({"teacher_target": "advantage"}, 4, 1.0, 0.36, -1.2),
    ],
)
def test_worked_ce_and_mse(settings, margin, reward, loss, slope):
    batch = summed(margin, advantage=1.0 if reward else -1.0, reward=reward)
    got, grad, out = loss_and_grad(erpd_teacher_loss, batch, "sequence", **settings)
    assert out.per_token_loss.shape == (1, 1)
    close(got, loss)
    close(grad, [[0.1 * slope] * 4])  # by S, hence by each log-probability


def test_worked_signals():
    close(erpd_signal(WORKED, "strong"), [[0.405465, -1.386294, 0]])
    close(erpd_signal(WORKED, "weak"), [[1.098612, -2.079442, 0]])
    close(erpd_signal(WORKED, "strong").sum(), -0.980829)
    close(erpd_signal(WORKED, "weak").sum(), -0.980829)
    close(erpd_signal(WORKED, "strong", signal_bound=0.2), [[0.095310, -0.162519, 0]])
    far = {**WORKED, "teacher": BASE - 50}
    close(erpd_signal(far, "strong", signal_bound=0.2), [[-0.223144] * 3])


def test_worked_scales():
    weak = erpd_signal(WORKED, "weak")
    statistics = signal_statistics(weak, torch.ones_like(weak))
    close(signal_scale_of(statistics, "std"), 1.317871)
    close(signal_scale_of(statistics, "rms"), 1.357820)
    close(signal_scale_of(statistics, "none"), 1.0)
    close(weak / signal_scale_of(statistics, "std"), [[0.833627, -1.577880, 0]])


@pytest.mark.parametrize(
    ("ratio", "objective", "loss", "dead"),
    [
        ((1.25, 1.25, 1), (1.042033, -1.972350, 0), 0.310105, (False, False)),
        ((1.35, 0.7, 1), (1.067042, -1.262304, 0), 0.065087, (True, True)),
    ],
)
def test_worked_student(ratio, objective, loss, dead):
    weak = erpd_signal(WORKED, "weak")
    scale = signal_scale_of(signal_statistics(weak, torch.ones_like(weak)), "std")
    batch = with_base(policy_batch(logps=BASE + f64([ratio]).log(), old_logps=BASE, advantages=[1.0]))
    got, grad, out = loss_and_grad(lambda b, **k: erpd_student_loss(b, weak, scale, **k), batch)
    close(-out.per_token_loss, [objective])
    close(got, loss)
    assert [(g == 0).item() for g in grad[0, :2]] == list(dead)


def expected_student_gradient(logits, teacher, **settings):
    """Gradient by `logits` of the loss, in expectation over one token of the student as it is (which is `old`)."""
    logits = f64(logits).requires_grad_()
    logps = logits.log_softmax(-1)
    old = logps.detach()
    every_token = replace(policy_batch(logps=old[:, None], advantages=[0.0] * len(logits)), logps=logps[:, None])
    signal = erpd_signal({"teacher": teacher[:, None], "old": old[:, None]}, "strong")
    wide = dict(epsilon=0.999, epsilon_high=math.inf, signal_clip=None)
    out = erpd_student_loss(with_base(every_token), signal, **{**wide, **settings})
    (grad,) = torch.autograd.grad((out.per_token_loss * old.exp()[:, None]).sum(), logits)
    return grad


def test_worked_update_direction():
    close(
        -expected_student_gradient(np.log([0.5, 0.3, 0.2]), f64([0.2, 0.5, 0.3]).log()),
        [-0.346243, 0.220389, 0.125854],
    )


def test_worked_drift_cancellation():  # and invariant 8
    base, a, d = f64([[0.4, 0.3, 0.3]]), f64([[0.5, -0.2, 0.1]]), f64([[-0.6, 0.9, 0.2]])
    normal = lambda x: (x / x.sum()).log()
    signal = erpd_signal({"teacher": normal(base * (a + d).exp()), "unlearned": normal(base * (d - a).exp())}, "weak")
    close(signal - 2 * a, [[-0.003704] * 3])


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds)
def test_a_teacher_that_is_the_student_teaches_nothing(seed):  # 1
    batch = with_base(random_policy_batch(seed))
    signal = erpd_signal({"teacher": batch.old_logps, "old": batch.old_logps}, "strong")
    assert (signal == 0).all()
    scale = signal_scale_of(signal_statistics(signal, batch.mask), "std")
    loss, grad, _ = loss_and_grad(lambda b: erpd_student_loss(b, signal, scale), batch)
    assert loss == 0 and (grad == 0).all()


@given(seeds)
def test_swapping_num_and_den_flips_the_signal(seed):  # 2
    g = torch.Generator().manual_seed(seed)
    num, den = torch.randn(2, 3, 5, generator=g, dtype=torch.float64)
    logps = {"num": num, "den": den}
    one, other = (erpd_signal(logps, [(*pair, 1.0)]) for pair in (("num", "den"), ("den", "num")))
    assert torch.equal(one, -other)
    torch.testing.assert_close(one.sum(1), num.sum(1) - den.sum(1))


def test_several_teachers_add_up_with_their_weights():
    logps = {**WORKED, "other": UNLEARNED}
    mixed = erpd_signal(logps, [("teacher", "base", 0.5), ("other", "base", -2.0)])
    torch.testing.assert_close(mixed, 0.5 * (TEACHER - BASE) - 2 * (UNLEARNED - BASE))


@given(seeds)
def test_strong_on_policy_gradient_is_that_of_the_reverse_kl(seed):  # 3
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=g, dtype=torch.float64)
    teacher = torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    logps = leaf.log_softmax(-1)
    (grad,) = torch.autograd.grad((logps.exp() * (logps - teacher)).sum(), leaf)
    torch.testing.assert_close(expected_student_gradient(logits.numpy(), teacher), grad)


@given(st.floats(-3, 3), st.floats(0.1, 5))
def test_sapo_slope(log_rho, tau):  # 4
    batch = one_token(math.exp(log_rho), 1.0)
    _, grad, _ = loss_and_grad(erpd_teacher_loss, batch, teacher_loss="sapo", sapo_temperature_pos=tau)
    slope = -grad.item() / math.exp(log_rho)
    assert 0 <= slope <= 1 + 1e-12  # 0 only where the sigmoid has no digits left
    loss, grad, _ = loss_and_grad(
        erpd_teacher_loss, one_token(1.0, 1.0), teacher_loss="sapo", sapo_temperature_pos=tau
    )
    assert loss.item() == pytest.approx(-2 / tau) and grad.item() == pytest.approx(-1)


@given(seeds)
def test_sapo_without_temperature_is_the_unclipped_importance_weighted_gradient(seed):  # 4
    batch = random_policy_batch(seed)
    zero = dict(sapo_temperature_pos=1e-5, sapo_temperature_neg=1e-5)
    _, grad, _ = loss_and_grad(erpd_teacher_loss, batch, teacher_loss="sapo", **zero)
    rho = torch.exp(batch.logps.detach() - batch.old_logps)
    torch.testing.assert_close(grad, -rho * batch.advantages * batch.mask / batch.mask.sum(), atol=1e-8, rtol=1e-6)


@given(st.floats(-60, 60), st.sampled_from([0.0, 1.0]))
def test_slopes_of_ce_and_mse(z, reward):  # 5, z = bS
    batch = lambda: summed(10 * z, advantage=1.0, reward=reward, T=1)
    _, grad, _ = loss_and_grad(erpd_teacher_loss, batch(), "sequence", teacher_loss="ce")
    assert abs(grad.item() / 0.1) <= 1 + 1e-12
    _, grad, _ = loss_and_grad(erpd_teacher_loss, batch(), "sequence")
    assert grad.item() / 0.1 == pytest.approx(2 * (z - 1), abs=1e-9)


@given(seeds)
def test_constants_get_no_gradient_and_masked_positions_change_nothing(seed):  # 6
    batch = with_base(random_policy_batch(seed))
    g = torch.Generator().manual_seed(seed)
    num, den = (torch.randn(batch.mask.shape, generator=g, dtype=torch.float64) for _ in range(2))

    def run(batch, num, den):
        signal = erpd_signal({"num": num, "den": den}, [("num", "den", 1.0)])
        scale = signal_scale_of(signal_statistics(signal, batch.mask), "std")
        return loss_and_grad(lambda b: erpd_student_loss(b, signal, scale, beta=0.3, staleness_clip=1.5), batch)

    loss, grad, _ = run(batch, num.requires_grad_(), den.requires_grad_())
    noise = lambda x: torch.where(batch.mask > 0, x.detach(), -0.7)
    noisy = replace(
        batch,
        logps=noise(batch.logps).requires_grad_(),
        old_logps=noise(batch.old_logps),
        ref_logps=noise(batch.ref_logps),
    )
    again, grad_again, _ = run(noisy, noise(num), noise(den))
    assert torch.equal(loss, again) and torch.equal(grad, grad_again)
    for loss_name in ("mse", "ce", "sapo"):
        rewards = (batch.advantages.squeeze(1) > 0).double()
        how = "token" if loss_name == "sapo" else "sequence"
        pair = [
            loss_and_grad(
                erpd_teacher_loss, replace(b, rewards=rewards), how, teacher_loss=loss_name, teacher_kl_coef=0.2
            )[:2]
            for b in (batch, noisy)
        ]
        assert all(torch.equal(x, y) for x, y in zip(*pair, strict=True))
    signal = erpd_signal({"num": num, "den": den}, [("num", "den", 1.0)])
    total = erpd_student_loss(batch, signal, beta=0.3).per_token_loss.sum()
    assert torch.autograd.grad(total, [num, den], allow_unused=True) == (None, None)


@given(seeds)
def test_without_width_a_token_that_has_moved_with_its_signal_is_frozen(seed):  # 7
    batch = with_base(random_policy_batch(seed))
    signal = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, grad, _ = loss_and_grad(lambda b: erpd_student_loss(b, signal, epsilon=0.0, epsilon_high=0.0), batch)
    followed = (batch.logps.detach() - batch.old_logps) * signal > 0
    assert (grad[followed] == 0).all()
    _, grad, _ = loss_and_grad(
        lambda b: erpd_student_loss(b, signal, epsilon=0.0, epsilon_high=0.0),
        replace(batch, logps=batch.old_logps.clone().requires_grad_()),
    )
    torch.testing.assert_close(grad, -signal.clamp(-5, 5) * batch.mask / batch.mask.sum())  # the first step is whole


def test_a_large_beta_keeps_base():  # 7
    base, teacher = f64([0.4, 0.2, 0.3, 0.1]).log(), f64([0.1, 0.1, 0.1, 0.7]).log()
    ends = []
    for beta in (0.0, 1.0, 1e4):
        logits = base.clone().requires_grad_()
        for _ in range(200):
            logps = logits.log_softmax(-1)
            batch = policy_batch(logps=logps.detach()[:, None], advantages=[0.0] * 4)
            batch = replace(batch, logps=logps[:, None], ref_logps=base[:, None])
            signal = erpd_signal({"teacher": teacher[:, None], "old": logps.detach()[:, None]}, "strong")
            loss = (erpd_student_loss(batch, signal, beta=beta).per_token_loss * base.exp()[:, None]).sum()
            (grad,) = torch.autograd.grad(loss, logits)
            logits = (logits - 0.5 / (1 + beta) * grad).detach().requires_grad_()
        logps = logits.log_softmax(-1)
        ends.append((logps.exp() * (logps - base)).sum().item())
    assert ends[0] > 0.3 > ends[1] > ends[2] and ends[2] < 1e-6


@given(seeds, st.sampled_from(["std", "rms", "none"]))
def test_scaling_keeps_signs_and_zeros(seed, kind):  # 9
    batch = with_base(random_policy_batch(seed))
    signal = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    signal = signal * (signal > -0.5) + 3.0 * (signal > 0)  # a mean far from 0, and zeros
    scale = signal_scale_of(signal_statistics(signal, batch.mask), kind)
    at_anchor = replace(batch, logps=batch.old_logps.clone().requires_grad_())
    _, grad, _ = loss_and_grad(lambda b: erpd_student_loss(b, signal, scale), at_anchor)
    live = batch.mask > 0
    if scale > 1e-8:
        assert torch.equal(-grad.sign()[live], signal.sign()[live])


def test_a_signal_of_rounding_errors_is_none():
    batch = with_base(random_policy_batch(1))
    signal = 1e-12 * torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = signal_scale_of(signal_statistics(signal, batch.mask), "std")
    loss, grad, _ = loss_and_grad(lambda b: erpd_student_loss(b, signal, scale), batch)
    assert scale < 1e-8 and loss == 0 and (grad == 0).all()


def test_an_empty_batch_gives_a_zero_loss_with_a_graph():
    batch = with_base(replace(random_policy_batch(2), mask=torch.zeros(4, 6, dtype=torch.float64)))
    loss, grad, _ = loss_and_grad(lambda b: erpd_student_loss(b, torch.ones_like(b.mask), beta=0.1), batch)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


@given(seeds)
def test_statistics_do_not_depend_on_how_a_batch_is_split(seed):
    batch = random_policy_batch(seed, B=6)
    signal = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = signal_statistics(signal, batch.mask)
    parts = signal_statistics(signal[:2], batch.mask[:2]) + signal_statistics(signal[2:], batch.mask[2:])
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(signal_scale_of(whole, "std"), signal[batch.mask > 0].std(correction=0))


@given(seeds)
def test_frozen_kl_is_unbiased_under_base_and_never_negative(seed):
    p, q, base = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    entries = frozen_kl(p, q, base)
    assert (entries >= 0).all()
    torch.testing.assert_close((base.exp() * entries).sum(), (p.exp() * (p - q)).sum())


def test_options_of_the_student():
    batch = with_base(
        policy_batch(logps=[[-1.0, -1.0, -1.0]], old_logps=[[-1.0, -1.0, -1.0]], advantages=[2.0]),
        f64([[-3.0, -1.0, -0.5]]),
    )
    signal = f64([[1.0, -1.0, 0.5]])
    plain = {"staleness_clip": None}
    weights = lambda **settings: (
        -3 * loss_and_grad(lambda b: erpd_student_loss(b, signal, **{**plain, **settings}), batch)[1]
    )
    close(weights(), [[1, -1, 0.5]])
    close(weights(outcome_gate=True), [[1, 0, 0.5]])
    close(weights(staleness_clip=2.0), [[2, -1, 0.5 * math.exp(-0.5)]])
    close(weights(signal_clip=0.7), [[0.7, -0.7, 0.5]])


@given(seeds)
def test_only_the_staleness_weight_makes_a_constant_signal_no_signal(seed):
    """On responses of base, once the student has left it: unweighted, a constant pushes along the gradient of
    KL(base || student), and a negative one, which is what a signal has on average there, away from base."""
    base, start = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base = base.log_softmax(-1)

    def gradient(constant, **settings):
        leaf = start.clone().requires_grad_()
        logps = leaf.log_softmax(-1)
        every_token = policy_batch(logps=logps.detach()[:, None], advantages=[0.0] * 5)
        batch = replace(every_token, logps=logps[:, None], ref_logps=base[:, None])
        loss = erpd_student_loss(batch, torch.full((5, 1), constant, dtype=torch.float64), **settings).per_token_loss
        return torch.autograd.grad((loss * base.exp()[:, None]).sum(), leaf)[0]

    leaf = start.clone().requires_grad_()
    (away,) = torch.autograd.grad((base.exp() * (base - leaf.log_softmax(-1))).sum(), leaf)
    torch.testing.assert_close(gradient(-1.0, staleness_clip=None), -away)
    torch.testing.assert_close(gradient(-1.0, staleness_clip=1e9), torch.zeros_like(away), atol=1e-12, rtol=0)


@given(seeds)
def test_the_twin_learns_the_opposite(seed):
    batch = random_policy_batch(seed)
    rewards = (batch.advantages.squeeze(1) > 0).double()
    flipped = replace(batch, advantages=-batch.advantages, rewards=1 - rewards)
    for name in ("mse", "ce", "sapo"):
        how = "token" if name == "sapo" else "sequence"
        one = loss_and_grad(erpd_teacher_loss, replace(batch, rewards=rewards), how, teacher_loss=name, unlearn=True)
        two = loss_and_grad(erpd_teacher_loss, flipped, how, teacher_loss=name)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


# -- settings ---------------------------------------------------------------------------------------------------------


def settings(folder, stage, **overrides):
    small = dict(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=8,
    )
    return ERPDConfig(output_dir=str(folder), stage=stage, **{**small, **overrides})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stage", None, "'teacher' or 'student'"),
        ("stage", "both", "'teacher' or 'student'"),
        ("teacher_loss", "dpo", "one of 'mse', 'sapo', 'ce'"),
        ("teacher_target", "reward", "'advantage' or 'sign'"),
        ("teacher_beta", 0.0, "finite number > 0"),
        ("sapo_temperature_pos", -1.0, "finite number > 0"),
        ("sapo_temperature_neg", math.nan, "finite number > 0"),
        ("teacher_kl_coef", -0.1, "finite number >= 0"),
        ("signal", "contrast", "one of strong, base_contrast, weak"),
        ("signal", None, "list of"),
        ("signal", [], "list of"),
        ("signal", [("teacher", "old")], "list of"),
        ("signal", [("teacher", "teacher", 1.0)], "two different policies"),
        ("signal", [("teacher", "old", math.inf)], "a finite number"),
        ("signal", "[['teacher'", "not a list in JSON"),
        ("signal_scale", "mean", "one of 'std', 'rms', 'none'"),
        ("signal_clip", 0.0, "> 0, or None"),
        ("signal_bound", 1.0, r"in \(0, 1\), or None"),
        ("staleness_clip", -1.0, "> 0, or None"),
        ("epsilon", 1.0, r"in \[0, 1\)"),
        ("epsilon_high", -0.1, "number >= 0"),
        ("beta", -1.0, "finite number >= 0"),
        ("temperature", 0.0, "finite number > 0"),
        ("steps_per_anchor", 0, "whole number >= 1"),
        ("lmbda", 0.5, "rollouts are frozen"),
        ("seq_kd", True, "rollouts are frozen"),
        ("max_new_tokens", 64, "those of the rollouts"),
        ("max_length", 512, "never truncated"),
        ("loss_type", "dft", "does not read"),
        ("disable_dropout", False, "under dropout"),
        ("neftune_noise_alpha", 5.0, "under noise"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        settings("unused", **{"stage": "student", field: value})
    assert f"{field}=" in str(error.value)


def test_legal_settings():
    assert settings("unused", "student", beta=3.0, epsilon_high=math.inf, signal_clip=None).beta == 3.0
    listed = [("teacher", "old", 0.5), ("other", "base", -1.0)]
    from_words = '[["teacher", "old", 0.5], ["other", "base", -1]]'
    for signal in (listed, [list(term) for term in listed], from_words):
        args = settings("unused", "student", signal=signal)
        assert args.signal == listed and args.policies == ["base", "other", "teacher"]
    assert settings("unused", "student").policies == ["base", "teacher", "unlearned"]
    assert settings("unused", "teacher").policies == ["base"]
    with pytest.raises(ValueError, match=r"teacher_beta=0\.2: .* does not read `teacher_beta`; teacher_loss='sapo'"):
        settings("unused", "teacher", teacher_loss="sapo", teacher_beta=0.2)


# -- real runs --------------------------------------------------------------------------------------------------------


def answer_length(completions, **kwargs):
    """A binary reward that an untrained model earns about half of the time: few digits."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(c.isdigit() for c in text) <= 1) for text in texts]


def freeze(model_path, folder):
    config = dict(num_prompts=12, num_generations=4, max_completion_length=8, prompts_per_part=12, use_cpu=True)
    return write_rollouts(model_path, problems("train", 12), answer_length, RolloutsConfig(str(folder), **config))


def build(trainer_class, model_path, args, data, **kwargs):
    """A trainer of one stage. Like `tiny_run`: build it right before it is trained."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    kwargs.setdefault("processing_class", AutoTokenizer.from_pretrained(model_path))
    trainer = trainer_class(model, args=args, train_dataset=data, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(*args, resume=None, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def with_column(data, name, model):
    return data.add_column(f"{name}_logps", completion_logps(model, data.to_list()))


@pytest.fixture(scope="module")
def frozen(tiny_model_path, tmp_path_factory):
    """Rollouts of the tiny model, with the log-probabilities of a trained teacher and of its twin."""
    folder = tmp_path_factory.mktemp("erpd")
    data = load_rollouts(freeze(tiny_model_path, folder / "rollouts"))
    models = {
        name: train(
            ERPDTeacherTrainer,
            tiny_model_path,
            settings(folder / name, "teacher", unlearn=name == "unlearned", max_steps=12),
            data,
        ).model
        for name in ("teacher", "unlearned")
    }
    for name, model in models.items():
        data = with_column(data, name, model)
    return data, models


@pytest.mark.parametrize("teacher_loss", ["mse", "ce", "sapo"])
def test_the_teacher_learns_and_its_twin_unlearns(teacher_loss, frozen, tiny_model_path, tmp_path):
    data = frozen[0]
    gaps = {}
    for unlearn in (False, True):
        args = settings(tmp_path, "teacher", teacher_loss=teacher_loss, unlearn=unlearn, max_steps=16)
        trainer = train(ERPDTeacherTrainer, tiny_model_path, args, data)
        assert isinstance(trainer, GKDTrainer)
        assert logged(trainer, "trust/ratio/max")[0] == pytest.approx(1.0, abs=1e-4)  # it starts at base
        assert abs(logged(trainer, "erpd/kl_base")[0]) < 1e-6 < logged(trainer, "erpd/kl_base")[-1]
        for name in ("erpd/rho_max", "erpd/length", "entropy", "erpd/teacher_reward_acc", "trust/ess", "grad_norm"):
            assert all(map(math.isfinite, logged(trainer, name))) and len(logged(trainer, name)) == 16
        pos, neg = (logged(trainer, f"erpd/implicit_reward_{sign}")[-1] for sign in ("pos", "neg"))
        gaps[unlearn] = pos - neg
        assert (logged(trainer, "erpd/teacher_reward_acc")[-1] > 0.5) != unlearn
    assert gaps[False] > 0 > gaps[True]


def test_the_kl_coefficient_holds_the_teacher_back(frozen, tiny_model_path, tmp_path):
    kl = [
        logged(
            train(ERPDTeacherTrainer, tiny_model_path, settings(tmp_path, "teacher", teacher_kl_coef=c), frozen[0]),
            "erpd/kl_base",
        )[-1]
        for c in (0.0, 30.0)
    ]
    assert kl[1] < 0.5 * kl[0]


@pytest.mark.parametrize("signal", ["strong", "base_contrast", "weak", [("unlearned", "base", -1.0)]])
def test_the_student_follows_the_signal_and_is_re_anchored(signal, frozen, tiny_model_path, tmp_path):
    args = settings(tmp_path, "student", signal=signal, steps_per_anchor=3, max_steps=8, learning_rate=2e-3)
    trainer = train(ERPDTrainer, tiny_model_path, args, frozen[0])
    steps_an_epoch = len(trainer.get_train_dataloader()) // 2
    low, high = logged(trainer, "trust/ratio/min"), logged(trainer, "trust/ratio/max")
    for step in range(8):
        at_anchor = (step % steps_an_epoch) % 3 == 0
        assert (low[step] == high[step] == 1.0) == at_anchor  # to the bit
    for name in ("erpd/signal_std", "erpd/signal_clipped", "erpd/signal_adv_agreement", "clip_ratio/region_mean"):
        assert all(map(math.isfinite, logged(trainer, name)))
    after = completion_logps(trainer.model, frozen[0].to_list())
    moved = np.concatenate([np.subtract(x, y) for x, y in zip(after, frozen[0]["base_logps"], strict=True)])
    columns = {name: np.concatenate(frozen[0][f"{name}_logps"]) for name in ("teacher", "base", "unlearned")}
    wanted = sum(
        w * (columns[num] - columns["base" if den == "old" else den])
        for num, den, w in (SIGNALS[signal] if isinstance(signal, str) else signal)
    )
    assert np.corrcoef(moved, wanted)[0, 1] > 0.2
    if signal == "strong":
        kl = logged(trainer, "erpd/kl_teacher")
        assert kl[-1] < kl[0]


def test_a_teacher_may_be_a_column_or_a_model_or_a_folder(frozen, tiny_model_path, tmp_path):
    data, models = frozen
    args = lambda: settings(tmp_path, "student", steps_per_anchor=2, max_steps=3)
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    column = train(ERPDTrainer, tiny_model_path, args(), data)
    bare = data.remove_columns(["teacher_logps", "unlearned_logps", "base_logps"])
    given = dict(teacher_model=models["teacher"], policies={"unlearned": models["unlearned"]})
    model = train(ERPDTrainer, tiny_model_path, args(), bare, **given)
    assert parameter_gap(column.model, model.model) < 1e-4
    models["teacher"].save_pretrained(tmp_path / "teacher")
    given = {**given, "teacher_model": str(tmp_path / "teacher")}
    assert parameter_gap(model.model, train(ERPDTrainer, tiny_model_path, args(), bare, **given).model) == 0.0
    named = settings(
        tmp_path,
        "student",
        steps_per_anchor=2,
        max_steps=3,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    given = {"policies": {"unlearned": models["unlearned"]}}
    assert parameter_gap(model.model, train(ERPDTrainer, tiny_model_path, named, bare, **given).model) == 0.0
    with pytest.raises(ValueError, match=r"teacher_model_init_kwargs=.* nothing is loaded with it"):
        named.teacher_model_name_or_path = None
        build(ERPDTrainer, tiny_model_path, named, data)
    for name, parameters in before.items():
        assert all(torch.equal(p, q) for p, q in zip(parameters, models[name].parameters(), strict=True))


@pytest.mark.parametrize("trainer_class", [ERPDTeacherTrainer, ERPDTrainer])
@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(trainer_class, peft, frozen, tiny_model_path, tmp_path):
    from peft import LoraConfig

    def run(folder, resume=None, **overrides):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if peft else None
        args = settings(folder, trainer_class.stage, steps_per_anchor=3, max_steps=9, **overrides)
        return train(trainer_class, tiny_model_path, args, frozen[0], peft_config=lora, resume=resume)

    whole = run(tmp_path / "whole")
    run(tmp_path / "first", save_strategy="steps", save_steps=2)
    step = 3 if trainer_class is ERPDTrainer else 2  # the student's checkpoint waits for the end of the iteration
    assert (tmp_path / "first" / f"checkpoint-{step}" / "trainer_state.json").exists()
    assert not (tmp_path / "first" / f"checkpoint-{5 - step}").exists()
    resumed = run(tmp_path / "again", resume=str(tmp_path / "first" / f"checkpoint-{step}"))
    assert parameter_gap(whole.model, resumed.model) == 0.0
    begin = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    if peft:
        assert parameter_gap(whole.model.unload(), begin) == 0.0  # the base weights have not moved
        trained = [p.abs().max() for n, p in run(tmp_path / "x").model.named_parameters() if "lora_B" in n]
        assert trained and all(x > 0 for x in trained)
    else:
        assert parameter_gap(whole.model, begin) > 1e-3
    assert logged(whole, "loss")[-3:] == logged(resumed, "loss")[-3:]


def test_base_of_an_adapter_is_the_model_without_it(frozen, tiny_model_path, tmp_path):
    from peft import LoraConfig

    bare = frozen[0].remove_columns("base_logps")
    args = settings(tmp_path, "teacher", max_steps=3)
    trainer = build(
        ERPDTeacherTrainer, tiny_model_path, args, bare, peft_config=LoraConfig(target_modules="all-linear")
    )
    read = trainer.train_dataset["base_logps"]
    trainer.train()
    with trainer.model.disable_adapter():
        without = completion_logps(trainer.model, trainer.train_dataset.to_list())
    for x, y in zip(read, without, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert logged(trainer, "erpd/kl_base")[-1] > 0


def test_only_the_backward_reaches_what_the_model_returns(frozen, tiny_model_path, tmp_path):
    """DeepSpeed starts its backward where a gradient arrives there: telemetry's must not, which looks at each step."""
    for trainer_class in (ERPDTeacherTrainer, ERPDTrainer):
        args = settings(tmp_path, trainer_class.stage, max_steps=2, gradient_accumulation_steps=2)
        trainer, arrived = build(trainer_class, tiny_model_path, args, frozen[0]), []
        inner = trainer.model.forward

        def hooked(*args, _inner=inner, _arrived=arrived, **kwargs):
            output = _inner(*args, **kwargs)
            for name, x in output.items():
                if torch.is_tensor(x) and x.requires_grad:
                    x.register_hook(lambda grad, name=name: _arrived.append(name))
            return output

        trainer.model.forward = hooked
        trainer.train()
        assert arrived == ["log_probs"] * 4


def test_logits_are_never_held(frozen, tiny_model_path, tmp_path):
    def refuse(*args):
        raise AssertionError("the LM head was called as a module")

    for trainer_class in (ERPDTeacherTrainer, ERPDTrainer):
        args = settings(tmp_path, trainer_class.stage, max_steps=2)
        bare = frozen[0].remove_columns(["base_logps", "teacher_logps"])
        given = {"teacher_model": frozen[1]["teacher"]} if trainer_class is ERPDTrainer else {}
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
        model.lm_head.register_forward_pre_hook(refuse)
        hook = frozen[1]["teacher"].lm_head.register_forward_pre_hook(refuse)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        trainer = trainer_class(model, args=args, train_dataset=bare, processing_class=tokenizer, **given)
        assert trainer.train().global_step == 2
        hook.remove()


def test_evaluation_measures_and_does_not_disturb(frozen, tiny_model_path, tmp_path):
    plain = train(ERPDTrainer, tiny_model_path, settings(tmp_path, "student", steps_per_anchor=3), frozen[0])
    args = settings(tmp_path, "student", steps_per_anchor=3, eval_strategy="steps", eval_steps=2)
    evaluated = train(ERPDTrainer, tiny_model_path, args, frozen[0], eval_dataset=frozen[0])
    assert parameter_gap(plain.model, evaluated.model) == 0.0
    assert len(logged(evaluated, "eval_loss")) == 4 and all(map(math.isfinite, logged(evaluated, "eval_erpd/kl_base")))
    assert logged(evaluated, "eval_trust/ratio/max") == [1.0] * 4
    assert all(share < 1 for share in logged(evaluated, "eval_trust/zero_grad"))  # the gradient is looked at here too


def test_temperature_is_that_of_the_ratios(frozen, tiny_model_path, tmp_path):
    args = settings(tmp_path, "teacher", temperature=0.5, max_steps=1)
    with pytest.raises(
        ValueError, match=r"temperature=0\.5, but the rollouts were sampled, .* at 1\.0; set it to that"
    ):
        build(ERPDTeacherTrainer, tiny_model_path, args, frozen[0])
    data = frozen[0].remove_columns(["base_logps", "temperature"])  # of unknown temperature
    trainer = train(ERPDTeacherTrainer, tiny_model_path, args, data)
    expected = completion_logps(
        AutoModelForCausalLM.from_pretrained(tiny_model_path), trainer.train_dataset.to_list(), temperature=0.5
    )
    np.testing.assert_allclose(
        np.concatenate(trainer.train_dataset["base_logps"]), np.concatenate(expected), atol=1e-5
    )
    assert logged(trainer, "trust/ratio/max")[0] == pytest.approx(1.0, abs=1e-4)


def test_router_loss_of_a_mixture_of_experts_is_kept(frozen, tiny_model_path, tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    sizes = dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1, head_dim=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **heads))
    model.save_pretrained(tmp_path / "moe")
    bare = frozen[0].remove_columns(["base_logps"])
    losses = []
    for coef in (0.0, 10.0):
        args = settings(tmp_path, "teacher", max_steps=1, router_aux_loss_coef=coef)
        trainer = train(ERPDTeacherTrainer, str(tmp_path / "moe"), args, bare, processing_class=tokenizer)
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] > losses[0] + 5  # a balanced router has an auxiliary loss of about 1


def test_the_model_card_says_what_it_is(frozen, tiny_model_path, tmp_path):
    trainer = build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), frozen[0])
    trainer.create_model_card(model_name="x")
    body = (tmp_path / "README.md").read_text().split("---\n")[2]
    assert body.strip().startswith("*A reconstruction of ERPD (arXiv 2605.25582): no equation of the paper")
    assert "ERPD, stage 2 (a reconstruction)" in body and "Extreme Region Policy Distillation" in body


def test_what_does_not_fit_raises_at_construction(frozen, tiny_model_path, tmp_path):
    data, models = frozen
    with pytest.raises(
        ValueError, match="reads the policy 'unlearned', but the rollouts have no column unlearned_logps"
    ):
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), data.remove_columns("unlearned_logps"))
    with pytest.raises(ValueError, match=r"no column teacher_logps: .*pass `teacher_model`"):
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), data.remove_columns("teacher_logps"))
    only = settings(tmp_path, "student", signal=[("unlearned", "base", -1.0)], max_steps=1)
    trainer = train(
        ERPDTrainer, tiny_model_path, only, data.remove_columns("teacher_logps"), teacher_model=models["teacher"]
    )
    assert logged(trainer, "erpd/kl_teacher")[0] > 0  # a teacher that is given is looked at
    with pytest.raises(ValueError, match="args is a GRPOConfig: ERPDTrainer takes a ERPDConfig"):
        build(ERPDTrainer, tiny_model_path, tiny_config(), data)
    with pytest.raises(ValueError, match="stage='teacher': ERPDTrainer trains the student"):
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "teacher"), data)
    scores = data.remove_columns("reward").add_column("reward", [5.0 * x for x in data["reward"]])
    with pytest.raises(ValueError, match=r"teacher_loss='ce' takes rewards in \[0, 1\]"):
        build(ERPDTeacherTrainer, tiny_model_path, settings(tmp_path, "teacher", teacher_loss="ce"), scores)
    other = type(models["teacher"])(
        type(models["teacher"].config)(**{**models["teacher"].config.to_dict(), "vocab_size": 99})
    )
    bare = data.remove_columns("teacher_logps")
    build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), bare, teacher_model=other)  # padded: the same
    other.resize_token_embeddings(4)
    with pytest.raises(ValueError, match="teacher=.* knows 4 token ids, but the policy's tokens go up to"):
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), bare, teacher_model=other)
    models["teacher"].save_pretrained(tmp_path / "swapped")
    AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "swapped")
    tokenizer = json.loads((tmp_path / "swapped" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["7"], ids["8"] = ids["8"], ids["7"]
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="teacher=.* has another tokenizer than the policy"):
        swapped = str(tmp_path / "swapped")
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), bare, teacher_model=swapped)
    with pytest.raises(ValueError, match="eval_dataset has easy, hard: ERPDTrainer evaluates on one set of rollouts"):
        sets = {"easy": data, "hard": data}
        build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student"), data, eval_dataset=sets)


@pytest.mark.parametrize(("save_strategy", "load"), [("steps", True), ("best", False)])
def test_the_best_checkpoint_is_one_that_is_written(save_strategy, load, frozen, tiny_model_path, tmp_path):
    """And none lies within a batch iteration: where the best counts, evaluations wait for its end, too."""
    args = settings(
        tmp_path,
        "student",
        steps_per_anchor=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy=save_strategy,
        save_steps=1,
        load_best_model_at_end=load,
        metric_for_best_model="eval_erpd/kl_base",
        greater_is_better=True,
    )
    trainer = train(ERPDTrainer, tiny_model_path, args, frozen[0], eval_dataset=frozen[0])
    steps_an_epoch = len(trainer.get_train_dataloader()) // 2
    ends = {s for s in range(1, 9) if s % steps_an_epoch == 0 or s % steps_an_epoch % 2 == 0}
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    written = {int(path.parent.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*/trainer_state.json")}
    assert set(evaluated) == ends and written <= ends
    best = max(
        (entry["eval_erpd/kl_base"], entry["step"]) for entry in trainer.state.log_history if "eval_loss" in entry
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best[1]}")
    assert best[1] in written


def test_batches_are_padded_to_a_multiple(frozen, tiny_model_path, tmp_path):
    trainer = build(ERPDTrainer, tiny_model_path, settings(tmp_path, "student", pad_to_multiple_of=32), frozen[0])
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] == 32


def test_a_broken_student_raises_at_the_anchor(frozen, tiny_model_path, tmp_path):
    args = settings(tmp_path, "student", signal="strong")
    trainer = build(ERPDTrainer, tiny_model_path, args, frozen[0])
    trainer.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="log-probability that is not finite"):
        trainer.train()


# -- several processes ------------------------------------------------------------------------------------------------


def layout_run(stage, model_path, folder, data_path, processes, accumulation):
    """Parameters after three SGD steps of 16 responses: sums, counts and scales must not depend on the layout."""
    stage, teacher_loss, *twin = [*stage.split("-"), "mse"][:3]
    trainer_class = {"teacher": ERPDTeacherTrainer, "student": ERPDTrainer}[stage]
    args = settings(
        folder,
        trainer_class.stage,
        optim="sgd",
        learning_rate=0.3,
        max_grad_norm=0.0,
        max_steps=3,
        steps_per_anchor=2,
        per_device_train_batch_size=16 // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        teacher_loss=teacher_loss,
        unlearn=twin == ["twin"],
    )
    data = load_rollouts(data_path)
    g = np.random.default_rng(0)
    for name in ("teacher", "unlearned"):  # any other policies
        logps = [np.asarray(x) + g.normal(size=len(x)) for x in data["base_logps"]]
        data = data.add_column(f"{name}_logps", logps)
    if teacher_loss == "sapo":  # the trainer reads it itself, an n-th of the rows on each process
        data = data.remove_columns("base_logps")
    trainer = train(trainer_class, model_path, args, data)
    parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    return {
        **{k: p.detach().clone() for k, p in parameters},
        "log": torch.tensor([logged(trainer, name) for name in ("loss", "grad_norm", "entropy", "erpd/kl_base")]),
    }


LAYOUTS = ("teacher-mse", "teacher-sapo", "student")


@pytest.fixture(scope="module")
def two_processes(tiny_model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("two-processes")
    freeze(tiny_model_path, out / "rollouts")
    on_two_processes(__file__, out, tiny_model_path, timeout=400)
    return out


@pytest.mark.parametrize("stage", LAYOUTS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_processes_train_like_one(stage, accumulation, two_processes, tiny_model_path, tmp_path):
    one = layout_run(stage, tiny_model_path, tmp_path, two_processes / "rollouts", 1, accumulation)
    ranks = [torch.load(two_processes / f"{stage}-{rank}.pt") for rank in (0, 1)]
    begin = dict(AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).named_parameters())
    for key in begin:
        torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0][key], one[key], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(ranks[0]["log"], one["log"], rtol=1e-3, atol=1e-4)
    assert max((one[key] - begin[key]).abs().max().item() for key in begin) > 1e-3


# -- the rounds -------------------------------------------------------------------------------------------------------


ROLLOUTS = {"num_prompts": 6, "num_generations": 4, "max_completion_length": 8}


def recipe(folder, model_path, **overrides):
    """Words of a command line that name a recipe of two rounds."""
    folder.mkdir(exist_ok=True)
    problems("train", 40).to_json(folder / "data.jsonl")
    lines = {
        "model_name_or_path": model_path,
        "dataset_name": str(folder / "data.jsonl"),
        "reward_funcs": [f"{__name__}.answer_length"],
        "output_dir": str(folder / "out"),
        "rounds": 2,
        "rollouts": {**ROLLOUTS, "prompts_per_part": 3, "seed": 7},
        "teacher": {"num_train_epochs": 2, "teacher_kl_coef": 0.01},
        "student": {"num_train_epochs": 1, "learning_rate": 1e-3},
        "steps_per_anchor": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_processes": 1,  # the launcher's
    }
    fields = settings("unused", "student").to_dict()
    small = ("use_cpu", "bf16", "gradient_checkpointing", "disable_tqdm", "lr_scheduler_type", "learning_rate")
    lines |= {name: fields[name] for name in (*small, "per_device_train_batch_size")} | {"report_to": "none"}
    (folder / "recipe.yaml").write_text(json.dumps({**lines, **overrides}))
    return ["--config", str(folder / "recipe.yaml")]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def two_rounds(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rounds")
    assert rounds.main(recipe(folder, tiny_model_path)) == 0
    return folder / "out"


def test_rounds_from_end_to_end(two_rounds, tiny_model_path):
    for number in (1, 2):
        folder = two_rounds / f"round-{number}"
        base = tiny_model_path if number == 1 else two_rounds / "round-1" / "student"
        models = {name: weights(folder / name) for name in ("teacher", "unlearned", "student")}
        assert all(parameter_gap(model, weights(base)) > 1e-4 for model in models.values())
        data = load_rollouts(folder / "rollouts")
        for name, model in {"base": weights(base), **models}.items():
            if name != "student":
                read = np.concatenate(completion_logps(model, data.to_list()))
                np.testing.assert_allclose(np.concatenate(data[f"{name}_logps"]), read, atol=1e-4)
        stage = json.loads((folder / "teacher" / "stage.json").read_text())
        assert stage["teacher_kl_coef"] == 0.01 and stage["learning_rate"] == 5e-3 and not stage["unlearn"]
        assert json.loads((folder / "student" / "stage.json").read_text())["learning_rate"] == 1e-3
        assert json.loads((folder / "unlearned" / "stage.json").read_text())["unlearn"]
    prompts = [set(load_rollouts(two_rounds / f"round-{number}" / "rollouts")["prompt"]) for number in (1, 2)]
    assert prompts[0] != prompts[1]
    seeds = [
        json.loads((two_rounds / f"round-{n}" / "rollouts" / "settings.json").read_text())["seed"] for n in (1, 2)
    ]
    assert seeds == [7, 8]


def test_a_finished_run_is_passed_over(two_rounds, tiny_model_path, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished stage was begun again")

    monkeypatch.setattr(rounds, "ERPDTeacherTrainer", refuse)
    monkeypatch.setattr(rounds, "ERPDTrainer", refuse)
    for room in ("logps", "sampling"):
        monkeypatch.setattr(f"trl_trust.frozen.{room}.load_policy", refuse)
    assert rounds.main(recipe(two_rounds.parent, tiny_model_path)) == 0


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_an_interrupted_stage_is_resumed(stage, two_rounds, tiny_model_path, tmp_path, monkeypatch):
    trainer_class = {"teacher": "ERPDTeacherTrainer", "student": "ERPDTrainer"}[stage]

    class Interrupted(getattr(rounds, trainer_class)):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    words = recipe(tmp_path, tiny_model_path, rounds=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rounds, trainer_class, Interrupted)
        rounds.main(words)
    first = tmp_path / "out" / "round-1" / stage
    assert not (first / "done").exists() and rounds.last_checkpoint(first).endswith("checkpoint-2")
    (first / "checkpoint-3").mkdir()  # one that was not written to its end
    assert rounds.main(words) == 0
    for name in ("teacher", "unlearned", "student"):
        gap = parameter_gap(weights(two_rounds / "round-1" / name), weights(tmp_path / "out" / "round-1" / name))
        assert gap == 0.0


def test_adapters_are_merged(tiny_model_path, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "signal": "strong"}
    assert rounds.main(recipe(tmp_path, tiny_model_path, **lora)) == 0
    out = tmp_path / "out"
    assert (out / "round-1" / "student" / "adapter" / "adapter_model.safetensors").exists()
    assert not (out / "round-1" / "unlearned").exists()  # `strong` does not read it
    before, after = weights(tiny_model_path), weights(out / "round-2" / "student")
    changed = {
        n for (n, p), q in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed and all("q_proj.weight" in name or "v_proj.weight" in name for name in changed)


def test_an_adapter_is_pushed_merged(tiny_model_path, tmp_path, monkeypatch):
    """Whatever a checkpoint has pushed; and the folder holds the merged model, and only it."""
    import transformers.trainer
    from transformers import Trainer

    pushed = []

    class Hub:
        def __init__(self, **kwargs):
            pass

        def upload_folder(self, folder_path, **kwargs):
            pushed.append((sorted(path.name for path in Path(folder_path).iterdir() if path.is_file()), kwargs))
            return SimpleNamespace(is_done=lambda: True)

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: Hub())
    monkeypatch.setattr(rounds, "HfApi", Hub, raising=False)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    hub = dict(hub_model_id="me/x", push_in_progress=None)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: vars(self).update(hub))
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "signal": "base_contrast"}
    steps = {"teacher": {"max_steps": 1}, "student": {"max_steps": 2}}
    words = recipe(tmp_path, tiny_model_path, rounds=1, push_to_hub=True, hub_strategy="every_save", **lora, **steps)
    assert rounds.main(words) == 0
    student = tmp_path / "out" / "round-1" / "student"
    files, options = pushed[-1]
    assert "adapter_config.json" in pushed[0][0]  # of the checkpoint
    assert "model.safetensors" in files and not [name for name in files if name.startswith("adapter_")]
    assert not list(student.glob("adapter_*"))
    assert options["repo_id"] == "me/x" and options["delete_patterns"] == "adapter_*"
    merged = weights(student)
    assert type(merged) is type(weights(tiny_model_path)) and parameter_gap(merged, weights(tiny_model_path)) > 0
    assert len(pushed) == 2


def test_a_stage_that_made_nothing_takes_other_settings(tiny_model_path, tmp_path, monkeypatch):
    """Out of memory at the first step; then half the micro-batch."""

    class TooLarge(rounds.ERPDTeacherTrainer):
        def compute_loss(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    short = dict(rounds=1, signal="base_contrast", teacher={"max_steps": 1}, student={"max_steps": 1})
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(rounds, "ERPDTeacherTrainer", TooLarge)
        rounds.main(recipe(tmp_path, tiny_model_path, **short))
    smaller = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert rounds.main(recipe(tmp_path, tiny_model_path, **short, **smaller)) == 0


def test_further_teachers_by_name(two_rounds, tiny_model_path, tmp_path):
    signal = [["teacher", "base", 0.5], ["elder", "base", 0.5]]
    elder = {"elder": str(two_rounds / "round-1" / "teacher")}
    assert rounds.main(recipe(tmp_path, tiny_model_path, rounds=1, student={"signal": signal}, policies=elder)) == 0
    data = load_rollouts(tmp_path / "out" / "round-1" / "rollouts")
    assert {"teacher_logps", "elder_logps"} <= set(data.column_names)
    with pytest.raises(ValueError, match="reads elder; name a model in `policies`"):
        rounds.main(recipe(tmp_path, tiny_model_path, rounds=1, signal=signal, policies=None))


@pytest.mark.parametrize(
    ("zero", "env", "overrides", "message"),
    [
        ({"stage3_gather_16bit_weights_on_model_save": True}, {}, {"use_peft": True}, "use_peft=True under ZeRO-3"),
        ({}, {}, {}, "zero3_save_16bit_model=False"),
        (None, {"ACCELERATE_USE_FSDP": "true"}, {"use_peft": True}, "use_peft=True under FSDP.*use ZeRO-2"),
        (
            None,
            {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            {},
            "fsdp_state_dict_type=SHARDED_STATE_DICT: .* set it to FULL_STATE_DICT",
        ),
        ({"stage3_gather_16bit_weights_on_model_save": True}, {}, {}, None),
        (None, {"ACCELERATE_USE_FSDP": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, {}, None),
    ],
)
def test_models_that_no_stage_could_leave_whole_are_refused(
    zero, env, overrides, message, tiny_model_path, tmp_path, monkeypatch
):
    sharding = None if zero is None else ZeRO3(**zero)
    try:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        if sharding is not None:
            deepspeed.set_hf_deepspeed_config(sharding)
        words = recipe(tmp_path, tiny_model_path, **overrides)
        if message is None:
            rounds.prepare(words)
            return
        with pytest.raises(ValueError, match=message) as error:
            rounds.prepare(words)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    finally:
        deepspeed.unset_hf_deepspeed_config()


RECIPES = [name for name in cli.recipes() if name.startswith("erpd/")]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_in_small(name, tiny_model_path, tmp_path):
    path = cli.recipes()[name]
    lines = yaml.safe_load(path.read_text())
    column = lines.get("prompt_column", "prompt")
    rows = [{column: row["prompt"], "answer": row["answer"]} for row in problems("train", 20)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = dict(num_prompts=4, num_generations=4, max_completion_length=8, use_vllm=False)
    lines |= {
        "model_name_or_path": tiny_model_path,
        "dataset_name": str(tmp_path / "d.jsonl"),
        "dataset_config": None,
        "reward_funcs": [*lines["reward_funcs"], f"{__name__}.answer_length"],
        "output_dir": str(tmp_path / "out"),
        "rounds": min(lines["rounds"], 2),
        "rollouts": {**lines["rollouts"], **small},
        "teacher": {**lines["teacher"], "max_steps": 2},
        "student": {**lines["student"], "max_steps": 6},
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        **dict(use_cpu=True, bf16=False, dtype="float32", gradient_checkpointing=False),
        **dict(report_to="none", disable_tqdm=True),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(lines))
    assert path.read_text().startswith("# ERPD (a reconstruction)")
    assert cli.main(["erpd", "--config", str(tmp_path / "recipe.yaml")], launch=False) == 0
    student = tmp_path / "out" / f"round-{lines['rounds']}" / "student"
    assert (student / "model.safetensors").exists() and (student / "adapter").exists() == lines.get("use_peft", False)
    state = json.loads((student / "checkpoint-6" / "trainer_state.json").read_text())
    log = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in log)
    assert max(entry["trust/ratio/max"] for entry in log) > 1  # the trust region has something to do


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student": {"epsilon": 1.5}}, r"epsilon=1\.5 must be a number in \[0, 1\)"),
        ({"teacher": {"teacher_los": "mse"}}, "unknown field 'teacher_los'.*'teacher_loss'"),
        ({"rollouts": {"num_generation": 4}}, "num_generation"),
        ({"rollouts": {"num_generations": 1}}, "num_generations=1 must be"),
        ({"rollouts": "many"}, "no mapping"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "hold nothing out"),
        ({"load_in_8bit": True}, "leaves a whole model for the next"),
        (
            {"teacher": {"eval_strategy": "steps", "eval_steps": 1}},
            "eval_strategy='steps' for the teacher: .* nothing",
        ),
        ({"rollouts": {**ROLLOUTS, "temperature": 0.5}}, r"temperature=0\.5 in `rollouts`: .*set it beside them"),
        ({"rollouts": {**ROLLOUTS, "output_dir": "x"}}, "output_dir='x' in `rollouts`"),
        ({"rollouts": {**ROLLOUTS, "seed": "one"}}, "rollouts=.*'seed': 'one'"),
        ({"teacher": {"temperature": 0.5}}, r"temperature=0\.5 in `teacher`: .*set it beside them"),
        ({"student": {"stage": "student"}}, "stage='student' in `student`"),
        ({"teacher": {"unlearn": True}}, "unlearn=True in `teacher`"),
        ({"student": {"push_to_hub": True}}, "push_to_hub=True in `student`"),
        (
            {"teacher_model_name_or_path": "x"},
            "teacher_model_name_or_path='x' is not read .*`policies: {teacher: ...}`",
        ),
        ({"policies": {"base": "x"}}, "policies={'base': 'x'}: base is the model that a round starts from"),
        ({"policies": {"elder": "x"}}, "policies={'elder': 'x'}: signal='weak' does not read it"),
        ({"policies": {"teacher": 3}}, "policies={'teacher': 3} must name a model"),
        ({"reward_funcs": None}, "no reward: set `reward_funcs`"),
        ({"teacher": {"learning_rate": 7e-3}}, r"learning_rate=0\.007, but .*stage\.json was written with"),
    ],
)
def test_bad_recipes_raise_before_training(overrides, message, two_rounds, tiny_model_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(rounds, "ERPDTeacherTrainer", refuse)
    monkeypatch.setattr(rounds, "ERPDTrainer", refuse)
    with pytest.raises(ValueError, match=message):
        rounds.main(recipe(two_rounds.parent, tiny_model_path, **overrides))


if __name__ == "__main__":  # under torchrun, for the fixture `two_processes`
    torch.set_num_threads(1)
    out, model_path = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:] or LAYOUTS:
        result = layout_run(name, model_path, out / name, out / "rollouts", processes=2, accumulation=2)
        torch.save(result, out / f"{name}-{os.environ['RANK']}.pt")
    leave()
