"""VPD against its spec: worked numbers (section 6), invariants (section 5), then real runs."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import (
    loss_and_grad,
    on_two_processes,
    parameter_gap,
    random_policy_batch,
    tiny_config,
    tiny_run,
    tiny_trainer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.sdpo.loss_utils import (  # the oracle
    add_tail_bucket,
    apply_importance_sampling_clipping,
    compute_full_logit_self_distillation_loss,
    compute_topk_self_distillation_loss,
)

from trl_trust import VPDConfig, VPDTrainer, vpd_loss
from trl_trust.distill import vpd as module
from trl_trust.distill.vpd import (
    _keep,
    as_teacher,
    as_text,
    class_sums,
    implicit_reward,
    insert_feedback,
    next_shift,
    preference_loss,
    token_divergence,
)
from trl_trust.quickstart.task import problems


seeds = st.integers(0, 10_000)
f64 = lambda x: torch.tensor(x, dtype=torch.float64)


# -- E-step: worked numbers -------------------------------------------------------------------------------------------


def e_step(positive, negative, momentum=0.0, shift=None, reward=implicit_reward):
    """L_E, its derivatives by the summed log-ratios, and the shift, of two lists of summed log-ratios."""
    sums = f64([*positive, *negative]).requires_grad_()
    success = f64([1.0] * len(positive) + [0.0] * len(negative))
    ones = torch.ones(len(sums), 1, dtype=torch.float64)
    r = reward(sums[:, None], 0 * ones, ones)
    totals = class_sums(r.detach(), success).tolist()
    shift = next_shift(totals, shift, momentum)
    loss = preference_loss(r, success, shift, totals[1], totals[3]).sum()
    return loss.item(), torch.autograd.grad(loss, sums)[0].tolist(), shift


@pytest.mark.parametrize(
    ("positive", "negative", "shift", "loss", "slopes"),
    [
        ([4], [-2], 0.1, 1.108710, [-0.0425557, 0.0425557]),
        ([4, 1], [-2, 0.5, 3], 0.15, 1.296778, [-0.0218912, -0.0256249, 0.0137794, 0.0158340, 0.0179143]),
        ([0], [0], 0.0, 1.386294, [-0.05, 0.05]),
        ([14, 11], [8, 10.5, 13], 1.15, 1.296778, [-0.0218912, -0.0256249, 0.0137794, 0.0158340, 0.0179143]),
    ],
    ids=["two", "five", "empty-feedback", "shifted-by-ten"],
)
def test_e_step(positive, negative, shift, loss, slopes):
    got, grads, got_shift = e_step(positive, negative)
    assert (got, got_shift) == pytest.approx((loss, shift), abs=1e-6)
    assert grads == pytest.approx(slopes, abs=1e-7)


def test_duplicated_negatives_change_nothing():  # 5
    once, twice = e_step([4, 1], [-2, 0.5, 3]), e_step([4, 1], [-2, -2, 0.5, 0.5, 3, 3])
    assert twice[0] == pytest.approx(once[0]) and twice[2] == pytest.approx(once[2])
    assert twice[1][:2] == pytest.approx(once[1][:2])
    assert sum(twice[1][2:4]) == pytest.approx(once[1][2])


def test_running_shift():
    assert next_shift([0.1, 1, 0.1, 1], None, 0.9) == pytest.approx(0.1)  # the first is taken as it is
    assert next_shift([0.3, 1, 0.3, 1], 0.1, 0.9) == pytest.approx(0.12)
    assert next_shift([0.3, 1, 0.3, 1], 0.1, 0.0) == pytest.approx(0.3)
    assert next_shift([0.3, 1, 0.0, 0], 0.1, 0.9) == 0.1  # a missing class has no mean, least of all 0
    assert next_shift([0.0, 0, 0.0, 0], None, 0.9) is None


def test_implicit_reward_reductions():
    teacher, ref, mask = (
        f64([[-1, -2, -9], [-1, -1, -1]]),
        f64([[-2, -4, -1], [-1, -2, -3]]),
        f64([[1, 1, 0], [1, 1, 1]]),
    )
    assert implicit_reward(teacher, ref, mask).tolist() == pytest.approx([0.3, 0.3])
    assert implicit_reward(teacher, ref, mask, reward_reduction="mean").tolist() == pytest.approx([0.15, 0.1])
    assert implicit_reward(teacher, ref, mask, reward_clip=0.2).tolist() == pytest.approx([0.2, 0.2])
    empty = torch.zeros_like(mask)
    assert implicit_reward(teacher, ref, empty, reward_reduction="mean").tolist() == [0, 0]


# -- E-step: invariants -----------------------------------------------------------------------------------------------


def random_outcomes(seed, n=12):
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(n, generator=g, dtype=torch.float64)
    success = torch.randint(0, 2, (n,), generator=g).double()
    success[:2] = f64([1.0, 0.0])
    success[2] = torch.nan
    return reward, success


@given(seeds)
def test_slopes_by_the_sequence_sums(seed):  # 4
    reward, success = random_outcomes(seed)
    sums = (reward / 0.1).requires_grad_()
    r = 0.1 * sums
    totals = class_sums(r.detach(), success).tolist()
    shift = next_shift(totals, None, 0.0)
    (grad,) = torch.autograd.grad(preference_loss(r, success, shift, totals[1], totals[3]).sum(), sums)
    margin = reward - shift
    expected = torch.where(
        success == 1, -0.1 / totals[1] * torch.sigmoid(-margin), 0.1 / totals[3] * torch.sigmoid(margin)
    )
    torch.testing.assert_close(grad, expected.masked_fill(success.isnan(), 0.0))


@given(seeds)
def test_the_prior_gets_no_gradient_and_masked_tokens_no_say(seed):  # 4, 10
    batch = random_policy_batch(seed)
    noise = torch.where(batch.mask > 0, 0.0, 5.0)
    one = implicit_reward(batch.logps, batch.old_logps, batch.mask)
    two = implicit_reward(batch.logps + noise, batch.old_logps - noise, batch.mask)
    assert torch.equal(one, two)


@given(seeds, st.floats(-20, 20))
def test_a_constant_in_every_reward_changes_nothing(seed, constant):  # 5
    reward, success = random_outcomes(seed)

    def losses(r):
        totals = class_sums(r, success).tolist()
        return preference_loss(r, success, next_shift(totals, None, 0.0), totals[1], totals[3])

    torch.testing.assert_close(losses(reward), losses(reward + constant))


def test_the_optimum_is_the_log_ratio_of_the_class_densities():  # 6
    """Outcomes a, b: successes give (3/4, 1/4), failures (1/4, 3/4). At a constant shift neither has a slope left."""
    shift, log3 = 0.7, math.log(3)
    per_outcome = f64([shift + log3, shift - log3]).requires_grad_()
    rows, success = [0, 0, 0, 1, 0, 1, 1, 1], f64([1, 1, 1, 1, 0, 0, 0, 0])
    loss = preference_loss(per_outcome[rows], success, shift, 4, 4).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, per_outcome)[0], torch.zeros(2, dtype=torch.float64))


@given(seeds, st.integers(1, 11))
def test_splitting_the_rows_changes_nothing(seed, at):  # 9
    reward, success = random_outcomes(seed)
    totals = class_sums(reward, success)
    parts = [class_sums(r, s) for r, s in ((reward[:at], success[:at]), (reward[at:], success[at:]))]
    torch.testing.assert_close(sum(parts), totals)
    _, n_pos, _, n_neg = totals.tolist()
    whole = preference_loss(reward, success, 0.3, n_pos, n_neg).sum()
    split = [preference_loss(reward[x], success[x], 0.3, n_pos, n_neg).sum() for x in (slice(at), slice(at, None))]
    torch.testing.assert_close(sum(split), whole)


def test_bandit():  # 7
    """Exact E-step (the posterior) and M-step (descent on the divergence), R = (1, 0), beta = 1."""

    def run(dynamic):
        student, start, seen = f64([0.5, 0.5]), f64([0.5, 0.5]), []
        for _ in range(4):
            prior = student if dynamic else start
            teacher = (prior.log() + f64([1.0, 0.0])).log_softmax(0)
            logits = student.log().clone().requires_grad_()
            for _ in range(400):
                (grad,) = torch.autograd.grad(token_divergence(logits, teacher), logits)
                logits = (logits - grad).detach().requires_grad_()
            student = logits.detach().softmax(0)
            seen.append(student[0].item())
        return seen

    assert run(dynamic=True) == pytest.approx([0.731059, 0.880797, 0.952574, 0.982014], abs=1e-6)
    assert run(dynamic=False) == pytest.approx([0.731059] * 4, abs=1e-6)


# -- M-step: worked numbers and invariants ----------------------------------------------------------------------------

P, Q = f64([0.5, 0.3, 0.2]), f64([0.2, 0.5, 0.3])


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({}, 0.223805),
        ({"alpha": 0.0}, 0.193794),
        ({"alpha": 0.5}, 0.050875),
        ({"topk": 1}, 0.223144),
        ({"topk": 1, "tail": False}, 0.0),
        ({"topk": 3}, 0.223805),
    ],
    ids=str,
)
def test_divergence(settings, value):
    assert token_divergence(P.log(), Q.log(), **settings).item() == pytest.approx(value, abs=1e-6)


def test_slopes_of_the_reverse_kl():  # 3
    student, teacher = P.log().requires_grad_(), Q.log().requires_grad_()
    kl = token_divergence(student, teacher.detach())
    (grad,) = torch.autograd.grad(kl, student)
    assert grad.tolist() == pytest.approx([0.346243, -0.220389, -0.125854], abs=1e-6)
    torch.testing.assert_close(grad, P * (P.log() - Q.log() - kl.detach()))
    assert torch.autograd.grad(
        token_divergence(P.log().requires_grad_(), P.log()).sum(), student, allow_unused=True
    ) == (None,)


def test_the_sampled_token_has_the_same_slopes_in_expectation():
    student = P.log().requires_grad_()
    logps = student.log_softmax(0)[None]  # one response whose tokens are each of the three
    batch = replace(
        random_policy_batch(0, B=1, T=3, masked=False),
        logps=logps,
        old_logps=logps.detach(),
        extras={"teacher_logps": Q.log()[None]},
    )
    per_token = vpd_loss(batch, distillation_mode="sampled_token").per_token_loss
    (grad,) = torch.autograd.grad((P * per_token).sum(), student)
    assert grad.tolist() == pytest.approx([0.346243, -0.220389, -0.125854], abs=1e-6)


def two_logits(seed, V=30):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(4, 5, V, generator=g, dtype=torch.float64) for _ in range(2))


@given(seeds, st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 29), st.booleans())
def test_divergences_are_those_of_trls_sdpo(seed, alpha, k, tail):
    student, teacher = two_logits(seed)
    settings = dict(distillation_topk=k, distillation_alpha=alpha, distillation_add_tail=tail)
    torch.testing.assert_close(
        token_divergence(student, teacher, alpha=alpha, topk=k, tail=tail),
        compute_topk_self_distillation_loss(student, teacher, **settings),
    )
    torch.testing.assert_close(
        token_divergence(student, teacher, alpha=alpha),
        compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha),
    )


@given(seeds, st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 30))
def test_one_bucket_for_the_others_never_exceeds_the_whole(seed, alpha, k):  # 10
    student, teacher = two_logits(seed)
    whole = token_divergence(student, teacher, alpha=alpha)
    assert (token_divergence(student, teacher, alpha=alpha, topk=k) <= whole + 1e-12).all()
    assert (whole >= 0).all() and (token_divergence(student, student, alpha=alpha, topk=k).abs() < 1e-12).all()


def test_the_bucket_keeps_its_digits_where_nothing_is_left():
    """A tail of 4e-9: 1 minus the kept mass is 0 in float32, for which the oracle has a floor of 1e-7."""
    logps, ids = torch.tensor([20.0, 0, 0]).log_softmax(0), torch.tensor([0])
    exact = f64([20.0, 0, 0]).log_softmax(0)[1].item() + math.log(2)
    assert _keep(logps, ids, tail=True)[1].item() == pytest.approx(exact, rel=1e-6)
    assert add_tail_bucket(logps[:1])[1].item() == pytest.approx(math.log(1e-7), rel=0.02)


@given(seeds, st.sampled_from([None, 0.7, 2.0]))
def test_the_importance_weight_is_trls(seed, clip):
    batch = random_policy_batch(seed, spread=2.0)
    divergence = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    batch = replace(batch, extras={"divergence": divergence})
    per_token = vpd_loss(batch, distillation_is_clip=clip).per_token_loss
    expected = divergence
    if clip is not None:
        expected = apply_importance_sampling_clipping(divergence, batch.logps, batch.old_logps, clip)
    torch.testing.assert_close(per_token, expected)
    assert torch.autograd.grad(per_token.sum(), batch.logps, allow_unused=True) == (None,)  # the weight is a constant


@given(seeds)
def test_masked_tokens_change_nothing(seed):  # 10
    batch = random_policy_batch(seed)
    teacher, live = batch.old_logps - 0.3, batch.mask > 0
    noisy = replace(batch, logps=torch.where(live, batch.logps.detach(), -7.0).requires_grad_())
    pair = [replace(batch, extras={"teacher_logps": teacher})]
    pair.append(replace(noisy, extras={"teacher_logps": torch.where(live, teacher, -0.1)}))
    one, two = (loss_and_grad(vpd_loss, b, distillation_mode="sampled_token") for b in pair)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"e_step_every": -1}, "must be a whole number >= 0"),
        ({"e_step_every": 1.5}, "must be a whole number >= 0"),
        ({"e_step_mode": "both"}, "must be 'extra' or 'replace'"),
        ({"e_step_position": "during"}, "must be 'before' or 'after'"),
        ({"e_step_beta": 0.0}, "must be a finite number > 0"),
        ({"shift_momentum": 1.0}, r"must be a number in \[0, 1\)"),
        ({"reward_reduction": "max"}, "must be 'sum' or 'mean'"),
        ({"reward_clip": 0}, "must be a finite number > 0, or None"),
        ({"single_class": "raise"}, "must be 'skip' or 'use'"),
        ({"all_wrong": "raise"}, "must be 'skip' or 'use'"),
        ({"prior": "sliding"}, "must be 'dynamic' or 'fixed'"),
        ({"distillation_mode": "logits"}, "must be one of 'topk_logits', 'full_logits', 'sampled_token'"),
        ({"distillation_topk": 0}, "must be a whole number >= 1"),
        ({"distillation_alpha": 1.1}, r"must be a number in \[0, 1\]"),
        ({"distillation_mode": "sampled_token", "distillation_alpha": 0.5}, "must be 1 with"),
        ({"distillation_is_clip": -1.0}, "must be a finite number > 0, or None"),
        ({"success_reward_threshold": math.nan}, "must be a finite number"),
        ({"teacher_template": "{prompt}"}, "must hold {prompt} and {feedback}"),
        ({"teacher_template": "{prompt}{feedback}{"}, "must hold {prompt} and {feedback}"),
        ({"solution_template": "{answer}"}, "must hold {solution} and no other"),
        ({"max_teacher_prompt_length": 0}, "must be a whole number >= 1"),
        ({"disable_dropout": False}, "leave it True"),
        ({"neftune_noise_alpha": 5.0}, "leave it out"),
        ({"gradient_accumulation_steps": 3}, "must be a multiple of gradient_accumulation_steps=3"),
        ({"epsilon": 0.1}, "distillation_is_clip"),
        ({"delta": 4.0}, "distillation_is_clip"),
        ({"scale_rewards": "none"}, "no advantage enters"),
        ({"loss_type": "cispo"}, "aggregation only"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(VPDConfig, **settings)
    name, value = list(settings.items())[-1]
    assert (name in str(error.value) and str(value) in str(error.value)) or name == "gradient_accumulation_steps"


def test_without_e_steps_any_accumulation_will_do():
    args = tiny_config(VPDConfig, e_step_every=0, gradient_accumulation_steps=8, steps_per_generation=4)
    assert not args.needs_stale_rollouts


# -- prompts of the teacher -------------------------------------------------------------------------------------------


def digits(text):
    return sum(c.isdigit() for c in text)


def reward_digits(completions, **kwargs):
    """1 for a completion with two digits or more, which about a third of random ones have."""
    return [float(digits(text) >= 2) for text in completions]


def say_digits(prompts, completions, answer, rewards, **kwargs):
    """A feedback function; `answer` is a column of the data."""
    assert len(prompts) == len(completions) == len(answer) == len(rewards)
    return [f"{digits(text)} digits" for text in completions]


def vpd_config(path, **settings):
    """E-steps that can be seen within four updates of one generation, and feedback on every failure."""
    ours = {"learning_rate": 1e-3, "e_step_mode": "replace", "all_wrong": "use"}
    return tiny_config(VPDConfig, path, **{**ours, **settings})


def run(model_path, args, **kwargs):
    kwargs.setdefault("feedback_func", say_digits)
    return tiny_run(VPDTrainer, model_path, args, reward_funcs=reward_digits, **kwargs)


def steps(trainer, name):
    """Optimizer steps, from 1, whose log has the metric."""
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


def rows_of(trainer):
    """(success, feedback flags, the teacher's prompt, completion) of each row of the buffered generation."""
    decode = lambda ids, mask: trainer.processing_class.decode(ids[mask > 0])
    for part in trainer._buffered_inputs:
        for i in range(len(part["prompt_ids"])):
            prompt = decode(part["extras/teacher_prompt_ids"][i], part["extras/teacher_prompt_mask"][i])
            completion = decode(part["completion_ids"][i], part["completion_mask"][i])
            yield part["rewards"][i].item(), part["extras/feedback"][i].tolist(), prompt, completion, part, i


SHORT = dict(teacher_template="({feedback}) {prompt}", solution_template="right: {solution}")


def as_read(trainer, text):
    """What the tokenizer leaves of a text: the tiny one has no capitals."""
    return trainer.processing_class.decode(trainer.processing_class(text)["input_ids"])


def test_who_reads_what(tiny_model_path, tmp_path):
    trainer = run(tiny_model_path, vpd_config(tmp_path, max_steps=1, max_completion_length=6, **SHORT))
    by_group, seen = {}, set()
    for reward, _, _, completion, part, i in rows_of(trainer):
        by_group.setdefault(part["group"][i].item(), []).append((reward, completion))
    for reward, (any_, text, solution), prompt, completion, part, i in rows_of(trainer):
        plain = trainer.processing_class.decode(part["prompt_ids"][i][part["prompt_mask"][i] > 0])
        successes = [c for r, c in by_group[part["group"][i].item()] if r == 1.0]
        others = len(successes) - (reward == 1.0)
        comment = f"{digits(completion)} digits"
        if others == 0:
            assert prompt == as_read(trainer, f"({comment}) {plain}")
        else:  # special tokens are left out of a solution that is shown
            head = "right: " if reward == 1.0 else f"{comment}\n\nright: "
            cleaned = [re.sub("<eos>|<pad>|<unk>", "", c) for c in successes]
            assert prompt in {as_read(trainer, f"({head}{c}) {plain}") for c in cleaned}
        assert (any_, text, solution) == (1.0, float(not (reward == 1.0 and others)), float(others > 0))
        seen.add((reward, others > 0))
    assert len(seen) >= 3  # successes and failures, with and without another success


def test_without_feedback_a_row_does_not_count(tiny_model_path, tmp_path):
    """No text, no other response: nothing to learn, in neither step, and the token count says so."""
    args = vpd_config(tmp_path, max_steps=2, use_successful_as_teacher=False)
    some = lambda completions, **kwargs: ["few digits" if digits(text) < 2 else None for text in completions]
    trainer = run(tiny_model_path, args, feedback_func=some)
    tokens = 0
    for reward, (any_, text, solution), prompt, _, part, i in rows_of(trainer):
        few = as_read(trainer, "few digits")
        assert any_ == text == (reward == 0.0) and solution == 0.0
        assert (part["tool_mask"][i].sum() > 0) == (reward == 0.0)
        assert part["extras/success"][i].isnan() == (reward == 1.0)
        assert (few in prompt) == (reward == 0.0)
        tokens += part["tool_mask"][i].sum().item()
    assert tokens == trainer._buffered_inputs[0]["num_items_in_batch"].item()
    assert [entry["vpd/e_skipped"] for entry in trainer.state.log_history if "vpd/e_skipped" in entry] == [1.0]


def test_a_prompt_whose_responses_are_all_wrong_counts_in_neither_step(tiny_model_path, tmp_path):
    """Whatever there is to say about them; the other prompts are as with `all_wrong="use"`."""
    kinds = {}
    for all_wrong in ("skip", "use"):
        args = vpd_config(tmp_path, max_steps=1, max_completion_length=6, all_wrong=all_wrong)
        rows = list(rows_of(run(tiny_model_path, args)))
        solved = {part["group"][i].item() for reward, *_, part, i in rows if reward == 1.0}
        for _, flags, prompt, _, part, i in rows:
            live = part["group"][i].item() in solved or all_wrong == "use"
            assert (flags == [0.0, 0.0, 0.0]) == (not live) == (part["tool_mask"][i].sum() == 0).item()
            assert part["extras/success"][i].isnan() == (not live)
            kinds.setdefault(all_wrong, []).append((part["group"][i].item() in solved, flags, prompt))
        tokens = sum(part["tool_mask"][i].sum().item() for *_, part, i in rows)
        assert tokens == rows[0][4]["num_items_in_batch"].item() > 0
    assert {solved for solved, *_ in kinds["skip"]} == {True, False}
    assert sorted(k for k in kinds["skip"] if k[0]) == sorted(k for k in kinds["use"] if k[0])


def test_no_feedback_at_all_is_a_zero_loss_with_a_graph(tiny_model_path, tmp_path):
    args = vpd_config(tmp_path, use_successful_as_teacher=False)
    trainer = run(tiny_model_path, args, feedback_func=None)
    assert all(entry["loss"] == 0.0 and entry["grad_norm"] == 0.0 for entry in trainer.state.log_history[:4])
    assert parameter_gap(trainer.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) == 0.0
    assert trainer.shift is None


def test_an_overlong_prompt_counts_as_no_feedback(tiny_model_path, tmp_path):
    long_if_empty = lambda completions, **kwargs: ["x" * (60 if digits(text) == 0 else 3) for text in completions]
    args = vpd_config(tmp_path, max_steps=1, use_successful_as_teacher=False, max_teacher_prompt_length=20, **SHORT)
    trainer = run(tiny_model_path, args, feedback_func=long_if_empty)
    flags = set()
    for _, (any_, text, _), _, completion, part, i in rows_of(trainer):
        assert any_ == text == (digits(completion) > 0) == (part["tool_mask"][i].sum() > 0)
        assert part["extras/teacher_prompt_ids"].size(1) <= 20
        flags.add(any_)
    assert flags == {0.0, 1.0}


def test_the_teachers_prompt_is_padded_to_a_multiple(tiny_model_path, tmp_path):
    """Whatever the prompts that are too long leave of its width."""
    long_if_empty = lambda completions, **kwargs: ["x" * (60 if digits(text) == 0 else 3) for text in completions]
    args = vpd_config(tmp_path, max_steps=1, use_successful_as_teacher=False, max_teacher_prompt_length=20, **SHORT)
    args.pad_to_multiple_of = 16
    part = run(tiny_model_path, args, feedback_func=long_if_empty)._buffered_inputs[0]
    assert part["extras/teacher_prompt_ids"].size(1) in (16, 32)


def test_the_feedback_of_an_environment(tiny_model_path, tmp_path):
    trainer = tiny_trainer(VPDTrainer, tiny_model_path, vpd_config(tmp_path))
    trainer.environments = [SimpleNamespace(feedback="no"), SimpleNamespace(), SimpleNamespace(feedback=" ")]
    rollouts = SimpleNamespace(completions=["a", "b", "c"])
    assert trainer._texts(rollouts, [0.0] * 3) == ["no", None, None]
    trainer.environments[0].feedback = ["no"]
    with pytest.raises(ValueError, match=r"the attribute `feedback` of an environment is \['no'\] about a completion"):
        trainer._texts(rollouts, [0.0] * 3)
    trainer.args.include_environment_feedback = False
    assert trainer._texts(rollouts, [0.0] * 3) == [None] * 3


def test_conversations_go_through_the_chat_template(tiny_model_path, tmp_path):
    data = Dataset.from_list(
        [{"prompt": [{"role": "system", "content": "add."}, {"role": "user", "content": f"{a}+1="}]} for a in range(9)]
    )
    say = lambda prompts, completions, **kwargs: [f"bad {prompts[0][-1]['role']}" for _ in completions]
    reward = lambda completions, **kwargs: [float(digits(c[0]["content"]) >= 2) for c in completions]
    args = vpd_config(tmp_path, max_steps=2, **SHORT)
    trainer = tiny_run(VPDTrainer, tiny_model_path, args, feedback_func=say, reward_funcs=reward, train_dataset=data)
    for _, (_, text, _), prompt, _, part, i in rows_of(trainer):
        plain = trainer.processing_class.decode(part["prompt_ids"][i][part["prompt_mask"][i] > 0])
        assert plain.startswith("add.") and plain.endswith("+1=")
        assert prompt.startswith("add.(") and prompt.endswith(as_read(trainer, f") {plain.removeprefix('add.')}"))
        assert (as_read(trainer, "bad user") in prompt) == (text == 1.0)


def test_words_and_messages():
    chat = [{"role": "user", "content": "a {b}"}]
    assert insert_feedback(chat, "c {d}", "{feedback}|{prompt}") == [{"role": "user", "content": "c {d}|a {b}"}]
    assert chat == [{"role": "user", "content": "a {b}"}]  # the data is left alone
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert insert_feedback(parts, "c", "{feedback}|{prompt}")[0]["content"] == "c|ab"
    with pytest.raises(ValueError, match="role 'assistant'"):
        insert_feedback([*chat, {"role": "assistant", "content": "well"}], "c", "{feedback}{prompt}")
    turns = [
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "it is 5"},
    ]
    assert as_text(turns) == "it is 5" and as_text("plain") == "plain"


