"""TRPA against its spec: worked numbers (section 7), invariants (section 6), then real runs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import scripted
from peft import LoraConfig
from tiny import loss_and_grad, parameter_gap, policy_batch, tiny_config, tiny_run, tiny_trainer
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from trl_trust import TRPAConfig, TRPATrainer, trpa_loss
from trl_trust.policy.trpa import trust_kl
from trl_trust.quickstart.task import problems


seeds = st.integers(0, 10_000)
FORMS = ("k3_code", "old_new", "new_old")
PAIRS = {"trust_coef": 0.0}  # the pairwise term alone


def ranked_batch(R, levels, group=None, lengths=None, T=4):
    """Responses with given mean log-ratios to the reference, on-policy, in float64."""
    R = torch.as_tensor(R, dtype=torch.float64)
    lengths = torch.as_tensor([T] * len(R) if lengths is None else lengths)
    logps = torch.full((len(R), T), -1.0, dtype=torch.float64)
    return policy_batch(
        logps=logps,
        ref_logps=logps - R[:, None],
        mask=torch.arange(T)[None] < lengths[:, None],
        advantages=[0.0] * len(R),
        group=torch.as_tensor([0] * len(R) if group is None else group),
        extras={"levels": torch.as_tensor(levels)},
    )


def random_ranked(seed, prompts=3, G=4, T=5, spread=0.5):
    """Whole groups in random order, with random levels from 1 to 4 and old and reference policies that differ."""
    g = torch.Generator().manual_seed(seed)
    B = prompts * G
    rand = lambda: torch.randn(B, T, generator=g, dtype=torch.float64)
    logps = rand() - 3
    order = torch.randperm(B, generator=g)
    batch = policy_batch(
        logps=logps,
        old_logps=logps + spread * rand(),
        ref_logps=logps + spread * rand(),
        mask=torch.arange(T)[None] < torch.randint(0, T + 1, (B, 1), generator=g),
        advantages=[0.0] * B,
        group=(torch.arange(B) // G)[order],
        extras={"levels": torch.randint(1, 5, (B,), generator=g)},
    )
    return batch


def take(batch, rows):
    """The batch of some rows, or of all in another order."""
    tensors = {name: getattr(batch, name)[rows] for name in ("old_logps", "ref_logps", "mask", "advantages", "group")}
    logps = batch.logps.detach()[rows].requires_grad_()
    return replace(batch, logps=logps, **tensors, extras={k: x[rows] for k, x in batch.extras.items()})


def by_response(batch, **settings):
    """L_pref and dL_pref / dR, which is the sum of the gradient over a response's tokens."""
    loss, grad, _ = loss_and_grad(trpa_loss, batch, **PAIRS, **settings)
    return loss.item(), grad.sum(1)


def near(values):
    return pytest.approx(values, abs=1e-6)


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "loss", "grad"),
    [
        ("pair", 0.684808, [-0.082136, 0.024161, 0.057975]),
        ("response", 0.685542, [-0.082229, -0.000308, 0.033200]),
    ],
)
def test_worked_group(mode, loss, grad):
    batch = ranked_batch([0.10, -0.05, 0.02], [1, 2, 4], lengths=[2, 4, 1])
    got, got_grad = by_response(batch, anisotropy_mode=mode)
    assert got == near(loss) and got_grad.tolist() == near(grad)


def test_worked_gradient_per_token():
    batch = ranked_batch([0.10, -0.05, 0.02], [1, 2, 4], lengths=[2, 4, 1])
    _, grad, _ = loss_and_grad(trpa_loss, batch, **PAIRS)
    assert grad.tolist() == [near(row) for row in ([-0.041068] * 2 + [0, 0], [0.006040] * 4, [0.057975, 0, 0, 0])]


