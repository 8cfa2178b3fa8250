"""OPMD against its spec (mdpo.md): worked numbers (section 7), invariants (section 6), then real runs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import loss_and_grad, parameter_gap, policy_batch, random_policy_batch, tiny_config, tiny_run, tiny_trainer
from trl import GRPOConfig, GRPOTrainer

from trl_trust.policy.base import GenerationBatch, PolicyBatch
from trl_trust.policy.opmd import OPMDConfig, OPMDTrainer, opmd_advantages, opmd_loss


seeds = st.integers(0, 10_000)
taus = st.floats(0.01, 10.0)
norms = st.sampled_from(["none", "length", "max_length"])
BASELINES = ["mean", "leave_one_out", "log_mean_exp", "log_mean_exp_leave_one_out"]


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def group_batch(rewards, s, lengths, tau, baseline="mean") -> PolicyBatch:
    """One group whose responses have log-ratio `s`, spread evenly over their live tokens."""
    s, lengths = f64(s), f64(lengths)
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).double()
    logps = -torch.ones_like(mask)
    return PolicyBatch(
        logps=logps.clone().requires_grad_(),
        old_logps=logps - (s / lengths)[:, None],
        mask=mask,
        advantages=opmd_advantages(f64(rewards)[None], tau=tau, baseline=baseline).T,
        rewards=f64(rewards),
        group=torch.zeros(len(s), dtype=torch.long),
    )


def with_groups(batch, size):
    return replace(batch, group=torch.arange(len(batch.mask)) // size)


# -- worked numbers ---------------------------------------------------------------------------------------------------

R, S, LENGTHS = (1, 0, 0, 1), (0.2, -0.3, 0.1, 0), (4, 5, 2, 1)


@pytest.mark.parametrize(
    ("baseline", "norm", "loss", "grad"),
    [
        ("mean", "none", 0.208750, (-0.1, 0.0875, 0.1375, -0.125)),
        ("mean", "length", 0.1164375, (-0.025, 0.0175, 0.06875, -0.125)),
        ("leave_one_out", "length", 0.208729, (-0.035417, 0.025833, 0.089583, -0.166667)),
        ("leave_one_out", "none", 0.386528, None),
    ],
)
def test_table(baseline, norm, loss, grad):
    batch = group_batch(R, S, LENGTHS, 0.5, baseline)
    got, got_grad, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=0.5, norm=norm)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    if grad is not None:  # by s, which every live token carries whole
        torch.testing.assert_close(got_grad, f64(grad)[:, None] * batch.mask, atol=1e-6, rtol=0)


def test_metrics_of_the_table():
    metrics = opmd_loss(group_batch(R, S, LENGTHS, 0.5), tau=0.5).metrics
    assert metrics["opmd/residual/mean_abs"].mean().item() == pytest.approx((0.4 + 0.35 + 0.55 + 0.5) / 4)
    assert metrics["opmd/log_ratio/mean"].mean().item() == pytest.approx(0.0)
    assert metrics["opmd/log_ratio/std"].item() == pytest.approx(f64(S).std(correction=0).item())
    assert metrics["opmd/pull"].mean().item() == pytest.approx(0.5 * 0.6 / 4)
    assert metrics["opmd/baseline"].mean().item() == pytest.approx(0.5)


def test_log_mean_exp():
    baseline = lambda tau, kind: f64(R) - opmd_advantages(f64(R)[None], tau=tau, baseline=kind)[0]
    torch.testing.assert_close(baseline(0.5, "log_mean_exp"), f64([0.716890] * 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(baseline(100, "log_mean_exp"), f64([0.501250] * 4), atol=1e-6, rtol=0)
    others = f64([0.570466, 0.830006, 0.830006, 0.570466])
    torch.testing.assert_close(baseline(0.5, "log_mean_exp_leave_one_out"), others, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("recenter", "loss", "grad"),
    [(True, 0.166250, (-0.1125, 0.075, 0.125, -0.0875)), (False, 0.168750, (-0.1, 0.0875, 0.1375, -0.075))],
)
def test_recentring(recenter, loss, grad):
    batch = group_batch(R, (0.2, -0.3, 0.1, 0.4), LENGTHS, 0.5)
    got, got_grad, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=0.5, norm="none", recenter=recenter)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(got_grad, f64(grad)[:, None] * batch.mask, atol=1e-6, rtol=0)


def test_the_mean_of_recentring_carries_gradient():
    """Where divisors differ within a group, what flows through the mean does not cancel."""
    s = torch.tensor([0.2, -0.3, 0.1, 0.4], dtype=torch.float64, requires_grad=True)
    lengths, tau = f64(LENGTHS), 0.5
    u = f64(R) - f64(R).mean() - tau * s
    u = u - u.mean()
    (expected,) = torch.autograd.grad((u.square() / (2 * tau) / lengths).mean(), s)
    batch = group_batch(R, s.detach(), LENGTHS, tau)
    _, grad, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=tau, norm="length", recenter=True)
    torch.testing.assert_close(grad, expected[:, None] * batch.mask)


def test_the_mean_baseline_is_more_conservative_than_the_mirror_step():
    old, rewards, tau = f64((0.5, 0.3, 0.2)), f64((1.0, 0.0, 0.0)), 0.5

    def optimum(baseline):
        theta = old.log().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            logps = torch.log_softmax(theta, 0).unsqueeze(1)
            batch = PolicyBatch(logps, old.log().unsqueeze(1), torch.ones(3, 1), (rewards - baseline).unsqueeze(1))
            loss = (old.unsqueeze(1) * opmd_loss(batch, tau=tau).per_token_loss).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return torch.softmax(theta.detach(), 0)

    mean, log_mean_exp = (old * rewards).sum(), tau * (old * (rewards / tau).exp()).sum().log()
    torch.testing.assert_close(optimum(mean), f64((0.833221, 0.100067, 0.066711)), atol=2e-6, rtol=0)
    torch.testing.assert_close(optimum(log_mean_exp), f64((0.880797, 0.071522, 0.047681)), atol=2e-6, rtol=0)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds, taus, norms)
def test_on_policy_it_is_reinforce_whatever_tau(seed, tau, norm):  # 8
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=tau, norm=norm, max_completion_length=50)
    length = batch.mask.sum(1, keepdim=True)
    divisor = {"none": 1.0, "length": length, "max_length": 50.0}[norm]
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / divisor / len(batch.mask))


@given(seeds, taus)
def test_equal_rewards_pull_to_the_anchor(seed, tau):  # 8
    batch = replace(random_policy_batch(seed), advantages=torch.zeros(4, 1, dtype=torch.float64))
    _, grad, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=tau, norm="none")
    s = ((batch.logps.detach() - batch.old_logps) * batch.mask).sum(1, keepdim=True)
    torch.testing.assert_close(grad, tau * s * batch.mask / len(s))
    at_anchor = replace(batch, old_logps=batch.logps.detach())
    assert (loss_and_grad(opmd_loss, at_anchor, "sequence", tau=tau)[1] == 0).all()


@given(seeds, taus)
def test_the_regression_of_the_report(seed, tau):  # 9
    batch = random_policy_batch(seed)
    r = torch.rand(4, dtype=torch.float64)
    batch = replace(batch, advantages=opmd_advantages(r[None]).T)
    s = ((batch.logps.detach() - batch.old_logps) * batch.mask).sum(1)
    loss, _, _ = loss_and_grad(opmd_loss, batch, "sequence", tau=tau, norm="none")
    torch.testing.assert_close(loss, ((r - r.mean() - tau * s).square() / (2 * tau)).mean())


@given(seeds, taus, st.floats(-3, 3), st.floats(-3, 3))
def test_recentred_the_baseline_does_not_matter(seed, tau, one, other):  # 10
    batch = with_groups(random_policy_batch(seed, B=6), 3)
    moved = replace(batch, advantages=batch.advantages + f64([[one]] * 3 + [[other]] * 3))
    settings = dict(tau=tau, norm="none", recenter=True)
    first, second = (loss_and_grad(opmd_loss, b, "sequence", **settings) for b in (batch, moved))
    torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(first[1], second[1], rtol=1e-6, atol=1e-9)


@given(seeds, taus)
def test_recentring_is_the_pairwise_form_of_the_live_responses(seed, tau):
    """mean u'^2 of a group = mean over pairs of (u_i - u_j)^2 / 2; a response without live tokens is in no pair."""
    batch = with_groups(random_policy_batch(seed, B=4), 4)
    batch.mask[2] = 0
    out = opmd_loss(batch, tau=tau, norm="none", recenter=True)
    live = [0, 1, 3]
    u = (batch.advantages - tau * ((batch.logps - batch.old_logps) * batch.mask).sum(1, keepdim=True))[live]
    pairs = (u - u.T).square().mean() / 2
    torch.testing.assert_close(out.per_token_loss[live].mean(), pairs / (2 * tau))