def test_demonstrations_are_shown_without_their_thoughts(tiny_model_path, tmp_path):
    trainer = tiny_trainer(VPDTrainer, tiny_model_path, vpd_config(tmp_path))
    texts = ["<think>so\nso</think>\n12", "<think>no</think>3", "4", "5"]
    rollouts = SimpleNamespace(completions=texts, rows=slice(0, 4), num_generations=4)
    assert trainer._solutions(rollouts, [1.0, 0.0, math.nan, 0.6]) == ["5", "12", "12", "12"]
    trainer.args.remove_thinking_from_demonstration = False
    assert trainer._solutions(rollouts, [1.0, 0.0, math.nan, 0.0]) == [None, texts[0], texts[0], texts[0]]
    rollouts = SimpleNamespace(completions=texts, rows=slice(4, 8), num_generations=2)  # another process's rows
    assert trainer._solutions(rollouts, [1.0] * 4 + [0.0, 1.0, 0.0, 0.0]) == ["<think>no</think>3", None, None, None]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so so </think>\n12", "12"),  # the chat template has opened the block
        ("so </think>1<think>again</think>2", "12"),
        ("<think>all thought, cut off", None),
        ("<think>12</think>", None),
        ("12", "12"),
    ],
)
def test_thoughts_are_left_out_wherever_they_are_opened(text, shown, tiny_model_path, tmp_path):
    """And a success that is nothing else is no solution: the next one is."""
    trainer = tiny_trainer(VPDTrainer, tiny_model_path, vpd_config(tmp_path))
    solutions = lambda texts: trainer._solutions(
        SimpleNamespace(completions=texts, rows=slice(0, len(texts)), num_generations=len(texts)),
        [0.0] + [1.0] * (len(texts) - 1),
    )
    assert solutions(["wrong", text])[0] == shown
    assert solutions(["wrong", text, "5"])[0] == (shown or "5")