@pytest.mark.parametrize(("norm", "loss"), [("prompt", 0.695267), ("batch", 0.690037)])
def test_worked_two_groups(norm, loss):
    batch = ranked_batch([0.10, -0.05, 0.02, 0, 0.1], [1, 2, 4, 1, 2], group=[0, 0, 0, 1, 1])
    assert by_response(batch, pair_norm=norm)[0] == near(loss)


@pytest.mark.parametrize(("level", "loss"), [(1, 0.681428), (2, 0.706428)])
@pytest.mark.parametrize("norm", ["prompt", "batch"])
def test_worked_fallback(level, loss, norm):
    batch = ranked_batch([0.1, -0.05], [level, level])
    assert by_response(batch, no_pair_fallback="code", pair_norm=norm)[0] == near(loss)


def test_worked_small_h():  # and invariant 6
    _, grad = by_response(ranked_batch([0.0] * 8, [1] * 3 + [2] * 5))
    assert grad.tolist() == near([-0.041667] * 3 + [0.025] * 5)
    p, reward = 3 / 8, torch.tensor([1.0] * 3 + [0.0] * 5, dtype=torch.float64)
    reinforce = -(reward - p) / 8
    torch.testing.assert_close(grad, 2.5 * 0.1 / 2 / (p * (1 - p)) * reinforce)


@pytest.mark.parametrize(
    ("d", "form", "value", "slope"),
    [
        (0.2, "k3_code", 0.018731, 0.181269),
        (0.2, "old_new", 0.021403, 0.221403),
        (0.2, "new_old", 0.022878, 0.244281),
        (-0.1, "k3_code", 0.005171, -0.105171),
        (-0.1, "old_new", 0.004837, -0.095163),
        (-0.1, "new_old", 0.004679, -0.090484),
    ],
)
def test_worked_divergences(d, form, value, slope):
    d = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    kl = trust_kl(d, form)
    assert kl.item() == near(value) and torch.autograd.grad(kl, d)[0].item() == near(slope)


@pytest.mark.parametrize(("form", "mean"), [("k3_code", 0.024733), ("old_new", 0.025267), ("new_old", 0.025815)])
def test_worked_means_under_the_old_policy(form, mean):
    old, new = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    assert (old * trust_kl((new / old).log(), form)).sum().item() == near(mean)
    exact = {
        "k3_code": (old.square() / new).sum() - 1 - (old * (old / new).log()).sum(),  # chi^2(old||new) - KL(old||new)
        "old_new": (old * (old / new).log()).sum(),
        "new_old": (new * (new / old).log()).sum(),
    }
    assert exact[form].item() == near(mean)


# -- invariants of the pairs ------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(["pair", "response"]), st.sampled_from(["prompt", "batch"]))
def test_at_the_reference_every_pair_costs_log_2(seed, mode, norm):  # 1
    batch = random_ranked(seed)
    batch = replace(batch, ref_logps=batch.logps.detach())
    loss, _ = by_response(batch, anisotropy_mode=mode, pair_norm=norm)
    has_pairs = trpa_loss(batch).metrics["trpa/pairs/count"].sum() > 0
    assert loss == pytest.approx(math.log(2) if has_pairs else 0.0)


@given(seeds)
def test_the_pull_on_a_prompts_responses_sums_to_zero(seed):  # 2
    batch = random_ranked(seed)
    _, grad = by_response(batch)
    for g in range(3):
        assert grad[batch.group == g].sum().item() == pytest.approx(0.0, abs=1e-12)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 2))
def test_a_pair_of_single_tokens_is_dpo(winner, loser, beta):  # 3
    batch = ranked_batch([winner, loser], [1, 2], T=1)
    loss, _ = by_response(batch, anisotropy=1.0, preference_beta=beta)
    assert loss == pytest.approx(-logsigmoid(torch.tensor(beta * (winner - loser)).double()).item())


@pytest.mark.parametrize("mode", ["pair", "response"])
def test_only_the_order_of_levels_and_level_one_matter(mode):  # 4
    R = [0.10, -0.05, 0.02]
    loss = lambda levels, **settings: by_response(ranked_batch(R, levels), anisotropy_mode=mode, **settings)[0]
    assert loss([1, 2, 4]) == loss([1, 3, 4])
    assert loss([2, 3, 5]) == loss([1, 2, 4], anisotropy=1.0) != loss([1, 2, 4])