def test_an_unscored_response_has_no_part_in_recentring():
    scored = policy_batch(
        logps=[[-1.0], [-2.0], [-3.0]], old_logps=[[-1.5], [-1.9], [-3.0]], advantages=[0.5, -0.7, 0.3]
    )
    scored = replace(scored, rewards=f64([1, 0, 1]), group=torch.zeros(3, dtype=torch.long))
    with_one_more = policy_batch(
        logps=[[-1.0], [-2.0], [-4.0], [-3.0]],
        old_logps=[[-1.5], [-1.9], [-4.0], [-3.0]],
        advantages=[0.5, -0.7, 0.0, 0.3],
    )
    with_one_more = replace(with_one_more, rewards=f64([1, 0, math.nan, 1]), group=torch.zeros(4, dtype=torch.long))
    one, two = (opmd_loss(b, tau=0.5, recenter=True).per_token_loss for b in (scored, with_one_more))
    torch.testing.assert_close(two[[0, 1, 3]], one)
    assert two[2] == 0.0


@given(seeds)
def test_baselines(seed):  # 11
    r = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = opmd_advantages(r)
    torch.testing.assert_close(mean, r - r.mean(1, keepdim=True))
    torch.testing.assert_close(opmd_advantages(r, baseline="leave_one_out"), mean * 5 / 4)
    torch.testing.assert_close(opmd_advantages(r, tau=1e5, baseline="log_mean_exp"), mean, atol=1e-5, rtol=0)
    others = torch.stack([r[:, [j for j in range(5) if j != i]] for i in range(5)], 1)  # (P, G, G - 1)
    expected = r - 0.3 * (others / 0.3).exp().mean(-1).log()
    torch.testing.assert_close(opmd_advantages(r, tau=0.3, baseline="log_mean_exp_leave_one_out"), expected)