def test_an_async_feedback_function(tiny_model_path, tmp_path):
    async def say(completions, **kwargs):
        return [f"{digits(text)} digits" for text in completions]

    log = run(tiny_model_path, vpd_config(tmp_path, max_steps=1), feedback_func=say).state.log_history[0]
    assert log["vpd/e_skipped"] == 0.0


def test_feedback_by_dotted_path(tiny_model_path, tmp_path):
    args = vpd_config(tmp_path, max_steps=1, feedback_func=f"{__name__}.say_digits")
    log = run(tiny_model_path, args, feedback_func=None).state.log_history[0]
    assert log["vpd/e_skipped"] == 0.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.say", "give package.module.function"),
        ("json.say", "give package.module.function"),
        ("say", "give package.module.function"),
        ("math.pi", "is a float"),
    ],
)
def test_a_feedback_function_that_is_none(path, message, tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        tiny_trainer(VPDTrainer, tiny_model_path, vpd_config(tmp_path, feedback_func=path))
    assert f"feedback_func={path!r}" in str(error.value)


def test_feedback_functions_that_do_not_fit(tiny_model_path, tmp_path):
    args = vpd_config(tmp_path, feedback_func=f"{__name__}.say_digits")
    with pytest.raises(ValueError, match="keep one"):
        tiny_trainer(VPDTrainer, tiny_model_path, args, feedback_func=say_digits)
    with pytest.raises(ValueError, match="1 texts for 16 completions"):
        run(tiny_model_path, vpd_config(tmp_path), feedback_func=lambda **kwargs: ["one"])
    for found in (None, "no", {"a": 1}):
        with pytest.raises(ValueError, match=f"feedback_func returned {found!r}; it must return a list"):
            run(tiny_model_path, vpd_config(tmp_path), feedback_func=lambda _found=found, **kwargs: _found)
    for text in ({"a": 1}, 3):
        with pytest.raises(ValueError, match=f"feedback_func returned {text!r} about a completion"):
            say = lambda completions, _text=text, **kwargs: [_text] * len(completions)
            run(tiny_model_path, vpd_config(tmp_path), feedback_func=say)


# -- the M-step in a run ----------------------------------------------------------------------------------------------


def plain_logits(model, inputs, temperature=1.0):
    """(B, T, V) by the model's own forward."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    T = inputs["completion_ids"].size(1)
    return model(input_ids=ids, attention_mask=mask).logits[:, -T - 1 : -1] / temperature


def sampled(logits, inputs):
    return logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None]).squeeze(2)


@pytest.mark.parametrize(
    ("settings", "oracle"),
    [
        (
            dict(distillation_mode="full_logits"),
            lambda s, t: compute_full_logit_self_distillation_loss(s, t, distillation_alpha=1.0),
        ),
        (
            dict(distillation_topk=7),
            lambda s, t: compute_topk_self_distillation_loss(
                s, t, distillation_topk=7, distillation_alpha=1.0, distillation_add_tail=True
            ),
        ),
        (
            dict(distillation_mode="full_logits", distillation_alpha=0.3),
            lambda s, t: compute_full_logit_self_distillation_loss(s, t, distillation_alpha=0.3),
        ),
    ],
    ids=["full", "topk", "jsd"],
)
def test_without_e_steps_it_is_sdpo(settings, oracle, tiny_model_path, tmp_path):  # 1
    """Loss and gradient against plain forwards, TRL's SDPO losses, and its aggregation."""
    checked = []

    class Watch(VPDTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            student = plain_logits(model, inputs, 0.7)
            with torch.no_grad():
                teacher = plain_logits(model, as_teacher(inputs), 0.7)
            mask = inputs["completion_mask"] * inputs["extras/feedback"][:, :1]
            expected = ((oracle(student, teacher) * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean() / 2
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)
            expected_grads = torch.autograd.grad(expected, list(model.parameters()))
            torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-6)
            checked.append(loss.item())
            return loss

    args = vpd_config(
        tmp_path,
        e_step_every=0,
        loss_type="grpo",
        distillation_is_clip=None,
        temperature=0.7,
        gradient_accumulation_steps=2,
        max_steps=2,
        **settings,
    )
    tiny_run(Watch, tiny_model_path, args, feedback_func=say_digits, reward_funcs=reward_digits)
    assert len(checked) == 4 and all(value > 0 for value in checked)


def test_the_sampled_token_form_in_a_run(tiny_model_path, tmp_path):
    checked = []

    class Watch(VPDTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            student = sampled(plain_logits(model, inputs), inputs)
            with torch.no_grad():
                teacher = sampled(plain_logits(model, as_teacher(inputs)), inputs)
            weight = torch.exp(student.detach() - inputs["old_per_token_logps"]).clamp(max=2.0)
            mask = inputs["completion_mask"] * inputs["extras/feedback"][:, :1]
            expected = ((student - teacher).detach() * student * weight * mask).sum() / mask.sum().clamp(min=1)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
            checked.append(loss.item())
            return loss

    args = vpd_config(
        tmp_path, e_step_every=0, loss_type="bnpo", distillation_mode="sampled_token", distillation_is_clip=2.0
    )
    trainer = tiny_run(Watch, tiny_model_path, args, feedback_func=say_digits, reward_funcs=reward_digits)
    assert len(checked) == 4
    assert trainer.state.log_history[0]["trust/zero_grad"] < 1.0  # here there is a gradient by the sampled token


def test_empty_feedback_teaches_nothing(tiny_model_path, tmp_path):  # 2
    """The teacher's prompt is the student's: all is zero to the bit, dropout included."""
    args = vpd_config(tmp_path, use_successful_as_teacher=False, optim="sgd")

    class Silent(VPDTrainer):
        def extend_rollouts(self, rollouts):
            extras = super().extend_rollouts(rollouts)
            extras["teacher_prompt_ids"] = rollouts.tensors["prompt_ids"]
            extras["teacher_prompt_mask"] = rollouts.tensors["prompt_mask"]
            return extras

    trainer = tiny_run(Silent, tiny_model_path, args, feedback_func=say_digits, reward_funcs=reward_digits)
    log = trainer.state.log_history
    assert log[0]["vpd/e_loss"] == pytest.approx(2 * math.log(2))
    assert log[0]["vpd/reward/pos"] == log[0]["vpd/reward/neg"] == 0.0
    after = tiny_run(
        Silent,
        tiny_model_path,
        replace_args(args, e_step_every=0),
        feedback_func=say_digits,
        reward_funcs=reward_digits,
    )
    assert all(entry["loss"] == 0.0 for entry in after.state.log_history[:4])
    assert parameter_gap(after.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) < 1e-6


def replace_args(args, **changes):
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_logits_exist_only_in_blocks(tiny_model_path, tmp_path, monkeypatch):
    import trl_trust.policy.hidden as hidden

    monkeypatch.setattr(hidden, "BLOCK", 5 * 56)
    seen = []
    plain = module.token_divergence
    monkeypatch.setattr(module, "token_divergence", lambda s, t, **kw: (seen.append(s.shape), plain(s, t, **kw))[1])
    run(tiny_model_path, vpd_config(tmp_path, max_steps=2))
    assert seen and max(shape[0] for shape in seen) == 5


# -- the E-step in a run ----------------------------------------------------------------------------------------------


def test_the_e_step_is_the_formula(tiny_model_path, tmp_path):
    """One SGD step from plain forwards: loss, shift, and the parameters after it."""
    args = vpd_config(
        tmp_path,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        max_steps=1,
        gradient_accumulation_steps=4,
        e_step_beta=0.3,
    )
    trainer = run(tiny_model_path, args)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    rewards, success = [], []
    for inputs in trainer._buffered_inputs:
        teacher = sampled(plain_logits(model, as_teacher(inputs)), inputs)
        student = sampled(plain_logits(model, inputs), inputs).detach()
        rewards.append(0.3 * ((teacher - student) * inputs["completion_mask"]).sum(-1))
        success.append(inputs["extras/success"])
    rewards, success = torch.cat(rewards), torch.cat(success)
    assert not success.isnan().any() and 0 < success.sum() < 16
    pos, neg = rewards[success == 1], rewards[success == 0]
    shift = 0.5 * (pos.mean() + neg.mean()).detach()
    loss = F.softplus(shift - pos).mean() + F.softplus(neg - shift).mean()
    log = trainer.state.log_history[0]
    assert log["vpd/shift"] == pytest.approx(shift.item(), abs=1e-6) and trainer.shift == log["vpd/shift"]
    assert log["vpd/e_loss"] == pytest.approx(loss.item(), rel=1e-5) and log["loss"] == pytest.approx(
        loss.item(), rel=1e-3
    )
    assert (log["vpd/n/pos"], log["vpd/n/neg"]) == (len(pos), len(neg))
    right = (pos > shift).sum() + (neg < shift).sum()
    assert log["vpd/e_accuracy"] == pytest.approx(right.item() / 16)
    for p, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.data -= log["learning_rate"] * grad
    assert parameter_gap(trainer.model, model) < 1e-6
    assert parameter_gap(trainer.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-4


@pytest.mark.parametrize("every", [0, 1, 2])
def test_replace_makes_so_many_m_steps_between_two_e_steps(every, tiny_model_path, tmp_path):  # 8
    trainer = run(tiny_model_path, vpd_config(tmp_path, e_step_every=every, max_steps=7))
    expected = [] if every == 0 else list(range(1, 8, every + 1))
    assert steps(trainer, "vpd/e_loss") == expected
    assert steps(trainer, "vpd/m_loss") == [step for step in range(1, 8) if step not in expected]
    assert len(steps(trainer, "trust/ratio/max")) == len(steps(trainer, "entropy")) == 7  # telemetry on both


def test_the_defaults_are_the_papers():
    args = tiny_config(VPDConfig)
    assert (args.e_step_every, args.e_step_mode, args.e_step_position) == (5, "extra", "before")
    assert args.e_step_beta == 0.1 and args.prior == "dynamic" and args.distillation_is_clip is None
    assert args.all_wrong == args.single_class == "skip" and args.distillation_alpha == 1.0


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_extra_adds_an_update_to_every_nth_rollout_batch(position, accumulation, tiny_model_path, tmp_path):  # 8
    """Of 4 / accumulation updates each; before the first of them, or after the last."""
    updates = 4 // accumulation
    settings = dict(gradient_accumulation_steps=accumulation, max_steps=5 * updates, learning_rate=1e-2)
    extra = vpd_config(tmp_path, e_step_every=2, e_step_mode="extra", e_step_position=position, **settings)
    trainer = run(tiny_model_path, extra)
    plain = run(tiny_model_path, vpd_config(tmp_path, e_step_every=0, **settings))
    # logged with the update that follows: in the 2nd and 4th batch, or behind them
    where = [updates + 1, 3 * updates + 1] if position == "before" else [2 * updates, 4 * updates]
    assert steps(trainer, "vpd/e_loss") == where and trainer.rollout_batches == 5
    assert len(steps(trainer, "vpd/m_loss")) == len(steps(plain, "vpd/m_loss")) == 5 * updates
    history = [[entry for entry in t.state.log_history if "loss" in entry] for t in (trainer, plain)]
    rates = [[entry["learning_rate"] for entry in entries] for entries in history]
    assert rates[0] == rates[1]  # the schedule does not notice
    losses = [[entry["loss"] for entry in entries] for entries in history]
    first_changed = updates if position == "before" else 2 * updates
    assert losses[0][:first_changed] == losses[1][:first_changed]
    assert losses[0][first_changed] != losses[1][first_changed]
    assert trainer.optimizer.optimizer.state[next(trainer.model.parameters())]["step"] == 5 * updates + 2


def test_extra_counts_batches_not_updates_or_iterations(tiny_model_path, tmp_path):  # 8
    args = vpd_config(
        tmp_path, e_step_every=5, e_step_mode="extra", steps_per_generation=1, num_iterations=2, max_steps=32,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer = run(tiny_model_path, args)
    assert steps(trainer, "vpd/e_skipped") == [9, 19, 29]  # due in batches 5, 10 and 15, of two updates each


def test_the_e_step_of_extra_is_one_update_on_the_whole_batch(tiny_model_path, tmp_path):
    """Before the first of four M-steps, from plain forwards: its loss, and the parameters after both updates."""
    args = vpd_config(
        tmp_path,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=1,
        e_step_every=1,
        e_step_mode="extra",
        distillation_mode="full_logits",
        loss_type="bnpo",
    )
    trainer = run(tiny_model_path, args)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    parameters = list(model.parameters())
    rewards, success = [], []
    for inputs in trainer._buffered_inputs:
        teacher = sampled(plain_logits(model, as_teacher(inputs)), inputs)
        student = sampled(plain_logits(model, inputs), inputs).detach()
        rewards.append(0.1 * ((teacher - student) * inputs["completion_mask"]).sum(-1))
        success.append(inputs["extras/success"])
    rewards, success = torch.cat(rewards), torch.cat(success)
    assert len(rewards) == 16
    pos, neg = rewards[success == 1], rewards[success == 0]
    shift = 0.5 * (pos.mean() + neg.mean()).detach()
    loss = F.softplus(shift - pos).mean() + F.softplus(neg - shift).mean()
    assert trainer.state.log_history[0]["vpd/e_loss"] == pytest.approx(loss.item(), rel=1e-5)
    for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= 0.1 * grad
    inputs = trainer._buffered_inputs[0]
    with torch.no_grad():
        teacher = plain_logits(model, as_teacher(inputs))
    kl = token_divergence(plain_logits(model, inputs), teacher)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    m_loss = (kl * mask).sum() / mask.sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(m_loss.item(), rel=1e-3)
    for p, grad in zip(parameters, torch.autograd.grad(m_loss, parameters), strict=True):
        p.data -= 0.1 * grad
    assert parameter_gap(trainer.model, model) < 1e-6


def test_extra_before_keeps_the_policy_that_generated(tiny_model_path, tmp_path):
    """On aligned rollouts TRL stores no log-probabilities; after the extra update the weight is not 1 all the same."""
    args = vpd_config(
        tmp_path,
        e_step_every=1,
        e_step_mode="extra",
        distillation_is_clip=2.0,
        steps_per_generation=1,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
    )
    log = run(tiny_model_path, args).state.log_history
    assert all(entry["vpd/is_weight/max"] > 1.0 for entry in log[:4])


def test_one_class_is_skipped_or_used(tiny_model_path, tmp_path):
    never = lambda completions, **kwargs: [0.0] * len(completions)
    args = vpd_config(tmp_path, e_step_every=1)
    trainer = tiny_run(VPDTrainer, tiny_model_path, args, feedback_func=say_digits, reward_funcs=never)
    skipped = [entry["vpd/e_skipped"] for entry in trainer.state.log_history if "vpd/e_skipped" in entry]
    assert skipped == [1.0, 1.0] and trainer.shift is None
    assert steps(trainer, "vpd/m_loss") == [1, 2, 3, 4]  # an M-step takes its place

    args = vpd_config(tmp_path, e_step_every=1, single_class="use")
    trainer = tiny_trainer(VPDTrainer, tiny_model_path, args, feedback_func=say_digits, reward_funcs=never)
    trainer.shift = 0.25
    trainer.train()
    assert steps(trainer, "vpd/e_loss") == [1, 3] and trainer.shift == 0.25
    log = trainer.state.log_history[0]
    assert log["vpd/n/pos"] == 0 and log["vpd/n/neg"] == 16 // 4 and "vpd/reward/pos" not in log
    assert log["vpd/e_loss"] < math.log(2)  # softplus(reward - 0.25) of rewards near 0


def test_training_separates_the_classes(tiny_model_path, tmp_path):
    """E-steps on one set of rollouts: the implicit reward comes to tell successes from failures."""
    args = vpd_config(
        tmp_path,
        e_step_every=1,
        num_iterations=40,
        steps_per_generation=1,
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=3e-3,
        e_step_beta=1.0,
        shift_momentum=0.0,
    )
    log = [entry for entry in run(tiny_model_path, args).state.log_history if "vpd/e_loss" in entry]
    gaps = [entry["vpd/reward/pos"] - entry["vpd/reward/neg"] for entry in log]
    assert gaps[-1] > gaps[0] + 0.3
    assert log[-1]["vpd/e_loss"] < log[0]["vpd/e_loss"] - 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_priors(lora, tiny_model_path, tmp_path):
    """The fixed one is the initial model, the dynamic one the student as it is."""
    seen = {}

    class Watch(VPDTrainer):
        def _plan_e_step(self):
            plan = super()._plan_e_step()
            seen.setdefault(self.args.prior, []).append((plan, self._micro_batches))
            return plan

    peft = dict(peft_config=LoraConfig(r=4, target_modules="all-linear")) if lora else {}
    for prior in ("fixed", "dynamic"):
        args = vpd_config(tmp_path, prior=prior, e_step_every=1, learning_rate=3e-2)
        tiny_run(Watch, tiny_model_path, args, feedback_func=say_digits, reward_funcs=reward_digits, **peft)
    initial = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    for prior, plans in seen.items():
        plan, micro_batches = plans[1]  # after two updates
        with torch.no_grad():
            expected = sampled(plain_logits(initial, micro_batches[0]), micro_batches[0])
        live = micro_batches[0]["completion_mask"] > 0
        gap = (plan.ref_logps[0] - expected)[live].abs().max()
        assert (gap < 1e-4) if prior == "fixed" else (gap > 1e-3)
        assert torch.equal(plan.ref_logps[0], plan.logps[0]) == (prior == "dynamic")


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_fixed_prior_of_a_trained_adapter_is_the_model_with_it(beta, tiny_model_path, tmp_path):
    """As TRL's reference is: the initial policy."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # not the one that changes nothing
    gaps = []

    class Watch(VPDTrainer):
        def _plan_e_step(self):
            plan = super()._plan_e_step()
            live = self._micro_batches[0]["completion_mask"] > 0
            gaps.append((plan.ref_logps[0] - plan.logps[0])[live].abs().max().item())
            return plan

    args = vpd_config(
        tmp_path,
        prior="fixed",
        beta=beta,
        e_step_every=1,
        max_steps=3,
        learning_rate=3e-2,
        steps_per_generation=1,
        per_device_train_batch_size=16,
        max_completion_length=6,
    )
    trainer = Watch(
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), lora),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        reward_funcs=reward_digits,
        feedback_func=say_digits,
        train_dataset=problems("train", 32),
    )
    trainer.train()
    assert gaps[0] < 1e-5 and gaps[1] > 1e-3
    assert args.beta == beta


def test_a_fixed_prior_is_trls_reference(tiny_model_path, tmp_path):
    for beta in (0.0, 0.1):
        trainer = run(tiny_model_path, vpd_config(tmp_path, prior="fixed", beta=beta, max_steps=2))
        part = trainer._buffered_inputs[0]
        assert torch.equal(part["extras/prior_logps"], part["ref_per_token_logps"])
    plain = run(tiny_model_path, vpd_config(tmp_path, prior="fixed", e_step_every=0, max_steps=1))
    assert plain.ref_model is None  # without E-steps nobody reads it


# -- everything around ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "extra"])
def test_a_lora_student(mode, tiny_model_path, tmp_path):
    args = vpd_config(tmp_path, e_step_every=2 if mode == "replace" else 1, e_step_mode=mode, learning_rate=1e-2)
    trainer = run(tiny_model_path, args, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    log = trainer.state.log_history
    assert all(entry["grad_norm"] > 0 for entry in log[:4]) and steps(trainer, "vpd/e_loss")
    assert all(entry["vpd/kl_student_teacher"] > 0 for entry in log[:4] if "vpd/m_loss" in entry)


@pytest.mark.parametrize("mode", ["replace", "extra"])
def test_resuming_takes_up_shift_and_schedule(mode, tiny_model_path, tmp_path):  # 8, 11
    settings = dict(
        e_step_every=2,
        e_step_mode=mode,
        steps_per_generation=1,
        per_device_train_batch_size=16,
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
    )
    whole = run(tiny_model_path, vpd_config(tmp_path, **settings))
    saved = json.loads((tmp_path / "checkpoint-3" / "trl_trust_state.json").read_text())
    shifts = [entry["vpd/shift"] for entry in whole.state.log_history if "vpd/shift" in entry]
    assert saved == {"shift": shifts[0], "rollout_batches": 3, "method": "VPD"} and whole.shift == shifts[-1]

    again = tiny_trainer(
        VPDTrainer,
        tiny_model_path,
        vpd_config(tmp_path, **settings),
        feedback_func=say_digits,
        reward_funcs=reward_digits,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.shift == pytest.approx(whole.shift, abs=1e-6) and again.rollout_batches == 6
    assert steps(again, "vpd/e_loss") == steps(whole, "vpd/e_loss") == ([1, 4] if mode == "replace" else [2, 4, 6])
    assert parameter_gap(whole.model, again.model) < 1e-5


def test_evaluation_makes_no_e_step(tiny_model_path, tmp_path):
    args = vpd_config(tmp_path, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, max_steps=2)
    trainer = run(tiny_model_path, args, eval_dataset=problems("test", 4))
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evals) == 2
    assert all(entry["eval_vpd/kl_student_teacher"] > 0 and "eval_vpd/e_loss" not in entry for entry in evals)


def test_options_of_the_base_work(tiny_model_path, tmp_path):
    args = vpd_config(
        tmp_path, beta=0.1, entropy_coef=0.01, top_entropy_quantile=0.8, mask_truncated_completions=True, max_steps=7
    )
    log = run(tiny_model_path, args).state.log_history
    assert all(math.isfinite(entry["loss"]) and "kl" in entry and "entropy_coef" in entry for entry in log[:7])


def test_gradient_checkpointing(tiny_model_path, tmp_path):
    plain = run(tiny_model_path, vpd_config(tmp_path, max_steps=3))
    checkpointed = run(tiny_model_path, vpd_config(tmp_path, max_steps=3, gradient_checkpointing=True))
    assert parameter_gap(plain.model, checkpointed.model) < 1e-6


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r}); sys.path.insert(0, {here!r})
from layouts import scripted
from test_vpd import reward_digits, say_digits, vpd_config
from tiny import leave, tiny_trainer
from trl_trust import VPDTrainer

torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
for mode in ("replace", "extra"):
    args = vpd_config(
        Path({out!r}) / mode, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, lr_scheduler_type="constant",
        num_generations=16, gradient_accumulation_steps=4 // world, steps_per_generation=4 // world, num_iterations=2,
        e_step_every=2, e_step_mode=mode, max_steps=4,
    )
    trainer = tiny_trainer(
        scripted(VPDTrainer), {model!r}, args, feedback_func=say_digits, reward_funcs=reward_digits
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    log = [(e["step"], e["vpd/e_loss"], e["vpd/shift"]) for e in trainer.state.log_history if "vpd/e_loss" in e]
    torch.save((parameters, log), Path({out!r}) / f"{{mode}}-{{rank}}-of-{{world}}.pt")
leave()
"""


def test_two_processes_train_like_one(tiny_model_path, tmp_path):  # 9
    """A group is spread over both, so one process is shown a response of the other; accumulation 2 against 4."""
    here = Path(__file__).parent
    script = tmp_path / "script.py"
    paths = dict(tests=str(here.parent), here=str(here), out=str(tmp_path), model=tiny_model_path)
    script.write_text(TWO_PROCESSES.format(**paths))
    subprocess.run([sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300)
    on_two_processes(script)
    begin = torch.cat(
        [p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(tiny_model_path).parameters()]
    )
    for mode, e_steps in (("replace", [1, 4]), ("extra", [3])):
        one, two, other = (torch.load(tmp_path / f"{mode}-{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
        torch.testing.assert_close(two[0], other[0], rtol=0, atol=0)
        torch.testing.assert_close(two[0], one[0], rtol=1e-4, atol=2e-6)
        assert [step for step, *_ in one[1]] == e_steps
        torch.testing.assert_close(torch.tensor(two[1]), torch.tensor(one[1]), rtol=1e-4, atol=1e-6)
        assert (one[0] - begin).abs().max() > 1e-3
