"""MDPO against its spec: worked numbers (section 7), invariants (section 6), the full divergence, then real runs."""

import math
from dataclasses import replace
from types import SimpleNamespace

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
    tiny_trainer,
)
from torch.func import functional_call
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from trl_trust.policy.base import clipped_surrogate
from trl_trust.policy.mdpo import (
    MDPOConfig,
    MDPOTrainer,
    OldDistribution,
    annealed_step_size,
    mdpo_loss,
)
from trl_trust.quickstart.task import problems


seeds = st.integers(0, 10_000)
sizes = st.floats(0.05, 20.0)
estimators = st.sampled_from(["unbiased", "k2"])
levels = st.sampled_from(["token", "sequence"])


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


def one_token(d, **fields):
    return policy_batch(logps=[[-1.0]], old_logps=[[-1.0 - d]], advantages=[1.0], **fields)


# -- worked numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "d", "loss", "grad"),
    [
        ("unbiased", 0.0, -1, -1),
        ("unbiased", 0.1, -1.094479, -0.884137),
        ("unbiased", 0.5, -1.297443, 0),
        ("unbiased", -0.3, -0.666946, -1.185309),
        ("k2", 0.0, -1, -1),
        ("k2", 0.1, -1.095171, -0.905171),
        ("k2", 0.5, -1.398721, -0.648721),
        ("k2", -0.3, -0.650818, -1.340818),
    ],
)
def test_table_of_tokens(divergence, d, loss, grad):
    got, got_grad, _ = loss_and_grad(mdpo_loss, one_token(d), divergence=divergence, step_size=0.5)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert got_grad.item() == pytest.approx(grad, abs=1e-6)


def test_token_mean():
    batch = policy_batch(logps=[[-1.0, -0.7]], old_logps=[[-1.1, -0.7]], advantages=[1.0])
    loss, grad, out = loss_and_grad(mdpo_loss, batch, step_size=0.5)
    assert loss.item() == pytest.approx(-1.047239, abs=1e-6)
    torch.testing.assert_close(grad, f64([[-0.442068, -0.5]]), atol=1e-6, rtol=0)
    assert masked_mean(out.metrics["mdpo/stationarity"], batch.mask) == pytest.approx((0.8 + 1.0) / 2)
    assert out.metrics["mdpo/ratio/max"].max().item() == pytest.approx(math.exp(0.1))


def test_sequence_level():
    batch = policy_batch(logps=[[-1.0, -0.7]], old_logps=[[-1.1, -0.9]], advantages=[1.0])
    loss, grad, _ = loss_and_grad(mdpo_loss, batch, "sequence", level="sequence", step_size=0.5)
    assert loss.item() == pytest.approx(-1.239661, abs=1e-6)
    torch.testing.assert_close(grad, f64([[-0.539944, -0.539944]]), atol=1e-6, rtol=0)


def mirror_step(advantages, step_size, divergence, old=(0.5, 0.3, 0.2)):
    """Minimiser of the exact expectation of the loss over three tokens, and the value there."""
    old_logps = f64(old).log()
    theta = old_logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def expectation():
        logps = torch.log_softmax(theta, 0)
        kl = (logps.exp() * (logps - old_logps)).sum()
        batch = policy_batch(logps=[[0.0]] * 3, advantages=advantages, extras={"divergence": kl.expand(3, 1)})
        batch = replace(batch, logps=logps.unsqueeze(1), old_logps=old_logps.unsqueeze(1))
        loss = mdpo_loss(batch, divergence=divergence, step_size=step_size).per_token_loss  # (3, 1)
        return (old_logps.exp().unsqueeze(1) * loss).sum()

    def closure():
        optimizer.zero_grad()
        value = expectation()
        value.backward()
        return value

    optimizer.step(closure)
    return torch.softmax(theta.detach(), 0), expectation().item()