@given(seeds, st.integers(1, 4))
def test_one_level_teaches_nothing_and_stays_connected(seed, level):  # 5
    batch = random_ranked(seed)
    batch = replace(batch, extras={"levels": torch.full((12,), level)})
    out = trpa_loss(batch, **PAIRS)
    assert out.batch_loss.item() == 0.0 and out.batch_loss.requires_grad
    assert (torch.autograd.grad(out.batch_loss, batch.logps)[0] == 0).all()


@given(seeds)
def test_fallback_pays_only_for_prompts_without_pairs(seed):
    batch = random_ranked(seed, prompts=2)
    levels = torch.where(batch.group == 0, 1, batch.extras["levels"])  # the first prompt is on level 1 throughout
    batch = replace(batch, extras={"levels": levels})
    _, grad = by_response(batch, no_pair_fallback="code")
    R = ((batch.logps.detach() - batch.ref_logps) * batch.mask).sum(1) / batch.mask.sum(1)
    first = (batch.group == 0) & (batch.mask.sum(1) > 0)
    second_pays = ((batch.group == 1) & (batch.mask.sum(1) > 0)).any()
    expected = -torch.sigmoid(-R[first]) / first.sum() / (1 + second_pays)
    torch.testing.assert_close(grad[first], expected)


@given(seeds, st.sampled_from(["prompt", "batch"]), st.sampled_from(["skip", "code"]))
def test_gradient_per_token_is_that_of_the_response_over_its_length(seed, norm, fallback):  # 7
    batch = random_ranked(seed)
    _, grad, _ = loss_and_grad(trpa_loss, batch, **PAIRS, pair_norm=norm, no_pair_fallback=fallback)
    length = batch.mask.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(grad, grad.sum(1, keepdim=True) / length * batch.mask)
    live = batch.mask > 0
    noisy = lambda x, value: torch.where(live, x.detach(), value)
    other = replace(
        batch,
        logps=noisy(batch.logps, -9.0).requires_grad_(),
        old_logps=noisy(batch.old_logps, -0.5),
        ref_logps=noisy(batch.ref_logps, -4.0),
    )
    for settings in ({}, {"sqrt_kl": True}):
        settings = {**settings, "pair_norm": norm, "no_pair_fallback": fallback}
        one, two = (loss_and_grad(trpa_loss, b, **settings) for b in (batch, other))
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_responses_without_tokens_or_level_are_in_no_pair():
    batch = ranked_batch([0.1, -0.05, 0.02, 0.3], [1, 2, 4, 1], lengths=[4, 4, 4, 0])
    expected = by_response(ranked_batch([0.1, -0.05, 0.02], [1, 2, 4]))[0]
    assert by_response(batch)[0] == pytest.approx(expected)
    assert by_response(ranked_batch([0.1, -0.05, 0.02, 0.3], [1, 2, 4, 0]))[0] == pytest.approx(expected)


@given(seeds, st.sampled_from(["skip", "code"]))
def test_rows_may_be_permuted_and_groups_moved(seed, fallback):  # 9
    batch = random_ranked(seed, prompts=4)
    settings = {"no_pair_fallback": fallback}
    loss, grad = by_response(batch, **settings)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    other_loss, other_grad = by_response(take(batch, order), **settings)
    assert other_loss == pytest.approx(loss)
    torch.testing.assert_close(other_grad, grad[order])

    # two micro-batches of unequal size; a prompt counts 1 / prompts in both
    missing = trpa_loss(batch, **settings).metrics["trpa/preference/loss"].isnan().squeeze(1)
    prompts = len(batch.group[~missing].unique())
    batch = replace(batch, extras={**batch.extras, "prompt_weight": torch.full((16,), 1 / max(prompts, 1)).double()})
    parts = [take(batch, (batch.group == 0).nonzero()[:, 0]), take(batch, (batch.group > 0).nonzero()[:, 0])]
    assert sum(by_response(part, **settings)[0] for part in parts) == pytest.approx(loss)


