"""RLAD against its spec: worked numbers (section 6), invariants (section 5), then real runs with a teacher."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import (
    digits_reward,
    loss_and_grad,
    masked_mean,
    parameter_gap,
    policy_batch,
    random_policy_batch,
    save_tiny_model,
    tiny_config,
    tiny_run,
    tiny_trainer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_trust import RLADConfig, RLADTrainer, rlad_loss
from trl_trust.policy.base import grpo_loss
from trl_trust.tokens import different_ids


seeds = st.integers(0, 10_000)
alphas = st.floats(0, 1)
probabilities = st.floats(0.01, 0.99)


def log(x):
    return torch.as_tensor(x, dtype=torch.float64).log()


def from_probabilities(policy, old, teacher, advantages, **fields):
    return policy_batch(
        logps=log(policy), old_logps=log(old), advantages=advantages, extras={"teacher_logps": log(teacher)}, **fields
    )


def with_teacher(batch, seed=0, spread=1.0):
    """`batch` with a teacher whose log-probabilities are `spread` away from the policy's."""
    noise = torch.randn(batch.logps.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=batch.logps.dtype)
    return replace(batch, extras={"teacher_logps": (batch.logps.detach() + spread * noise).clamp(max=-1e-3)})


def objective_and_derivative(batch, **settings):
    out = rlad_loss(batch, **settings)
    (grad,) = torch.autograd.grad(out.per_token_loss.sum(), batch.logps)
    return -out.per_token_loss.detach(), -grad, out


# -- worked numbers ---------------------------------------------------------------------------------------------------

TABLE = [
    # teacher, ratio, (objective, derivative) for A = +1, for A = -1
    (0.60, 0.898146, (0.898146, 0.898146), (-0.898146, -0.898146)),
    (0.20, 1.555635, (1.280000, 0.0), (-1.555635, -1.555635)),
    (0.05, 1.729193, (1.280000, 0.0), (-1.729193, -0.864597)),
    (0.95, 0.713774, (0.713774, 0.713774), (-0.800000, 0.0)),
]


@pytest.mark.parametrize(("teacher", "ratio", "up", "down"), TABLE)
@pytest.mark.parametrize("sign", [1, -1])
def test_table_of_tokens(teacher, ratio, up, down, sign):
    batch = from_probabilities([[0.44]], [[0.40]], [[teacher]], [sign])
    objective, derivative, out = objective_and_derivative(batch)
    assert (objective.item(), derivative.item()) == pytest.approx(up if sign > 0 else down, abs=1e-6)
    assert out.metrics["rlad/ratio/mean"].item() == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "objective", "derivative"),
    [
        ({"clamp_grad": "straight_through"}, -1.729193, -1.729193),
        ({"teacher_log_ratio_clip": None}, -3.111270, -3.111270),
    ],
)
def test_a_saturated_clamp(settings, objective, derivative):
    batch = from_probabilities([[0.44]], [[0.40]], [[0.05]], [-1])
    got, slope, _ = objective_and_derivative(batch, **settings)
    assert (got.item(), slope.item()) == pytest.approx((objective, derivative), abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "ratio"), [(0, 0.733333), (0.3, 0.828188), (0.5, 0.898146), (0.7, 0.974014), (1, 1.1)]
)
def test_ratio_by_alpha(alpha, ratio):
    batch = from_probabilities([[0.44]], [[0.40]], [[0.60]], [1])
    assert rlad_loss(batch, alpha=alpha).metrics["rlad/ratio/mean"].item() == pytest.approx(ratio, abs=1e-6)