@pytest.mark.parametrize("divergence", ["unbiased", "full"])
@pytest.mark.parametrize(
    ("step_size", "new", "value"),
    [
        (1.0, (0.784399, 0.173139, 0.042463), 0.249691),
        (0.5, (0.661783, 0.240835, 0.097382), 0.139342),
        (0.1, (0.534646, 0.290261, 0.175093), 0.030023),
    ],
)
def test_the_expectation_is_solved_by_the_mirror_step(divergence, step_size, new, value):  # 5
    got, loss = mirror_step([0.7, -0.3, -1.3], step_size, divergence)
    torch.testing.assert_close(got, f64(new), atol=2e-6, rtol=0)
    assert -loss == pytest.approx(value, abs=1e-6)


# -- invariants -------------------------------------------------------------------------------------------------------


@given(seeds, sizes, estimators)
def test_the_first_step_is_reinforce_whatever_the_step_size(seed, step_size, divergence):  # 1
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, out = loss_and_grad(mdpo_loss, batch, divergence=divergence, step_size=step_size)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())
    assert (out.metrics["mdpo/divergence"] == 0).all()


@given(seeds, estimators)
def test_an_infinite_step_size_is_the_unclipped_term(seed, divergence):  # 2
    batch = random_policy_batch(seed, spread=2.0)
    loss, grad, _ = loss_and_grad(mdpo_loss, batch, divergence=divergence, step_size=math.inf)
    ratio = torch.exp(batch.logps - batch.old_logps)
    unclipped = (clipped_surrogate(ratio, batch.advantages, 1e9, 1e9) * batch.mask).sum() / batch.mask.sum()
    torch.testing.assert_close(loss, unclipped.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(unclipped, batch.logps)[0])


def test_a_small_step_size_does_not_move_the_policy():  # 2
    new, _ = mirror_step([0.7, -0.3, -1.3], 1e-4, "unbiased")
    torch.testing.assert_close(new, f64((0.5, 0.3, 0.2)), atol=1e-4, rtol=0)


@given(seeds, sizes)
def test_the_gradient_vanishes_where_the_step_is_solved(seed, step_size):  # 3
    batch = random_policy_batch(seed)
    solved = replace(batch, old_logps=batch.logps.detach() - step_size * batch.advantages.clamp(-1, 1))
    solved = replace(solved, advantages=batch.advantages.clamp(-1, 1))
    _, grad, out = loss_and_grad(mdpo_loss, solved, step_size=step_size)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)
    assert out.metrics["mdpo/stationarity"].abs().max() < 1e-9


@given(seeds, sizes)
def test_the_gradient_in_closed_form(seed, step_size):
    batch = random_policy_batch(seed, spread=1.5)
    _, grad, _ = loss_and_grad(mdpo_loss, batch, step_size=step_size)
    d = batch.logps.detach() - batch.old_logps
    torch.testing.assert_close(grad, -d.exp() * (batch.advantages - d / step_size) * batch.mask / batch.mask.sum())


@given(seeds, estimators, levels)
def test_the_proximity_is_never_negative(seed, divergence, level):  # 3
    batch = random_policy_batch(seed, spread=3.0)
    out = mdpo_loss(batch, divergence=divergence, level=level)
    assert (out.metrics["mdpo/divergence"] >= 0).all()


def test_the_mean_of_the_unbiased_estimate_is_the_divergence():  # 3
    old, new = f64((0.5, 0.3, 0.2)), f64((0.4, 0.4, 0.2))
    batch = policy_batch(logps=new.log().unsqueeze(1), old_logps=old.log().unsqueeze(1), advantages=[0, 0, 0])
    mean = (old.unsqueeze(1) * mdpo_loss(batch).metrics["mdpo/divergence"]).sum()
    assert mean.item() == pytest.approx(0.025815, abs=1e-6)