@given(seeds)
def test_averages_agree_where_groups_have_equally_many_pairs(seed):  # 10
    batch = random_ranked(seed)
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    levels = torch.empty(12, dtype=torch.long)
    for g in range(3):
        levels[batch.group == g] = torch.tensor([1, 2, 2, 3])
    batch = replace(batch, extras={"levels": levels})
    one, two = (by_response(batch, pair_norm=norm) for norm in ("prompt", "batch"))
    assert one[0] == pytest.approx(two[0])
    torch.testing.assert_close(one[1], two[1])


@given(seeds, st.booleans())
def test_no_gradient_reaches_the_old_and_the_reference_policy(
    seed, sqrt_kl
):  # 11: constants of the batch are constants
    batch = random_ranked(seed)
    out = trpa_loss(batch, sqrt_kl=sqrt_kl)
    total = (out.per_token_loss * batch.mask).sum() + out.batch_loss
    grad = torch.autograd.grad(total, batch.logps)[0]
    shifted = replace(batch, logps=batch.logps.detach() + 0.3, old_logps=batch.old_logps + 0.3)
    shifted = replace(shifted, ref_logps=batch.ref_logps + 0.3, logps=shifted.logps.requires_grad_())
    out = trpa_loss(shifted, sqrt_kl=sqrt_kl)
    total = (out.per_token_loss * batch.mask).sum() + out.batch_loss
    torch.testing.assert_close(torch.autograd.grad(total, shifted.logps)[0], grad)
    assert not any(x.requires_grad for x in out.metrics.values())


# -- invariants of the trust term -------------------------------------------------------------------------------------


@given(st.sampled_from(FORMS), st.floats(-60, 60))
def test_divergence_is_positive_and_flat_beyond_the_clamp(form, d):  # 8
    d = torch.tensor(d, dtype=torch.float64, requires_grad=True)
    kl = trust_kl(d, form)
    slope = torch.autograd.grad(kl, d)[0].item()
    assert 0 <= kl.item() <= 10 and (kl.item() > 0 or abs(d.item()) < 1e-6)
    assert slope == 0.0 if kl.item() == 10 else slope * d.item() >= 0


@pytest.mark.parametrize("form", FORMS)
def test_divergence_near_zero(form):  # 1, 8
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    kl = trust_kl(d, form)
    (slope,) = torch.autograd.grad(kl, d, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, d)
    assert (kl.item(), slope.item(), curvature.item()) == (0.0, 0.0, pytest.approx(1.0))


@pytest.mark.parametrize("form", FORMS)
def test_divergence_stays_finite_in_float32(form):
    d = torch.tensor([-500.0, -100.0, 100.0, 500.0], requires_grad=True)
    kl = trust_kl(d, form)
    (slope,) = torch.autograd.grad(kl.sum(), d)
    assert kl.isfinite().all() and (slope == 0).all()