def test_aggregation():
    batch = from_probabilities(
        [[0.44, 0.5, 0.3], [0.2, 0.9, 0.9]],
        [[0.40, 0.5, 0.25], [0.25, 0.9, 0.9]],
        [[0.60, 0.2, 0.3], [0.10, 0.9, 0.9]],
        [1, -1],
        mask=[[1, 1, 1], [1, 0, 0]],
    )
    loss, grad, out = loss_and_grad(rlad_loss, batch, "sequence")
    assert loss.item() == pytest.approx(0.086857, abs=1e-6)
    expected = torch.tensor([[-0.149691, 0, -0.182574], [0.632456, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)
    assert loss_and_grad(rlad_loss, batch, "token")[0].item() == pytest.approx(-0.502170, abs=1e-6)

    ratios = torch.tensor([0.898146, 1.581139, 1.095445, 1.264911], dtype=torch.float64)
    torch.testing.assert_close(out.metrics["rlad/ratio/max"][batch.mask > 0], ratios, atol=1e-6, rtol=0)
    shares = {
        name: masked_mean(out.metrics[f"rlad/{name}"], batch.mask) for name in ("dead/pos", "dead/neg", "clamped")
    }
    assert shares == {"dead/pos": 0.25, "dead/neg": 0.0, "clamped": 0.0}
    gap = (math.log(0.44 / 0.6) + math.log(0.5 / 0.2) + math.log(0.2 / 0.1)) / 4
    assert masked_mean(out.metrics["rlad/student_minus_teacher"], batch.mask) == pytest.approx(gap)


def test_kdrl_is_grpo_plus_a_kl_to_the_teacher():
    batch = from_probabilities([[0.44, 0.5]], [[0.40, 0.5]], [[0.60, 0.1]], [1])
    loss, grad, _ = loss_and_grad(rlad_loss, batch, alpha=1.0, teacher_kl_coef=0.1)
    grpo, grpo_grad, _ = loss_and_grad(grpo_loss, batch, epsilon_high=0.28)
    k3 = [t / p - math.log(t / p) - 1 for p, t in ((0.44, 0.6), (0.5, 0.1))]
    assert loss.item() == pytest.approx(grpo.item() + 0.1 * sum(k3) / 2)
    slope = torch.tensor([[1 - 0.6 / 0.44, 1 - 0.1 / 0.5]], dtype=torch.float64) / 2
    torch.testing.assert_close(grad - grpo_grad, 0.1 * slope)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds)
def test_alpha_one_is_grpo_to_the_bit_and_never_reads_the_teacher(seed):  # 1, the pure part
    batch = random_policy_batch(seed)
    nan = replace(batch, extras={"teacher_logps": torch.full_like(batch.old_logps, torch.nan)})
    one, two = loss_and_grad(rlad_loss, nan, alpha=1.0), loss_and_grad(grpo_loss, batch, epsilon_high=0.28)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    for name, metric in two[2].metrics.items():
        assert torch.equal(one[2].metrics[name].nan_to_num(-1), metric.nan_to_num(-1)), name


@given(seeds)
def test_alpha_zero_without_bounds_is_the_ratio_to_the_teacher(seed):  # 2
    batch = with_teacher(random_policy_batch(seed), seed)
    objective, derivative, _ = objective_and_derivative(
        batch, alpha=0.0, teacher_log_ratio_clip=None, epsilon=1 - 1e-9, epsilon_high=1e9
    )
    expected = batch.advantages * torch.exp(batch.logps.detach() - batch.extras["teacher_logps"])
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(derivative, expected)


@given(seeds, alphas)
def test_a_teacher_that_is_the_old_policy_gives_grpo(seed, alpha):  # 3
    batch = random_policy_batch(seed, spread=0.2)
    batch = replace(batch, extras={"teacher_logps": batch.old_logps})
    one = loss_and_grad(rlad_loss, batch, alpha=alpha, teacher_log_ratio_clip=None)
    two = loss_and_grad(grpo_loss, batch, epsilon_high=0.28)
    torch.testing.assert_close(one[:2], two[:2])


@given(seeds, alphas)
def test_where_all_agree_it_is_the_policy_gradient(seed, alpha):  # 4
    batch = random_policy_batch(seed)
    same = batch.logps.detach()
    batch = replace(batch, old_logps=same, extras={"teacher_logps": same})
    _, grad, out = loss_and_grad(rlad_loss, batch, alpha=alpha, teacher_kl_coef=0.1)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())
    assert (out.metrics["rlad/ratio/mean"] == 1).all()