@given(seeds, estimators, sizes)
def test_one_token_responses_make_the_levels_equal(seed, divergence, step_size):  # 6
    batch = random_policy_batch(seed, T=1)
    settings = dict(divergence=divergence, step_size=step_size)
    token, sequence = (loss_and_grad(mdpo_loss, batch, "sequence", level=x, **settings) for x in ("token", "sequence"))
    torch.testing.assert_close(token[0], sequence[0])
    torch.testing.assert_close(token[1], sequence[1])


@given(st.integers(1, 500), st.floats(0.01, 10))
def test_schedule(iterations, step_size):  # 7
    sizes = [annealed_step_size(k, iterations, step_size) for k in range(iterations)]
    assert sizes[0] == step_size
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= min(step_size, 2 / iterations)
    assert annealed_step_size(iterations, iterations, step_size) == sizes[-1]  # an evaluation after the last update
    assert annealed_step_size(iterations - 1, iterations, step_size, step_size) == step_size


@given(seeds, levels)
def test_masked_inputs_change_nothing(seed, level):  # 12
    batch = random_policy_batch(seed)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -5.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.1),
    )
    one, two = (loss_and_grad(mdpo_loss, b, "sequence", level=level) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_extreme_ratios_stay_finite_and_are_pulled_back():
    batch = policy_batch(logps=[[-0.1, -90.0]], old_logps=[[-80.0, -0.1]], advantages=[0.0])
    loss, grad, _ = loss_and_grad(mdpo_loss, batch)
    assert loss.isfinite() and grad.isfinite().all() and grad[0, 0] > 0


# -- the full divergence ----------------------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES = {
    "plain": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "multiplied": CohereConfig(**SMALL, logit_scale=0.5),
    "divided": GraniteConfig(**SMALL, logits_scaling=4.0),
    "capped": Gemma2Config(**SMALL, final_logit_softcapping=2.0, head_dim=8),
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_full_divergence_is_that_of_the_logits(config):
    """KL(new || old) and its gradient by every parameter, against the same from both models' whole logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    ids, T, temperature = torch.randint(3, 37, (3, 9)), 5, 0.7
    live = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    log_probs = lambda: torch.log_softmax(model(ids).logits[:, -T - 1 : -1] / temperature, -1)

    old = OldDistribution(model, temperature, fp32_head=False)
    with torch.no_grad():
        expected_old = log_probs()
        with old.recording(T) as hidden:
            model(ids[:2]), model(ids[2:])
        for p in model.parameters():  # updates since generation, of the head too
            p.add_(0.05 * torch.randn_like(p))

    with old.comparing(torch.cat(hidden), live) as left:
        model(ids)
    got = left["divergence"]
    new = log_probs()
    expected = (new.exp() * (new - expected_old)).sum(-1) * live
    assert expected[0].min() > 1e-5
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    weights = torch.rand(3, T)
    grads = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (got, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_direction_of_the_full_divergence():  # 4
    """A hidden state that is 1 and a vocabulary of two, so that the head is the logits: old (.5, .5), new (.9, .1)."""
    model = torch.nn.Module()
    model.config = ARCHITECTURES["plain"]
    model.base_model = torch.nn.Identity()
    model.head = torch.nn.Linear(1, 2, bias=False)
    model.get_output_embeddings = lambda: model.head
    ones = SimpleNamespace(last_hidden_state=torch.ones(1, 2, 1))
    distribution = OldDistribution(model, 1.0, fp32_head=False)

    model.head.weight.data = torch.tensor([[0.5], [0.5]]).log()
    with torch.no_grad(), distribution.recording(1) as hidden:
        model.base_model(ones)
    model.head.weight.data = torch.tensor([[0.9], [0.1]]).log()
    with distribution.comparing(torch.cat(hidden), torch.ones(1, 1, dtype=torch.bool)) as left:
        model.base_model(ones)
    assert left["divergence"].item() == pytest.approx(0.368064, abs=1e-6)


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0}, "must be a number > 0"),
        ({"step_size": math.nan}, "must be a number > 0"),
        ({"step_size_min": 1.5}, "at most step_size=1.0"),
        ({"level": "sequence", "loss_type": "grpo", "divergence": "full"}, "is per token"),
        ({"level": "sequence", "loss_type": "dapo"}, "must be 'grpo'"),
        ({"epsilon": 0.1}, "there is no clip"),
        ({"epsilon_high": 0.28}, "there is no clip"),
        ({"delta": 4.0}, "there is no clip"),
        ({"importance_sampling_level": "sequence"}, "use `level`"),
        ({"loss_type": "cispo"}, "aggregation only"),
        (
            dict(level="sequence", loss_type="grpo", use_vllm=True, vllm_importance_sampling_mode="token_truncate"),
            "a response is one action",
        ),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(MDPOConfig, **settings)
    name, value = list(settings.items())[-1]
    assert name in str(error.value) and str(value) in str(error.value)


# -- real runs --------------------------------------------------------------------------------------------------------


def stock(path, folder, **settings):
    return tiny_run(GRPOTrainer, path, tiny_config(GRPOConfig, folder, **settings))


def test_an_infinite_step_size_trains_exactly_as_grpo_without_a_clip(tiny_model_path, tmp_path):  # 2
    ours = tiny_run(MDPOTrainer, tiny_model_path, tiny_config(MDPOConfig, tmp_path / "a", step_size=math.inf))
    theirs = stock(tiny_model_path, tmp_path / "b", epsilon=1e6, epsilon_high=1e6)
    assert parameter_gap(ours.model, theirs.model) == 0.0
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


@pytest.mark.parametrize("divergence", ["unbiased", "full"])
def test_one_update_a_generation_trains_exactly_as_grpo(tiny_model_path, tmp_path, divergence):  # 1
    settings = dict(steps_per_generation=1, max_steps=3)
    args = tiny_config(MDPOConfig, tmp_path / "a", divergence=divergence, **settings)
    ours = tiny_run(MDPOTrainer, tiny_model_path, args)
    assert parameter_gap(ours.model, stock(tiny_model_path, tmp_path / "b", **settings).model) == 0.0


def test_the_step_size_holds_the_policy(tiny_model_path, tmp_path):
    settings = dict(num_iterations=2, max_steps=8, step_size_schedule="constant")
    logs = []
    for t in (10.0, 0.01):
        args = tiny_config(MDPOConfig, tmp_path / str(t), step_size=t, **settings)
        logs.append(tiny_run(MDPOTrainer, tiny_model_path, args).state.log_history)
    assert logs[0][0]["trust/kl"] == logs[1][0]["trust/kl"] == 0.0
    assert logs[1][7]["trust/kl"] < 0.5 * logs[0][7]["trust/kl"]


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_full_divergence_in_a_run(tiny_model_path, tmp_path, lora):
    """Every micro-batch, shuffled and used twice, meets its own rows: the divergence is 0 before the first update, and
    afterwards what the models' logits give."""
    seen = []

    class Watch(MDPOTrainer):
        def extend_rollouts(self, rollouts):
            self.old = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            return super().extend_rollouts(rollouts)

        def score_completions(self, model, inputs, batch_size=None):
            self.inputs = inputs
            return super().score_completions(model, inputs, batch_size)

        def policy_loss(self, batch):
            divergence = batch.extras["divergence"].detach().clone()
            out = super().policy_loss(batch)
            ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
            attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
            logps = []
            for state in (self.old, {}):
                with torch.no_grad():
                    logits = functional_call(
                        self.model, state, (), {"input_ids": ids, "attention_mask": attention}
                    ).logits
                logps.append(torch.log_softmax(logits[:, -batch.mask.size(1) - 1 : -1] / self.temperature, -1))
            old_logps, new_logps = logps
            expected = (new_logps.exp() * (new_logps - old_logps)).sum(-1)
            seen.append(((divergence - expected) * batch.mask).abs().max().item())
            return out

    args = tiny_config(MDPOConfig, tmp_path, divergence="full", num_iterations=2, max_steps=8, temperature=0.9)
    kwargs = dict(peft_config=LoraConfig(r=4, target_modules="all-linear")) if lora else {}
    trainer = tiny_run(Watch, tiny_model_path, args, **kwargs)
    log = trainer.state.log_history
    assert log[0]["mdpo/divergence"] == pytest.approx(0, abs=1e-6) and log[7]["mdpo/divergence"] > 1e-4
    assert max(seen) < 2e-6 and len(seen) == 8
    head = trainer.accelerator.unwrap_model(trainer.model).get_output_embeddings().weight
    assert (trainer._old_policy.old_head[0] is head) is lora  # a frozen head is not copied


@pytest.mark.parametrize("divergence", ["unbiased", "full"])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model_path, tmp_path, divergence):  # 7
    settings = dict(divergence=divergence, max_steps=8, save_strategy="steps", save_steps=4, report_to="none")
    whole = tiny_run(MDPOTrainer, tiny_model_path, tiny_config(MDPOConfig, tmp_path, **settings))
    resumed = tiny_trainer(MDPOTrainer, tiny_model_path, tiny_config(MDPOConfig, tmp_path, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert parameter_gap(whole.model, resumed.model) == 0.0
    sizes = [[entry["mdpo/step_size"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert sizes[0] == sizes[1] == [1.0] * 8  # two iterations: the floor 2 / K is 1
    assert annealed_step_size(1, 8, 1.0) == 0.875


def test_the_schedule_follows_the_global_step(tiny_model_path, tmp_path):  # 7
    # two updates of two micro-batches each an iteration
    batches = dict(max_steps=6, steps_per_generation=4, gradient_accumulation_steps=2)
    args = tiny_config(MDPOConfig, tmp_path, step_size=2.0, step_size_min=0.5, **batches)
    log = tiny_run(MDPOTrainer, tiny_model_path, args).state.log_history
    sizes = [entry["mdpo/step_size"] for entry in log if "loss" in entry]
    assert sizes == pytest.approx([2, 2, 4 / 3, 4 / 3, 2 / 3, 2 / 3])


def test_lora_on_the_fused_head_with_bf16_autocast(tiny_model_path, tmp_path):
    """Mixed precision: the stored states are in the dtype of the projection, and nothing diverges before an update."""
    args = tiny_config(MDPOConfig, tmp_path, divergence="full", bf16=True, max_steps=2)
    trainer = tiny_run(MDPOTrainer, tiny_model_path, args, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert trainer._buffered_inputs[0]["extras/old_hidden"].dtype == torch.bfloat16
    log = trainer.state.log_history
    assert log[0]["mdpo/divergence"] == pytest.approx(0, abs=1e-6) and log[1]["mdpo/divergence"] > 0


@pytest.mark.parametrize("divergence", ["unbiased", "full"])
def test_an_evaluation_between_updates_changes_no_update(tiny_model_path, tmp_path, divergence):
    models = []
    for name, evaluation in (("a", {}), ("b", dict(eval_strategy="steps", eval_steps=1))):
        args = tiny_config(MDPOConfig, tmp_path / name, divergence=divergence, **evaluation)
        models.append(tiny_run(MDPOTrainer, tiny_model_path, args, eval_dataset=problems("test", 4)).model)
    assert parameter_gap(*models) == 0.0


def test_evaluation(tiny_model_path, tmp_path):
    args = tiny_config(MDPOConfig, tmp_path, divergence="full", per_device_eval_batch_size=4, max_steps=2)
    trainer = tiny_trainer(MDPOTrainer, tiny_model_path, args, eval_dataset=problems("test", 4))
    trainer.train()
    assert trainer.evaluate()["eval_mdpo/divergence"] == pytest.approx(0, abs=1e-6)