@given(seeds, st.sampled_from(FORMS))
def test_the_trust_term_is_the_mean_divergence(seed, form):
    batch = random_ranked(seed)
    levels = torch.ones(12, dtype=torch.long)  # no pairs
    batch = replace(batch, extras={"levels": levels})
    D = (trust_kl(batch.logps.detach() - batch.old_logps, form) * batch.mask).sum() / batch.mask.sum()
    loss, grad, out = loss_and_grad(trpa_loss, batch, trust_coef=0.5, kl_form=form)
    torch.testing.assert_close(loss, 0.5 * D)
    torch.testing.assert_close((out.metrics["trpa/trust/kl"] * batch.mask).sum() / batch.mask.sum(), D.detach())
    root, root_grad, _ = loss_and_grad(trpa_loss, batch, trust_coef=0.5, kl_form=form, sqrt_kl=True)
    torch.testing.assert_close(root, 0.5 * (D + 0.25).sqrt())
    torch.testing.assert_close(root_grad, grad / (2 * (D + 0.25).sqrt()))


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_worked_metrics():
    batch = ranked_batch([0.10, -0.05, 0.02, 0, 0.1, 0.3, 0.2], [1, 2, 4, 1, 2, 5, 0], group=[0, 0, 0, 1, 1, 2, 2])
    metrics = trpa_loss(batch).metrics
    mean = lambda name: metrics[f"trpa/{name}"].nanmean().item()
    # as the trainer averages: over rows, so over prompts where these are of one size
    assert metrics["trpa/preference/loss"].flatten().tolist()[:5] == near([0.684808] * 3 + [0.705725] * 2)
    assert metrics["trpa/preference/loss"][5:].isnan().all()
    assert metrics["trpa/preference/accuracy"].flatten().tolist()[:5] == near([2 / 3] * 3 + [0] * 2)
    assert metrics["trpa/preference/margin"].flatten().tolist()[:5] == near([0.16 / 3] * 3 + [-0.1] * 2)
    assert metrics["trpa/log_ratio/winner"].flatten().tolist()[:5] == near([0.15 / 3] * 3 + [0] * 2)
    assert metrics["trpa/log_ratio/loser"].flatten().tolist()[:5] == near([-0.01 / 3] * 3 + [0.1] * 2)
    assert metrics["trpa/pairs/count"].flatten().tolist() == [3, 3, 3, 1, 1, 0, 0]
    assert metrics["trpa/pairs/groups_without"].flatten().tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert [mean(f"level/{k}") for k in (1, 2, 3, 4)] == near([2 / 6, 2 / 6, 0, 2 / 6])


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preference_beta", 0.0, "must be a finite number > 0"),
        ("anisotropy", -1.0, "must be a finite number > 0"),
        ("anisotropy", math.inf, "must be a finite number > 0"),
        ("trust_coef", -0.1, "must be a finite number >= 0"),
        ("sqrt_kl", "yes", "must be True or False"),
        ("level_rule", "maths", "must be one of reward, math, knights_and_knaves, or a dotted import path"),
        ("level_one_reward", math.nan, "must be a finite number"),
        ("level_thresholds", [0.2, 0.5], "strictly descending"),
        ("level_thresholds", [0.5, 0.5], "strictly descending"),
        ("epsilon", 0.1, "`trust_coef`"),
        ("epsilon_high", 0.28, "`trust_coef`"),
        ("delta", 4.0, "`trust_coef`"),
        ("importance_sampling_level", "sequence", "no ratio"),
        ("top_entropy_quantile", 0.2, "whole responses"),
        ("off_policy_mask_threshold", 0.5, "advantages"),
        ("scale_rewards", "none", "`level_rule`"),
        ("loss_type", "cispo", "aggregation only"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(TRPAConfig, **{field: value})
    assert field in str(error.value) and str(value) in str(error.value)


def test_fragments_of_groups_are_refused():
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=2.*num_generations=4"):
        tiny_config(TRPAConfig, per_device_train_batch_size=2, steps_per_generation=8)


def test_two_sources_of_levels_are_refused(tiny_model_path, tmp_path):
    args = tiny_config(TRPAConfig, tmp_path, level_rule="math")
    with pytest.raises(ValueError, match="level_rule='math'.*keep one"):
        tiny_trainer(TRPATrainer, tiny_model_path, args, level_fn=lambda **kwargs: [])


@pytest.mark.parametrize("levels", [[1], [1.5] * 16, [-1] * 16])
def test_levels_that_are_none_are_refused(levels, tiny_model_path, tmp_path):
    def broken_rule(**kwargs):
        return levels

    trainer = tiny_trainer(TRPATrainer, tiny_model_path, tiny_config(TRPAConfig, tmp_path), level_fn=broken_rule)
    with pytest.raises(ValueError, match="broken_rule returned.*here 16, from 1"):
        trainer.train()


# -- real runs --------------------------------------------------------------------------------------------------------


def test_a_run_starts_at_the_reference_and_leaves_it(tiny_model_path, tmp_path):
    begin = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    trainer = tiny_run(TRPATrainer, tiny_model_path, tiny_config(TRPAConfig, tmp_path, loss_type="bnpo"))
    log = trainer.state.log_history
    assert trainer.args.beta == 0.0
    assert log[0]["trpa/preference/loss"] == pytest.approx(math.log(2)) and log[0]["trpa/trust/kl"] == 0.0
    assert log[3]["trpa/trust/kl"] > 0 and log[3]["trpa/log_ratio/winner"] != 0
    assert log[3]["kl"] > 1e-4  # to the reference: logged, not added
    for entry in log[:4]:
        assert entry["trpa/pairs/groups_without"] == 0.0
        expected = entry["trpa/preference/loss"] + 0.001 * entry["trpa/trust/kl"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-5)
        assert sum(entry[f"trpa/level/{k}"] for k in (1, 2, 3, 4)) == pytest.approx(1.0)
    assert parameter_gap(trainer.model, begin) > 1e-3
    assert parameter_gap(trainer.ref_model, begin) == 0.0  # 11


def test_it_learns_what_the_levels_say(tiny_model_path, tmp_path):
    args = tiny_config(TRPAConfig, tmp_path, max_steps=48, preference_beta=1.0)
    log = tiny_run(TRPATrainer, tiny_model_path, args).state.log_history
    rewards = [entry["reward"] for entry in log if "reward" in entry]  # of twelve generations
    assert sum(rewards[-3:]) / 3 > 2 * rewards[0]


def test_trls_beta_adds_its_kl(tiny_model_path, tmp_path):
    args = tiny_config(TRPAConfig, tmp_path, loss_type="bnpo", beta=0.5)
    log = tiny_run(TRPATrainer, tiny_model_path, args).state.log_history
    for entry in log[:4]:
        expected = entry["trpa/preference/loss"] + 0.001 * entry["trpa/trust/kl"] + 0.5 * entry["kl"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-5)


def layout_run(model_path, folder, rows, accumulation, micro_batches, **settings):
    """SGD on scripted completions, with levels by length, so that some prompts have no pair."""
    args = tiny_config(
        TRPAConfig,
        folder,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=micro_batches,
        num_iterations=2,
        **settings,
    )
    long_or_short = lambda completion_ids, **kwargs: [1 if len(ids) > 6 else 2 for ids in completion_ids]
    return tiny_run(scripted(TRPATrainer), model_path, args, level_fn=long_or_short)


@pytest.mark.parametrize("fallback", ["skip", "code"])
@pytest.mark.parametrize(
    ("many", "few"), [((4, 4, 4), (16, 1, 1)), ((4, 2, 4), (8, 1, 2))], ids=["one", "two updates"]
)
def test_accumulation_does_not_matter(many, few, fallback, tiny_model_path, tmp_path):  # 9
    one, two = (
        layout_run(tiny_model_path, tmp_path / name, *layout, no_pair_fallback=fallback)
        for name, layout in (("many", many), ("few", few))
    )
    without = [entry["trpa/pairs/groups_without"] for entry in one.state.log_history[:4]]
    assert any(0 < share < 1 for share in without), without  # or equal weights would do
    assert parameter_gap(one.model, two.model) < 2e-6
    assert parameter_gap(one.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


@pytest.mark.parametrize(("fallback", "prompts"), [("skip", 1), ("code", 3)])
def test_a_prompt_counts_if_it_has_something_to_pay(fallback, prompts, tiny_model_path, tmp_path):
    weights, losses = [], []

    class Watch(TRPATrainer):
        def policy_loss(self, batch):
            out = super().policy_loss(batch)
            weights.append(batch.extras["prompt_weight"].clone())
            losses.append(out.batch_loss.item())
            return out

    levels = [None, 1, 1, 1, 1, 3, 2, None, None, None, None, None, 2, 2, 2, 2]
    args = tiny_config(TRPAConfig, tmp_path, no_pair_fallback=fallback, learning_rate=0.0)
    tiny_run(Watch, tiny_model_path, args, level_fn=lambda **kwargs: levels)
    assert torch.cat(weights).tolist() == pytest.approx([4 / prompts] * 16)  # 4 micro-batches
    assert sum(loss > 0 for loss in losses) == prompts  # of one prompt each
    assert sum(losses) / 4 == pytest.approx(math.log(2))  # the mean over prompts, at the reference


def test_level_functions_see_the_rollouts(tiny_model_path, tmp_path):
    seen = {}

    def rule(prompts, completions, completion_ids, rewards, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, rewards=rewards, answer=answer)
        return [None, *range(1, 16)]

    class Watch(TRPATrainer):
        def policy_loss(self, batch):
            seen.setdefault("levels", []).append(batch.extras["levels"].clone())
            seen.setdefault("group", []).append(batch.group.clone())
            return super().policy_loss(batch)

    tiny_run(Watch, tiny_model_path, tiny_config(TRPAConfig, tmp_path), level_fn=rule)
    assert all(len(seen[name]) == 16 for name in ("prompts", "completions", "ids", "rewards", "answer"))
    assert eval(seen["prompts"][0].rstrip("=")) == int(seen["answer"][0])
    assert all(len(group.unique()) == 1 for group in seen["group"])  # whole groups, though shuffled
    order = torch.cat(seen["group"])
    assert not torch.equal(order, order.sort().values)
    assert torch.cat(seen["levels"])[order.argsort(stable=True)].tolist() == list(range(16))


def test_ready_rule_and_plain_config(tiny_model_path, tmp_path):
    # an untrained model boxes nothing: everything is on level 4, nothing is learnt, and nothing breaks
    args = tiny_config(TRPAConfig, tmp_path / "math", level_rule="math", optim="sgd")
    trainer = tiny_run(TRPATrainer, tiny_model_path, args)
    assert trainer.state.log_history[0]["trpa/level/4"] == 1.0
    assert trainer.state.log_history[0]["trpa/pairs/groups_without"] == 1.0
    assert trainer.state.log_history[0]["grad_norm"] == 0.0
    args = tiny_config(GRPOConfig, tmp_path / "plain", steps_per_generation=4)  # the class swap
    assert tiny_run(TRPATrainer, tiny_model_path, args).args.preference_beta == 0.1


def test_evaluation(tiny_model_path, tmp_path):
    args = tiny_config(TRPAConfig, tmp_path, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=8)
    alternating = lambda prompts, **kwargs: [1 + i % 2 for i in range(len(prompts))]
    data = problems("test", 2)  # one batch
    log = tiny_run(TRPATrainer, tiny_model_path, args, eval_dataset=data, level_fn=alternating).state.log_history
    (entry,) = (entry for entry in log if "eval_loss" in entry)
    assert entry["eval_loss"] == pytest.approx(entry["eval_trpa/preference/loss"], abs=1e-6)
    assert entry["eval_trpa/pairs/count"] == 4.0


def test_lora_has_the_base_model_as_reference(tiny_model_path, tmp_path):
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = tiny_run(TRPATrainer, tiny_model_path, tiny_config(TRPAConfig, tmp_path), peft_config=peft_config)
    log = trainer.state.log_history
    assert trainer.ref_model is None
    assert log[0]["trpa/preference/loss"] == pytest.approx(math.log(2)) and log[3]["trpa/log_ratio/winner"] != 0
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().max() > 0 for p in moved)
    merged = trainer.model.unload()
    assert parameter_gap(merged, AutoModelForCausalLM.from_pretrained(tiny_model_path)) == 0.0