@given(seeds, alphas)
def test_equal_rewards_teach_nothing_whatever_the_teacher_says(seed, alpha):  # 5
    batch = with_teacher(random_policy_batch(seed), seed)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    loss, grad, _ = loss_and_grad(rlad_loss, batch, alpha=alpha)
    assert loss == 0 and (grad == 0).all()


@given(seeds, alphas, st.sampled_from(["literal", "straight_through"]))
def test_the_teacher_sets_the_size_and_never_the_direction(seed, alpha, clamp_grad):  # 6
    batch = with_teacher(random_policy_batch(seed), seed, spread=3.0)
    _, derivative, _ = objective_and_derivative(batch, alpha=alpha, clamp_grad=clamp_grad)
    assert (derivative * batch.advantages >= 0).all()


@given(seeds, alphas)
def test_masked_inputs_change_nothing(seed, alpha):  # 8
    batch = with_teacher(random_policy_batch(seed), seed)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -7.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.2),
        extras={"teacher_logps": torch.where(live, batch.extras["teacher_logps"], 0.0)},
    )
    one, two = (loss_and_grad(rlad_loss, b, alpha=alpha, teacher_kl_coef=0.1) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@given(seeds, st.sampled_from([0.3, 0.5]), st.sampled_from([None, 1.0]))
def test_dead_zones_of_the_first_step(seed, alpha, c):  # 9
    batch = with_teacher(random_policy_batch(seed), seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, derivative, out = objective_and_derivative(
        batch, alpha=alpha, teacher_log_ratio_clip=c, clamp_grad="straight_through"
    )
    over_teacher = torch.exp(batch.logps.detach() - batch.extras["teacher_logps"])
    high, low = {0.5: (1.6384, 0.64), 0.3: (1.422843, 0.727038)}[alpha]
    dead = ((batch.advantages > 0) & (over_teacher > high)) | ((batch.advantages < 0) & (over_teacher < low))
    assert torch.equal(derivative == 0, dead)
    if c is not None:
        ratio = out.metrics["rlad/ratio/mean"]
        assert (ratio >= math.exp(-(1 - alpha)) - 1e-9).all() and (ratio <= math.exp(1 - alpha) + 1e-9).all()


@given(seeds)
def test_the_two_gradients_of_the_clamp_agree_within_it(seed):  # 11
    batch = with_teacher(random_policy_batch(seed), seed, spread=1.5)
    literal, through = (objective_and_derivative(batch, clamp_grad=how) for how in ("literal", "straight_through"))
    torch.testing.assert_close(literal[0], through[0])
    within = (batch.logps.detach() - batch.extras["teacher_logps"]).abs() < 1
    torch.testing.assert_close(literal[1][within], through[1][within])
    torch.testing.assert_close(literal[1][~within], 0.5 * through[1][~within])


def test_a_token_that_the_teacher_excludes_is_bounded_by_the_clamp():
    batch = from_probabilities([[0.44]], [[0.40]], [[0.0]], [-1])
    for how in ("literal", "straight_through"):
        objective, derivative, _ = objective_and_derivative(batch, clamp_grad=how)
        assert objective.item() == pytest.approx(-1.729193, abs=1e-6) and derivative.isfinite()


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.5}, r"must be a number in \[0, 1\]"),
        ({"alpha": math.nan}, r"must be a number in \[0, 1\]"),
        ({"teacher_log_ratio_clip": 0}, "must be a finite number > 0, or None"),
        ({"teacher_temperature": -1.0}, "must be a finite number > 0, or None"),
        ({"clamp_grad": "none"}, "must be 'literal' or 'straight_through'"),
        ({"teacher_kl_coef": -0.1}, "must be a finite number >= 0"),
        ({"epsilon": 1.0}, r"must be a number in \[0, 1\)"),
        ({"epsilon_high": -0.1}, r"must be a number >= 0 \(`inf` is allowed\), or None"),
        ({"beta": -0.1}, "must be a finite number >= 0"),
        ({"delta": 4.0}, "two-sided clipping"),
        ({"importance_sampling_level": "sequence"}, "one per token"),
        ({"loss_type": "cispo"}, "aggregation only"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(RLADConfig, **settings)
    ((name, value),) = settings.items()
    assert name in str(error.value) and str(value) in str(error.value)


@pytest.mark.parametrize("value", ["{bad", '"abc"', "[1]", [1]])
def test_loading_options_that_are_no_mapping_raise(value):
    with pytest.raises(ValueError, match=r"teacher_model_init_kwargs=.* mapping"):
        tiny_config(RLADConfig, teacher_model_init_kwargs=value)


def test_defaults_are_the_papers_and_json_is_read():
    args = tiny_config(RLADConfig, teacher_model_init_kwargs='{"dtype": "bfloat16"}')
    assert (args.alpha, args.teacher_log_ratio_clip, args.epsilon, args.epsilon_high) == (0.5, 1.0, 0.2, 0.28)
    assert (args.loss_type, args.teacher_model_init_kwargs) == ("grpo", {"dtype": "bfloat16"})


@pytest.mark.parametrize(("alpha", "warns"), [(0.5, False), (1.0, True)])
def test_only_grpo_needs_stale_rollouts(alpha, warns):
    assert tiny_config(RLADConfig, alpha=alpha).needs_stale_rollouts is warns


def test_ids_that_two_vocabularies_do_not_agree_on():
    ours = {"a": 0, "b": 1, "<pad>": 2}
    assert different_ids(ours, {"a": 0, "b": 1}) == []  # padding that only we have
    assert different_ids(ours, {"a": 0, "b": 1, "<pad>": 2, "more": 3}) == []
    assert different_ids(ours, {"a": 1, "b": 0, "<pad>": 2}) == [("a", 0, 1), ("b", 1, 0)]
    assert different_ids(ours, {"a": 0, "b": 1, "<end>": 2}) == [("<pad>", 2, "'<end>'")]


# -- the teacher ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    """Folder of another untrained Qwen2, twice as wide, with the policy's tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("teacher"), hidden_size=32, seed=1)


def rlad_config(path, **settings):
    return tiny_config(RLADConfig, path, **settings)


def test_teacher_logps_are_the_plain_forwards(tiny_model_path, teacher_path, tmp_path):
    """At the sampling temperature, of the sampled tokens, through the shuffle."""
    seen = []

    class Watch(RLADTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            seen.append({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})
            return super().compute_loss(model, inputs, **kwargs)

    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path, temperature=0.7, max_steps=2)
    tiny_run(Watch, tiny_model_path, args)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    for inputs in seen:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = teacher(ids, attention_mask=mask).logits[:, :-1] / 0.7
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        live = inputs["completion_mask"] > 0
        expected = logps[:, -live.size(1) :][live]
        torch.testing.assert_close(inputs["extras/teacher_logps"][live], expected, atol=1e-5, rtol=1e-5)


def test_its_own_temperature(tiny_model_path, teacher_path, tmp_path):
    def teacher_logps(**settings):
        args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path, max_steps=1, **settings)
        trainer = tiny_run(RLADTrainer, tiny_model_path, args)
        return torch.cat([part["extras/teacher_logps"] for part in trainer._buffered_inputs])

    assert torch.equal(teacher_logps(), teacher_logps(teacher_temperature=1.0))
    assert not torch.equal(teacher_logps(), teacher_logps(teacher_temperature=2.0))