@pytest.mark.parametrize("baseline", BASELINES)
def test_unscored_responses_are_left_out(baseline):
    nan = math.nan
    r = f64([[1, 0, nan, 1], [nan, nan, 2, nan], [nan, nan, nan, nan]])
    got = opmd_advantages(r, tau=0.5, baseline=baseline)
    expected = opmd_advantages(f64([[1, 0, 1]]), tau=0.5, baseline=baseline)[0]
    torch.testing.assert_close(got[0], f64([expected[0], expected[1], 0, expected[2]]))
    assert (got[1:] == 0).all()


def test_small_tau_stays_finite():
    r = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    for baseline in BASELINES:
        assert opmd_advantages(r, tau=1e-4, baseline=baseline).isfinite().all()


@given(seeds, norms, st.booleans())
def test_masked_inputs_change_nothing(seed, norm, recenter):  # 12
    batch = with_groups(random_policy_batch(seed), 2)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -5.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.1),
    )
    one, two = (loss_and_grad(opmd_loss, b, "sequence", norm=norm, recenter=recenter) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "must be a finite number > 0"),
        ({"tau": math.inf}, "must be a finite number > 0"),
        ({"scale_rewards": "group"}, "must be 'none'"),
        ({"loss_type": "dapo"}, "must be 'grpo'"),
        ({"epsilon": 0.1}, "there is no clip"),
        ({"delta": 4.0}, "there is no clip"),
        ({"importance_sampling_level": "sequence"}, "a response is one action"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "standardises rewards"),
        ({"recenter": True, "per_device_train_batch_size": 2}, "whole groups"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "token_mask"}, "weights tokens"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(OPMDConfig, **settings)
    name, value = list(settings.items())[-1]
    assert name in str(error.value) and str(value) in str(error.value)


def test_a_grpo_config_takes_the_defaults_of_the_method():
    args = OPMDConfig.from_grpo_config(tiny_config(GRPOConfig))
    assert (args.loss_type, args.scale_rewards, args.tau, args.norm) == ("grpo", "none", 0.01, "length")


# -- real runs --------------------------------------------------------------------------------------------------------


def opmd_run(path, folder, trainer_class=OPMDTrainer, **settings):
    kwargs = {"peft_config": settings.pop("peft_config", None)}
    return tiny_run(trainer_class, path, tiny_config(OPMDConfig, folder, **settings), **kwargs)