def test_the_teacher_never_changes_and_is_not_saved(tiny_model_path, teacher_path, tmp_path):  # 7
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path).train()
    trainer = tiny_run(RLADTrainer, tiny_model_path, rlad_config(tmp_path), teacher_model=teacher)
    assert parameter_gap(teacher, AutoModelForCausalLM.from_pretrained(teacher_path)) == 0.0
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert parameter_gap(trainer.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3
    log = trainer.state.log_history
    assert log[0]["rlad/teacher_time"] > 0 and "rlad/teacher_time" not in log[1]  # once a generation batch
    trainer.save_model(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert parameter_gap(saved, trainer.model) == 0.0


def test_a_teacher_in_its_own_dtype(tiny_model_path, teacher_path, tmp_path):
    args = rlad_config(
        tmp_path, teacher_model_name_or_path=teacher_path, teacher_model_init_kwargs={"dtype": "bfloat16"}, max_steps=2
    )
    trainer = tiny_run(RLADTrainer, tiny_model_path, args)
    assert trainer.teacher_model.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    assert all(math.isfinite(entry["rlad/student_minus_teacher"]) for entry in trainer.state.log_history[:2])


def test_clipping_acts_on_a_fresh_rollout(tiny_model_path, teacher_path, tmp_path, caplog):
    """The ratio is live on-policy, so nothing is warned about."""
    args = rlad_config(
        tmp_path,
        teacher_model_name_or_path=teacher_path,
        teacher_temperature=0.1,  # an untrained teacher has no opinions otherwise
        steps_per_generation=1,
        per_device_train_batch_size=16,
        max_steps=1,
    )
    log = tiny_run(RLADTrainer, tiny_model_path, args).state.log_history[0]
    assert "does nothing" not in caplog.text
    assert log["clip_ratio/region_mean"] > 0 and log["trust/cut"] > 0 and log["trust/ratio/max"] == 1.0
    assert log["rlad/dead/pos"] + log["rlad/dead/neg"] == pytest.approx(log["clip_ratio/region_mean"])


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_alpha_one_trains_exactly_as_stock_grpo(loss_type, tiny_model_path, tmp_path):  # 1
    common = dict(loss_type=loss_type, epsilon_high=0.28)
    ours = tiny_run(RLADTrainer, tiny_model_path, rlad_config(tmp_path / "a", alpha=1.0, **common))
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "b", **common))
    assert parameter_gap(ours.model, stock.model) == 0.0
    for a, b in zip(ours.state.log_history[:4], stock.state.log_history[:4], strict=True):
        for name in ("loss", "grad_norm", "entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
        for name in [key for key in b if key.startswith("clip_ratio/")]:
            assert a[name] == pytest.approx(b[name], abs=1e-6), name
    assert ours.teacher_model is None


def test_alpha_one_says_that_it_leaves_the_teacher_out(tiny_model_path, teacher_path, tmp_path, caplog):
    args = rlad_config(tmp_path, alpha=1.0, teacher_model_name_or_path=teacher_path)
    assert tiny_trainer(RLADTrainer, tiny_model_path, args).teacher_model is None
    assert "the teacher is not loaded" in caplog.text


def test_kdrl_loads_the_teacher(tiny_model_path, teacher_path, tmp_path):
    args = rlad_config(tmp_path, alpha=1.0, teacher_kl_coef=0.1, teacher_model_name_or_path=teacher_path, max_steps=2)
    log = tiny_run(RLADTrainer, tiny_model_path, args).state.log_history
    assert log[0]["rlad/teacher_kl"] > 0 and "rlad/clamped" not in log[0]


def test_accumulation_leaves_the_update_as_it_is(tiny_model_path, teacher_path, tmp_path):  # 10
    def train(accumulation):
        args = rlad_config(
            tmp_path,
            teacher_model_name_or_path=teacher_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=accumulation,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            max_steps=2,
        )
        return tiny_run(RLADTrainer, tiny_model_path, args).model

    one, eight = train(1), train(8)
    assert parameter_gap(one, eight) < 1e-5
    assert parameter_gap(one, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


def test_a_lora_student(tiny_model_path, teacher_path, tmp_path):
    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path)
    trainer = tiny_run(RLADTrainer, tiny_model_path, args, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    log = trainer.state.log_history
    assert all(entry["grad_norm"] > 0 for entry in log[:4])
    assert log[0]["rlad/student_minus_teacher"] != 0


def test_resuming_goes_on_as_if_never_stopped(tiny_model_path, teacher_path, tmp_path):
    settings = dict(
        teacher_model_name_or_path=teacher_path, steps_per_generation=1, save_strategy="steps", save_steps=2
    )
    whole = tiny_run(RLADTrainer, tiny_model_path, rlad_config(tmp_path, **settings))
    again = tiny_trainer(RLADTrainer, tiny_model_path, rlad_config(tmp_path, **settings))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert parameter_gap(whole.model, again.model) < 1e-5


def test_evaluation_scores_with_the_teacher(tiny_model_path, teacher_path, tmp_path):
    from trl_trust.quickstart.task import problems

    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path, per_device_eval_batch_size=4)
    trainer = tiny_trainer(RLADTrainer, tiny_model_path, args, eval_dataset=problems("test", 4))
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_rlad/ratio/max"] > 1.0


# -- what is refused at construction ----------------------------------------------------------------------------------


def test_a_teacher_is_needed(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match=r"alpha=0.5.*Set `teacher_model_name_or_path`"):
        tiny_trainer(RLADTrainer, tiny_model_path, rlad_config(tmp_path))


def test_one_teacher_is_enough(tiny_model_path, teacher_path, tmp_path):
    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path)
    with pytest.raises(ValueError, match="keep one of the two"):
        tiny_trainer(RLADTrainer, tiny_model_path, args, teacher_model=teacher_path)