def test_one_update_a_generation_trains_as_grpo_without_scaling(tiny_model_path, tmp_path):  # 8
    settings = dict(steps_per_generation=1, max_steps=3, optim="sgd", learning_rate=1.0, loss_type="grpo")
    ours = opmd_run(tiny_model_path, tmp_path / "a", **settings)
    args = tiny_config(GRPOConfig, tmp_path / "b", scale_rewards="none", **settings)
    stock = tiny_run(GRPOTrainer, tiny_model_path, args)
    start = tiny_trainer(GRPOTrainer, tiny_model_path, args)
    assert parameter_gap(ours.model, stock.model) < 1e-6 < 1e-2 < parameter_gap(start.model, stock.model)


def test_a_plain_grpo_config_runs(tiny_model_path, tmp_path):
    trainer = tiny_run(OPMDTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path))
    log = trainer.state.log_history
    assert log[0]["opmd/pull"] == 0.0 and log[3]["opmd/pull"] > 0.0
    for name in ("residual/mean_abs", "log_ratio/mean", "log_ratio/std", "baseline"):
        assert math.isfinite(log[3][f"opmd/{name}"])
    assert log[0]["opmd/baseline"] == pytest.approx(log[0]["reward"], rel=0.5)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_baseline_reaches_the_loss_through_the_shuffle(tiny_model_path, tmp_path, baseline):
    seen = []

    class Watch(OPMDTrainer):
        def policy_loss(self, batch):
            seen.append((batch.rewards.clone(), batch.group.clone(), batch.advantages.squeeze(1).clone()))
            return super().policy_loss(batch)

    opmd_run(tiny_model_path, tmp_path, Watch, baseline=baseline, tau=0.3)
    rewards, group, advantages = (torch.cat(x) for x in zip(*seen, strict=True))  # one generation, 16 rows
    assert not torch.equal(group, group.sort().values)  # shuffled
    for g in range(4):
        r = rewards[group == g]
        expected = opmd_advantages(r[None], tau=0.3, baseline=baseline)[0]
        torch.testing.assert_close(advantages[group == g], expected)


def test_each_process_takes_its_own_rows(tiny_model_path, tmp_path):
    trainer = tiny_trainer(OPMDTrainer, tiny_model_path, tiny_config(OPMDConfig, tmp_path))
    rewards, taken = f64([1, 0, 0, 0, 5, 9, 7, 7]), []
    for rows in (slice(0, 4), slice(4, 8)):
        taken.append(trainer.extend_rollouts(GenerationBatch([], [], [], [], rewards, 4, rows, {}))["advantages"])
    assert [x.tolist() for x in taken] == [[0.75, -0.25, -0.25, -0.25], [-2.0, 2.0, 0.0, 0.0]]


def test_recentring_gets_whole_groups(tiny_model_path, tmp_path):
    seen = []

    class Watch(OPMDTrainer):
        def policy_loss(self, batch):
            seen.append(batch.group.tolist())
            return super().policy_loss(batch)

    settings = dict(recenter=True, per_device_train_batch_size=4, num_generations=2)
    log = opmd_run(tiny_model_path, tmp_path, Watch, **settings).state.log_history
    assert all(groups.count(g) == 2 for groups in seen for g in groups)
    assert all(entry["grad_norm"] > 0 for entry in log if "grad_norm" in entry)


@pytest.mark.parametrize("reset", [False, True])
def test_the_optimizer_is_reset_at_each_anchor(tiny_model_path, tmp_path, reset):
    trainer = opmd_run(tiny_model_path, tmp_path, reset_optimizer=reset, max_steps=6, steps_per_generation=4)
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == ({2} if reset else {6})


@pytest.mark.parametrize("reset", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model_path, tmp_path, reset):
    settings = dict(reset_optimizer=reset, max_steps=8, save_strategy="steps", save_steps=4)
    whole = opmd_run(tiny_model_path, tmp_path, **settings)
    resumed = tiny_trainer(OPMDTrainer, tiny_model_path, tiny_config(OPMDConfig, tmp_path, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert parameter_gap(whole.model, resumed.model) == 0.0


def test_lora(tiny_model_path, tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = opmd_run(tiny_model_path, tmp_path, num_iterations=2, max_steps=8, peft_config=lora, recenter=True)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in log) and log[7]["trust/kl"] > 0