def test_loading_options_of_a_loaded_teacher(tiny_model_path, teacher_path, tmp_path):
    args = rlad_config(tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="already loaded"):
        tiny_trainer(
            RLADTrainer, tiny_model_path, args, teacher_model=AutoModelForCausalLM.from_pretrained(teacher_path)
        )


def test_another_tokenizer_is_refused(tiny_model_path, teacher_path, tmp_path):
    """The same letters in another order."""
    AutoModelForCausalLM.from_pretrained(teacher_path).save_pretrained(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(teacher_path)
    tokenizer.save_pretrained(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    vocabulary = tokenizer.get_vocab()
    swapped = text.replace(f'"7": {vocabulary["7"]}', f'"7": {vocabulary["8"]}', 1)
    swapped = swapped.replace(f'"8": {vocabulary["8"]}', f'"8": {vocabulary["7"]}', 1)
    assert swapped != text
    (tmp_path / "other" / "tokenizer.json").write_text(swapped)
    args = rlad_config(tmp_path, teacher_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"2 tokens differ.*'7' is 10 to the policy, and 11 here"):
        tiny_trainer(RLADTrainer, tiny_model_path, args)


def test_a_teacher_without_the_policys_ids_is_refused(tiny_model_path, teacher_path, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path)
    teacher.resize_token_embeddings(30)
    with pytest.raises(ValueError, match="knows 30 token ids"):
        tiny_trainer(RLADTrainer, tiny_model_path, rlad_config(tmp_path), teacher_model=teacher)


def test_a_sampled_id_beyond_the_teacher_is_refused(teacher_path, tmp_path):
    """The policy's embedding is padded further than the teacher's, and an untrained policy samples the padding."""
    policy = AutoModelForCausalLM.from_pretrained(teacher_path)
    policy.resize_token_embeddings(1000)
    policy.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(teacher_path).save_pretrained(tmp_path / "padded")
    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path)
    trainer = tiny_trainer(RLADTrainer, str(tmp_path / "padded"), args, reward_funcs=digits_reward)
    with pytest.raises(ValueError, match="was sampled, but the teacher knows"):
        trainer.train()


def test_a_teacher_without_a_tokenizer_is_taken_on_trust(tiny_model_path, teacher_path, tmp_path, caplog):
    AutoModelForCausalLM.from_pretrained(teacher_path).save_pretrained(tmp_path / "bare")
    args = rlad_config(tmp_path, teacher_model_name_or_path=str(tmp_path / "bare"))
    tiny_trainer(RLADTrainer, tiny_model_path, args)
    assert "no tokenizer to compare token ids with" in caplog.text


def test_the_teachers_tokenizer_is_loaded_under_the_teachers_terms(
    tiny_model_path, teacher_path, tmp_path, monkeypatch
):
    asked, load = [], AutoTokenizer.from_pretrained

    def from_pretrained(name, **options):
        asked.append((name, options))
        return load(name)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    terms = {"revision": "main", "trust_remote_code": True}
    args = rlad_config(tmp_path, teacher_model_name_or_path=teacher_path, teacher_model_init_kwargs=terms)
    tiny_trainer(RLADTrainer, tiny_model_path, args)
    assert (teacher_path, terms) in asked
