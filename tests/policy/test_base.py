"""The proof of the base: GRPO's term through the seam is stock `GRPOTrainer`, in loss, gradients and metrics.

Stock TRL is the oracle. Both trainers are built with the same settings and given the same micro-batches; what stock
logs must be logged here with the same value.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import digits_reward, parameter_gap, random_policy_batch, tiny_config, tiny_run, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

import trl_trust
from trl_trust import (
    ALPConfig,
    ALPTrainer,
    DISPOConfig,
    DISPOTrainer,
    DPPOConfig,
    DPPOTrainer,
    TrustGRPOConfig,
    TrustGRPOTrainer,
)
from trl_trust.methods import METHODS, get_method
from trl_trust.policy.base import MULTIMODAL_INPUTS, _shuffle_groups, extras_of
from trl_trust.policy.config import AGGREGATIONS
from trl_trust.policy.telemetry import (
    _join_processes,
    local_statistics,
    masked_quantiles,
    read_gathered,
    telemetry,
)
from trl_trust.policy.terms import PolicyLoss
from trl_trust.quickstart.task import build_tokenizer, problems


B, P, T = 4, 5, 7  # responses a micro-batch, prompt tokens, completion tokens
VOCAB = len(build_tokenizer())

# settings, extra inputs of the micro-batch, attributes that only a vLLM installation could set
OPTIONS = {
    "plain": ({}, ()),
    "epsilon_high, delta": (dict(epsilon_high=0.28, delta=1.3), ()),
    "reference": (dict(beta=0.1), ("ref",)),
    "reference, bias-corrected": (dict(beta=0.1, use_bias_correction_kl=True), ("ref",)),
    "off-policy mask": (dict(off_policy_mask_threshold=0.01), ()),
    "off-policy mask, sampler": (dict(off_policy_mask_threshold=0.01), ("sampler",)),
    "entropy mask": (dict(top_entropy_quantile=0.5), ()),
    "vllm token": ({}, ("sampler", "correction_token")),
    "vllm sequence": ({}, ("sampler", "correction_sequence")),
    "entropy bonus": (dict(entropy_coef=0.01), ()),
    "adaptive entropy": (dict(use_adaptive_entropy=True, entropy_coef=0.02, entropy_target=10.0), ()),
    "adaptive entropy, gated": (dict(use_adaptive_entropy=True, entropy_coef=0.02, entropy_target=0.5), ()),
    "tools": ({}, ("tools",)),
    "mixture of experts": (dict(router_aux_loss_coef=0.05), ("moe",)),
    "all at once": (
        dict(
            beta=0.05,
            use_bias_correction_kl=True,
            off_policy_mask_threshold=0.01,
            top_entropy_quantile=0.7,
            entropy_coef=0.01,
            delta=1.3,
            router_aux_loss_coef=0.05,
        ),
        ("ref", "sampler", "correction_token", "tools", "moe"),
    ),
}


@pytest.fixture(scope="session")
def moe_model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def micro_batch(trainer, seed, extra):
    """Inputs as `_prepare_inputs` gives them: padded prompts, ragged completions, one response with no live token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([T, T - 2, 0, 3])
    prompt_mask = (torch.arange(P)[None] >= torch.tensor([0, 1, 2, 0])[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(3, VOCAB, (B, P), generator=g) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, VOCAB, (B, T), generator=g),
        "completion_mask": (torch.arange(T)[None] < lengths[:, None]).long(),
        "advantages": torch.randn(B, generator=g),
        "num_items_in_batch": torch.tensor(47),
    }
    with torch.no_grad():
        near, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([prompt_mask, inputs["completion_mask"]], 1),
            T,
        )
    noise = lambda scale: near + scale * torch.randn(B, T, generator=g)
    inputs["old_per_token_logps"] = noise(0.3)
    if "ref" in extra:
        inputs["ref_per_token_logps"] = noise(0.5)
    if "sampler" in extra:
        inputs["sampling_per_token_logps"] = noise(0.3)
        inputs["sampling_per_token_logps"][0, 1] = torch.nan
    if "correction_token" in extra:
        inputs["importance_sampling_ratio"] = torch.rand(B, T, generator=g) * 2
    if "correction_sequence" in extra:
        inputs["importance_sampling_ratio"] = torch.rand(B, 1, generator=g) * 2
    if "tools" in extra:
        inputs["tool_mask"] = (torch.rand(B, T, generator=g) > 0.3).long()
    return inputs


def one_step(trainer, extra, loss_type, level, accumulation, training=True):
    """Run one accumulation window by hand; return losses, gradients and what is logged."""
    trainer.model.train(training)
    trainer.model.zero_grad()
    trainer.args.loss_type = trainer.loss_type = loss_type
    trainer.args.importance_sampling_level = trainer.importance_sampling_level = level
    trainer.current_gradient_accumulation_steps = accumulation
    if any(x.startswith("correction") for x in extra):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    losses = []
    with torch.set_grad_enabled(training):
        for i in range(accumulation):
            trainer.accelerator.gradient_state._set_sync_gradients(i == accumulation - 1)
            loss = trainer.compute_loss(trainer.model, micro_batch(trainer, i, extra))
            if training:
                loss.backward()
            losses.append(loss.item())
    grads = [p.grad.clone() for p in trainer.model.parameters()] if training else []
    trainer.log({})
    trainer.model.train()
    return losses, grads, trainer.state.log_history[-1]


@pytest.fixture(scope="module", params=OPTIONS)
def both(request, tmp_path_factory):
    """Stock and ours under one set of options, built once for the grid."""
    settings, extra = OPTIONS[request.param]
    path = request.getfixturevalue("moe_model_path" if "moe" in extra else "tiny_model_path")
    out = tmp_path_factory.mktemp("both")
    # a live entropy coefficient is state: each cell of the grid starts from the same value
    build = lambda trainer, config: tiny_trainer(trainer, path, tiny_config(config, out, **settings))
    return build(GRPOTrainer, GRPOConfig), build(TrustGRPOTrainer, TrustGRPOConfig), extra


def assert_same_step(stock, ours):
    (stock_losses, stock_grads, stock_log), (losses, grads, log) = stock, ours
    assert losses == pytest.approx(stock_losses, rel=1e-6, abs=1e-7)
    for g, s in zip(grads, stock_grads, strict=True):
        torch.testing.assert_close(g, s, rtol=1e-5, atol=1e-7)
    expected = {k: v for k, v in stock_log.items() if v is not None}
    assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(k.removeprefix("eval_").startswith("trust/") for k in log.keys() - stock_log.keys())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_the_grid(both, loss_type, level, accumulation):
    stock, ours, extra = both
    arguments = (extra, loss_type, level, accumulation)
    result = one_step(ours, *arguments)
    assert_same_step(one_step(stock, *arguments), result)
    # adaptive entropy carries state from one step to the next
    assert ours.entropy_coef == stock.entropy_coef
    assert ours._last_world_entropy == pytest.approx(stock._last_world_entropy)
    assert any(g.abs().max() > 0 for g in result[1])


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_the_grid_in_evaluation(both, loss_type):
    stock, ours, extra = both
    arguments = (extra, loss_type, "token", 1, False)
    result = one_step(ours, *arguments)
    assert_same_step(one_step(stock, *arguments), result)
    assert result[2]["eval_trust/ratio/max"] > 1 and result[2]["eval_trust/zero_grad"] < 1


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        (dict(), 0.0),
        (dict(loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, steps_per_generation=1), 0.0),
        (dict(gradient_accumulation_steps=2, loss_type="bnpo", mask_truncated_completions=True), 0.0),
        (dict(loss_type="dr_grpo", scale_rewards="none", entropy_coef=0.01, eval_strategy="steps", eval_steps=2), 0.0),
        # the KL adds its gradient to the policy term's in another order than stock
        (dict(beta=0.1), 1e-6),
    ],
    ids=["dapo", "gspo", "bnpo", "dr_grpo with eval", "reference"],
)
def test_whole_runs_are_equal_to_the_bit(tiny_model_path, tmp_path, settings, gap):
    kwargs = {"eval_dataset": problems("test", 4)} if "eval_strategy" in settings else {}
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "a", **settings), **kwargs)
    args = tiny_config(TrustGRPOConfig, tmp_path / "b", **settings)
    ours = tiny_run(TrustGRPOTrainer, tiny_model_path, args, **kwargs)
    assert parameter_gap(ours.model, stock.model) <= gap
    clock = ("time", "runtime", "per_second")
    for theirs, log in zip(stock.state.log_history, ours.state.log_history, strict=True):
        expected = {k: v for k, v in theirs.items() if not any(c in k for c in clock) and v is not None}
        assert {k: log[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_multimodal_inputs_are_passed_as_stock_passes_them(tiny_model_path, tmp_path):
    calls = []

    def record(*args, **kwargs):
        calls.append(kwargs)
        logps = torch.zeros(B, T, requires_grad=True)
        return logps - 1, torch.ones(B, T), None

    for trainer, config in ((GRPOTrainer, GRPOConfig), (TrustGRPOTrainer, TrustGRPOConfig)):
        trainer = tiny_trainer(trainer, tiny_model_path, tiny_config(config, tmp_path))
        inputs = micro_batch(trainer, 0, ())
        inputs |= {name: torch.full((B,), i) for i, name in enumerate(MULTIMODAL_INPUTS)}
        trainer.current_gradient_accumulation_steps = 1
        trainer._get_per_token_logps_and_entropies = record
        trainer.compute_loss(trainer.model, inputs)
    stock, ours = calls
    assert ours.keys() == stock.keys() > set(MULTIMODAL_INPUTS)
    assert all(ours[name] is not None and torch.equal(ours[name], stock[name]) for name in MULTIMODAL_INPUTS)


# -- anchors ----------------------------------------------------------------------------------------------------------


def test_a_method_anchored_on_the_sampler_is_not_corrected_twice(tiny_model_path, tmp_path):
    def loss(anchor, **inputs_changed):
        trainer = tiny_trainer(DPPOTrainer, tiny_model_path, tiny_config(DPPOConfig, tmp_path, anchor=anchor))
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.current_gradient_accumulation_steps = 1
        inputs = micro_batch(trainer, 0, ("sampler", "correction_token"))
        return trainer.compute_loss(trainer.model, inputs | inputs_changed).item()

    no_correction = torch.zeros(B, T)
    assert loss("auto") == loss("auto", importance_sampling_ratio=no_correction) != 0.0
    assert loss("old") != loss("old", importance_sampling_ratio=no_correction) == 0.0


# -- rollouts ---------------------------------------------------------------------------------------------------------


INF = math.inf


@pytest.mark.parametrize("name", [m.name for m in METHODS if m.module.startswith("trl_trust.policy")])
def test_an_infinite_reward_counts_as_none(name, tiny_model_path, tmp_path, caplog):
    method = get_method(name)
    config, trainer = getattr(trl_trust, method.config), getattr(trl_trust, method.trainer)
    settings = {"etr": {"lambda_macro": 0.5}, "dispo": {"select": "correct", "correct_threshold": 0.5}}

    def run(folder, *bad):
        def reward(completions, **kwargs):
            return [(bad[i // 5 % len(bad)] if i % 5 == 0 else x) for i, x in enumerate(digits_reward(completions))]

        args = tiny_config(config, tmp_path / folder, max_steps=5, **settings.get(name, {}))
        return tiny_run(trainer, tiny_model_path, args, reward_funcs=reward)

    ours, theirs = run("a", INF, -INF), run("b", None)
    assert parameter_gap(ours.model, theirs.model) == 0.0
    assert all(p.isfinite().all() for p in ours.model.parameters())
    log = ours.state.log_history
    assert (log[0]["trust/rewards/infinite"], log[4]["trust/rewards/infinite"]) == (4, 4)
    assert theirs.state.log_history[0]["trust/rewards/infinite"] == 0
    said = [r.message for r in caplog.records if "are infinite" in r.message]
    assert len(said) == 1 and "4 rewards of reward " in said[0]


class Probe(TrustGRPOTrainer):
    """Keeps the batches it sees, and attaches a row tensor that names each response."""

    def __init__(self, *args, **kwargs):
        self.batches, self.rollouts = [], []
        super().__init__(*args, **kwargs)

    def extend_rollouts(self, rollouts):
        self.rollouts.append(rollouts)
        lengths = rollouts.tensors["completion_mask"].sum(1)
        return {
            "reward": rollouts.rewards[rollouts.rows],
            "pair": torch.stack([rollouts.tensors["advantages"], lengths], 1),
        }

    def policy_loss(self, batch):
        self.batches.append(batch)
        return super().policy_loss(batch)


class Replaces(TrustGRPOTrainer):
    """Gives advantages, old log-probabilities and a mask of its own, and reads more in its forward."""

    def extend_rollouts(self, rollouts):
        tokens = rollouts.tensors["completion_mask"]  # (n, T)
        with pytest.raises(TypeError):
            rollouts.tensors["advantages"] = tokens
        self.row = torch.arange(len(tokens)).float()  # (n,)
        self.mask = tokens * (torch.arange(tokens.size(1)) % 2 == 0)
        return {"advantages": self.row, "old_logps": -tokens.float(), "mask": self.mask, "row": self.row}

    def score_completions(self, model, inputs, batch_size=None):
        row = extras_of(inputs)["row"]
        logps, *rest = super().score_completions(model, inputs, batch_size)
        return logps, *rest, {"twice": 2 * row, "seen": logps}

    def policy_loss(self, batch):
        row = batch.extras["row"]
        assert torch.equal(batch.advantages[:, 0], row) and torch.equal(batch.extras["twice"], 2 * row)
        assert torch.equal(batch.mask, self.mask[row.long()].float())
        assert torch.equal(batch.old_logps * batch.mask, -batch.mask)
        assert batch.extras["seen"].requires_grad and batch.extras["seen"].shape == batch.logps.shape
        self.checked = getattr(self, "checked", 0) + 1
        return super().policy_loss(batch)


def test_a_method_may_replace_advantages_old_logps_and_mask_and_read_more_in_its_forward(tiny_model_path, tmp_path):
    trainer = tiny_run(Replaces, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    assert trainer.checked == 4
    # the loss is divided by the tokens that count now, over the whole generation batch
    assert trainer._buffered_inputs[0]["num_items_in_batch"] == trainer.mask.sum() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda n, T: {"any": torch.zeros(n - 1)}, "'any' has 15 rows, but the batch has 16"),
        (lambda n, T: {"mask": torch.ones(n)}, r"'mask' has shape \(16,\); expected \(16, \d+\)\."),
        (lambda n, T: {"old_logps": torch.ones(n, T + 1)}, "'old_logps' has shape"),
        (lambda n, T: {"advantages": torch.ones(n, 1)}, r"'advantages' has shape \(16, 1\); .* or \(16,\)\."),
    ],
)
def test_rows_of_another_shape_are_refused(given, message, tiny_model_path, tmp_path):
    class Wrong(TrustGRPOTrainer):
        def extend_rollouts(self, rollouts):
            return given(*rollouts.tensors["completion_ids"].shape)

    with pytest.raises(ValueError, match=message):
        tiny_run(Wrong, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))


def test_rewards_groups_and_extras_survive_the_shuffle(tiny_model_path, tmp_path):
    trainer = tiny_run(Probe, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    (rollouts,) = trainer.rollouts
    assert len(trainer.batches) == 4 and rollouts.num_generations == 4
    assert rollouts.rewards.tolist() == pytest.approx(digits_reward(rollouts.completions))
    for batch in trainer.batches:
        assert torch.equal(batch.extras["reward"], batch.rewards)
        assert torch.equal(batch.extras["pair"][:, :1], batch.advantages)
        assert torch.equal(batch.extras["pair"][:, 1], batch.mask.sum(1))
    group = torch.cat([b.group for b in trainer.batches])
    rewards = torch.cat([b.rewards for b in trainer.batches])
    assert group.tolist() != sorted(group.tolist())
    for g in range(4):
        assert sorted(rewards[group == g].tolist()) == sorted(rollouts.rewards.view(4, 4)[g].tolist())


def test_unscored_responses_have_no_reward(tiny_model_path, tmp_path):
    reward = lambda completions, **kw: [None if i % 4 == 0 else float(i) for i in range(len(completions))]
    trainer = tiny_run(
        Probe, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path, max_steps=1), reward_funcs=reward
    )
    assert trainer.rollouts[0].rewards.isnan().tolist() == [i % 4 == 0 for i in range(16)]


def test_extras_of_the_wrong_length_raise(tiny_model_path, tmp_path):
    class Wrong(TrustGRPOTrainer):
        def extend_rollouts(self, rollouts):
            return {"teacher": torch.zeros(3)}

    with pytest.raises(ValueError, match="'teacher' has 3 rows, but the batch has 16"):
        tiny_run(Wrong, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))


class WholeGroupsConfig(TrustGRPOConfig):
    needs_whole_groups = True


class WholeGroups(Probe):
    config_class = WholeGroupsConfig


def test_whole_groups_stay_together(tiny_model_path, tmp_path):
    args = tiny_config(WholeGroupsConfig, tmp_path, per_device_train_batch_size=8, steps_per_generation=4)
    trainer = tiny_run(WholeGroups, tiny_model_path, args)
    order = [batch.group.tolist() for batch in trainer.batches]
    assert all(len(set(groups)) == 2 and groups.count(groups[0]) == 4 for groups in order)
    assert sorted(sum(order, [])) == sorted(list(range(8)) * 4)
    assert [groups[0] for groups in order] != sorted(groups[0] for groups in order)  # shuffled, as groups


def test_whole_groups_need_room():
    with pytest.raises(ValueError, match="per_device_train_batch_size=6.*multiple of num_generations=4"):
        tiny_config(WholeGroupsConfig, per_device_train_batch_size=6, steps_per_generation=4)
    args = tiny_config(WholeGroupsConfig, eval_strategy="steps", num_generations_eval=2)
    args.per_device_eval_batch_size = 3  # on two processes the global batch holds whole groups, the local one does not
    with pytest.raises(ValueError, match="per_device_eval_batch_size=3.*multiple of num_generations_eval=2"):
        args.validate()


def test_shuffle_groups_permutes_everything_in_unison():
    rows = torch.arange(12)
    out = _shuffle_groups(
        {"prompt_ids": rows[:, None], "names": [f"r{i}" for i in range(12)], "count": torch.tensor(7), "none": None}, 3
    )
    order = out["prompt_ids"].squeeze(1)
    assert out["names"] == [f"r{i}" for i in order] and out["count"] == 7 and out["none"] is None
    assert (order.view(4, 3) - order.view(4, 3)[:, :1] == torch.arange(3)).all() and sorted(order.tolist()) == list(
        rows
    )


# -- construction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "cispo"}, "one of grpo, bnpo, dr_grpo, dapo.*DISPOConfig"),
        ({"loss_type": "sapo"}, "use `trl.GRPOTrainer`"),
        ({"loss_type": "mine"}, "not known"),
        ({"importance_sampling_level": "word"}, "must be 'token' or 'sequence'"),
        ({"sapo_temperature_neg": 2.0}, "does not read `sapo_temperature_neg`"),
        ({"vespo_k_pos": 1.0}, "does not read `vespo_k_pos`.*Leave it at 2.0"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(TrustGRPOConfig, **settings)
    assert all(str(value) in str(error.value) for value in settings.values())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_generations", 0, "a whole number >= 2"),
        ("num_generations", 1, "a whole number >= 2"),
        ("steps_per_generation", 0, "a whole number >= 1, or None"),
        ("gradient_accumulation_steps", 0, "a whole number >= 1"),
        ("per_device_train_batch_size", 0, "a whole number >= 1"),
        ("num_iterations", 0, "a whole number >= 1"),
        ("max_completion_length", -1, "a whole number >= 1"),
        ("temperature", math.nan, "a finite number > 0"),
        ("temperature", 0.0, "a finite number > 0"),
        ("learning_rate", -1, "a finite number >= 0"),
        ("learning_rate", math.nan, "a finite number >= 0"),
        ("learning_rate", INF, "a finite number >= 0"),
        ("beta", -1, "a finite number >= 0"),
        ("beta", math.nan, "a finite number >= 0"),
        ("top_p", 0, r"a number in \(0, 1\]"),
        ("top_p", 2, r"a number in \(0, 1\]"),
        ("min_p", -0.1, r"a number in \[0, 1\], or None"),
        ("epsilon", math.nan, "a number >= 0"),
        ("max_grad_norm", -1.0, "a number >= 0"),
        ("model_init_kwargs", "text", "a mapping of names to values"),
        ("generation_kwargs", {"topp": 0.5}, "generation knows no 'topp'; did you mean 'top_p'?"),
        ("generation_kwargs", {"xyzzy": 1}, "see `transformers.GenerationConfig`"),
    ],
)
def test_hostile_values_of_inherited_fields_raise_in_one_line(name, value, message):
    plain = tiny_config(GRPOConfig)
    setattr(plain, name, value)
    for construct in (
        lambda: tiny_config(TrustGRPOConfig, **{name: value}),
        lambda: DISPOConfig.from_grpo_config(plain),
    ):
        with pytest.raises(ValueError, match=message) as error:
            construct()
        assert str(error.value).startswith(f"{name}={value!r}") and "\n" not in str(error.value)


def test_usual_values_of_inherited_fields_are_taken():
    usual = dict(top_k=50, min_p=0.1, beta=0, warmup_steps=0.1, max_grad_norm=0, save_steps=0.25, learning_rate=0)
    args = tiny_config(
        TrustGRPOConfig, **usual, generation_kwargs={"suppress_tokens": [1]}, model_init_kwargs='{"a": 1}'
    )
    assert args.model_init_kwargs == {"a": 1}


def test_a_plain_grpo_config_is_enough(tiny_model_path, tmp_path):
    stock = tiny_config(GRPOConfig, tmp_path, learning_rate=3e-3, num_iterations=2)
    trainer = tiny_trainer(DISPOTrainer, tiny_model_path, stock)
    assert type(trainer.args) is DISPOConfig and trainer.args.learning_rate == 3e-3
    assert trainer.args.epsilon_neg_high == 100.0 and trainer.args.generation_batch_size == 16
    assert type(stock) is GRPOConfig and not hasattr(stock, "epsilon_neg_high")  # the user's object is left alone
    with pytest.raises(ValueError, match="epsilon=0.3"):
        tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path, epsilon=0.3))


def test_the_config_of_another_method_is_refused(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="args is a DPPOConfig, the config of another method: use a DISPOConfig"):
        tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(DPPOConfig, tmp_path))
    assert tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path)).args.epsilon_pos_high


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm_importance_sampling_mode", "token_mask"),
        ("vllm_importance_sampling_clip_max", 1.5),
        ("vllm_importance_sampling_clip_min", 0.5),
    ],
)
def test_fields_of_a_correction_that_is_not_made_raise(name, value):
    settings = {"use_vllm": True, name: value}
    with pytest.raises(ValueError, match=f"{name}={value!r}: DPPOConfig does not read.*is already to the sampler"):
        tiny_config(DPPOConfig, **settings)
    tiny_config(DPPOConfig, anchor="old", **settings)
    tiny_config(DISPOConfig, **settings)


def test_a_failed_construction_leaves_beta_alone(tiny_model_path, tmp_path):
    class NeedsReference(TrustGRPOConfig):
        needs_reference = True

    args = tiny_config(NeedsReference, tmp_path)
    with pytest.raises(ValueError):
        tiny_trainer(TrustGRPOTrainer, tiny_model_path, args, reward_funcs=[])
    assert args.beta == 0.0


def test_a_field_at_trls_default_takes_the_methods_default(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Other(TrustGRPOConfig):
        epsilon: float = 0.5
        scale_rewards: str = "none"

    converted = Other.from_grpo_config(tiny_config(GRPOConfig, tmp_path, scale_rewards="batch"))
    assert converted.epsilon == 0.5 and converted.scale_rewards == "batch"


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        ({"steps_per_generation": None}, True),
        ({"gradient_accumulation_steps": 4}, True),
        ({}, False),
        ({"gradient_accumulation_steps": 2}, False),
        ({"gradient_accumulation_steps": 4, "num_iterations": 2}, False),
    ],
)
def test_a_ratio_that_is_always_one_is_said_once(tiny_model_path, tmp_path, caplog, settings, warns):
    tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(DISPOConfig, tmp_path, **settings))
    said = [r for r in caplog.records if "identically 1" in r.message]
    assert len(said) == warns
    assert not warns or ("steps_per_generation" in said[0].message and "num_iterations" in said[0].message)


LORA = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("rate", "settings", "warns"), [(0.05, {}, True), (0.0, {}, False), (0.05, {"disable_dropout": True}, False)]
)
@pytest.mark.parametrize("given", ["peft_config", "model"])
def test_dropout_is_named(tiny_model_path, tmp_path, caplog, given, rate, settings, warns):
    lora, args = LoraConfig(lora_dropout=rate, **LORA), tiny_config(DISPOConfig, tmp_path, **settings)
    if given == "peft_config":
        tiny_trainer(DISPOTrainer, tiny_model_path, args, peft_config=lora)
    else:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_path), lora)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        data = problems("train", 8)
        DISPOTrainer(model, digits_reward, args, processing_class=tokenizer, train_dataset=data)
    said = [r.message for r in caplog.records if "lora_dropout=0.05" in r.message]
    assert len(said) == warns and (not warns or "Set lora_dropout to 0" in said[0])


@pytest.mark.parametrize(
    ("trainer", "config", "settings", "said"),
    [
        (DPPOTrainer, DPPOConfig, dict(top_p=0.8, min_p=0.1), "top_p=0.8, min_p=0.1"),
        (ALPTrainer, ALPConfig, dict(top_k=20), "top_k=20"),
        (DPPOTrainer, DPPOConfig, dict(generation_kwargs={"top_p": 0.5}), "top_p=0.5"),
        (DPPOTrainer, DPPOConfig, {}, None),
        (DPPOTrainer, DPPOConfig, dict(anchor="old", top_p=0.8), None),
        (DISPOTrainer, DISPOConfig, dict(top_p=0.8), None),
    ],
)
def test_a_sampler_that_renormalises_is_named(tiny_model_path, tmp_path, trainer, config, settings, said):
    trainer = tiny_trainer(trainer, tiny_model_path, tiny_config(config, tmp_path, **settings))
    assert not any(
        "renormalises" in line for line in trainer._warnings()
    )  # without vLLM the ratio is to the old policy
    trainer.args.use_vllm = True
    lines = [line for line in trainer._warnings() if "renormalises" in line]
    assert len(lines) == (said is not None) and (said is None or lines[0].startswith(f"{said}: "))


def test_return_outputs_is_refused(tiny_model_path, tmp_path):
    trainer = tiny_trainer(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    with pytest.raises(ValueError, match="return_outputs=True"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


# -- checkpoints and adapters -----------------------------------------------------------------------------------------


def test_resuming_equals_the_uninterrupted_run(tiny_model_path, tmp_path):
    settings = dict(max_steps=8, save_strategy="steps", save_steps=4)  # a checkpoint between two generations
    whole = tiny_run(DISPOTrainer, tiny_model_path, tiny_config(DISPOConfig, tmp_path / "a", **settings))
    resumed = tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(DISPOConfig, tmp_path / "b", **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert parameter_gap(whole.model, resumed.model) == 0.0


def test_lora_trains_the_adapter_alone(tiny_model_path, tmp_path):
    args = tiny_config(DISPOConfig, tmp_path, beta=0.05, max_steps=6)
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = tiny_trainer(DISPOTrainer, tiny_model_path, args, peft_config=peft_config)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert trainer.state.log_history[-2]["kl"] > 0


# -- telemetry --------------------------------------------------------------------------------------------------------


def test_telemetry_of_a_hand_made_batch(tiny_model_path, tmp_path):
    from trl_trust.policy.base import grpo_loss

    batch = random_policy_batch(1, B=2, T=3, masked=False)
    ratio = torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.1, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    batch = replace(
        batch,
        old_logps=batch.logps.detach() - ratio.log(),
        mask=mask,
        advantages=torch.tensor([[1.0], [0.0]], dtype=torch.float64),
    )
    got = telemetry(batch, grpo_loss(batch), batch.old_logps)
    live = ratio[mask > 0]
    mean = lambda name: (got[name] * mask).sum().item() / 5
    assert mean("trust/ratio/mean") == pytest.approx(live.mean().item())
    assert mean("trust/kl") == pytest.approx((live - 1 - live.log()).mean().item())
    assert got["trust/ess"].item() == pytest.approx((live.sum() ** 2 / (5 * (live**2).sum())).item())
    assert got["trust/ratio/p99"].item() == pytest.approx(2.0) and got["trust/ratio/p01"].item() == pytest.approx(0.5)
    # of the first response the token at ratio 2 is cut; the second has no advantage
    assert mean("trust/zero_grad") == pytest.approx(3 / 5) and mean("trust/cut") == pytest.approx(1 / 5)
    probability = batch.logps.detach().exp()
    expected = ((probability - probability / ratio).abs() * mask).sum().item() / 5
    assert mean("trust/tv") == pytest.approx(expected)


@given(st.integers(0, 1000), st.floats(0, 1))
def testmasked_quantiles_do_not_see_the_masked(seed, q):
    g = torch.Generator().manual_seed(seed)
    x, live = torch.randn(3, 5, generator=g), torch.rand(3, 5, generator=g) > 0.4
    live[0, 0] = True
    (got,) = masked_quantiles(x, live, (q,))
    assert got == x[live].quantile(q, interpolation="nearest") or got in x[live]
    low, high = masked_quantiles(x, live, (0.0, 1.0))
    assert low == x[live].min() and high == x[live].max()
    assert all(value.isnan() for value in masked_quantiles(x, torch.zeros_like(live), (0.01, 0.99)))


def test_metrics_join_over_processes_by_weight_and_by_name():
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    x = torch.tensor([[1.0, 3.0, 99.0], [99.0, 99.0, 99.0]])
    metrics = {
        "a/max": x,
        "a/mean": x,
        "b": torch.tensor([[1.0], [math.nan]]),
        "a/min": x,
        "c": torch.full_like(x, math.nan),
        "d": torch.tensor(5.0),
        "e": torch.tensor(math.nan),
    }
    names, stats = local_statistics(metrics, mask)
    found = dict(zip(names, stats.tolist(), strict=True))
    assert (
        found.pop("c")[1] == 0.0 == found.pop("e")[1] and stats[[names.index("c"), names.index("e")], 0].isnan().all()
    )
    assert found == {"a/max": [3.0, 2.0], "a/mean": [4.0, 2.0], "a/min": [1.0, 2.0], "b": [1.0, 1.0], "d": [5.0, 1.0]}
    rows = torch.tensor([[2.0], [99.0]])  # of which the second has no live token: TRL counts it, we do not
    assert local_statistics({"b": rows}, mask)[1].tolist() == [[2.0, 1.0]]
    assert local_statistics({"clip_ratio/low_mean": rows}, mask)[1].tolist() == [[101.0, 2.0]]
    dead = torch.zeros_like(mask)
    assert local_statistics({"entropy": x}, dead)[1].tolist() == [[0.0, 0.0]]
    assert all(
        value.isnan() and weight == 0 for x in (x, rows) for value, weight in local_statistics({"a": x}, dead)[1]
    )
    assert _join_processes("a/mean", [[4.0, 2.0], [10.0, 8.0]]) == pytest.approx(1.4)
    assert _join_processes("a/mean", [[0.0, 0.0], [0.0, 0.0]]) == 0.0
    assert _join_processes("a/mean", [[4.0, 2.0], [math.nan, 0.0]]) == 2.0
    assert math.isnan(_join_processes("a/mean", [[math.nan, 0.0], [0.0, 0.0]]))
    assert _join_processes("a/min", [[4.0, 2.0], [math.inf, 0.0]]) == 4.0
    assert math.isnan(_join_processes("a/max", [[-math.inf, 0.0]]))
    with pytest.raises(ValueError, match="'a' has shape"):
        local_statistics({"a": torch.zeros(2, 2)}, mask)


def test_micro_batches_without_a_live_token_have_no_part_in_the_metrics(tiny_model_path, tmp_path):
    class HalfTruncated(DISPOTrainer):
        def policy_loss(self, batch):
            seen.append(bool(batch.mask.any()))
            return super().policy_loss(batch)

        def extend_rollouts(self, rollouts):
            rollouts.tensors["completion_mask"][::2] = 0  # as `mask_truncated_completions` does
            return {}

    seen = []
    batches = dict(per_device_train_batch_size=1, gradient_accumulation_steps=8, steps_per_generation=16, max_steps=2)
    trainer = tiny_run(HalfTruncated, tiny_model_path, tiny_config(DISPOConfig, tmp_path, **batches))
    assert set(seen) == {True, False}
    for log in trainer.state.log_history[:2]:
        assert log["trust/ratio/min"] <= log["trust/ratio/mean"] <= log["trust/ratio/max"]
        assert log["dispo/weight/mean"] > 0.9


def test_the_loss_never_sees_the_engines_own_output(tiny_model_path, tmp_path):
    """DeepSpeed hooks the gradient of what its forward returns; only the backward itself may set the hook off."""
    fired = []

    class Engine(TrustGRPOTrainer):
        def score_completions(self, *args, **kwargs):
            logps, *rest = super().score_completions(*args, **kwargs)
            logps.register_hook(lambda grad: fired.append(grad))
            return logps, *rest

    trainer = tiny_trainer(Engine, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, micro_batch(trainer, 0, ()))
    assert fired == []
    loss.backward()
    assert len(fired) == 1 and fired[0].abs().max() > 0


def test_an_evaluation_inside_an_accumulation_window_leaves_training_metrics_alone(tiny_model_path, tmp_path):
    def logged(evaluates):
        trainer = tiny_trainer(DISPOTrainer, tiny_model_path, tiny_config(DISPOConfig, tmp_path))
        trainer.current_gradient_accumulation_steps = 4
        for i in range(4):
            trainer.accelerator.gradient_state._set_sync_gradients(i == 3)
            trainer.model.train()
            trainer.compute_loss(trainer.model, micro_batch(trainer, i, ())).backward()
            if evaluates and i == 1:
                trainer.model.eval()
                with torch.no_grad():
                    trainer.compute_loss(trainer.model, micro_batch(trainer, 9, ()))
                trainer.log({})
                assert "eval_trust/kl" in trainer.state.log_history[-1]
        trainer.model.train()
        trainer.log({})
        return trainer.state.log_history[-1]

    assert logged(True) == logged(False)


def test_extrema_do_not_depend_on_how_rows_are_split(tiny_model_path, tmp_path):
    def log(size):
        batches = dict(per_device_train_batch_size=size, gradient_accumulation_steps=16 // size)
        args = tiny_config(DISPOConfig, tmp_path, **batches, steps_per_generation=32 // size, max_steps=2)
        return tiny_run(DISPOTrainer, tiny_model_path, args).state.log_history[1]

    whole, split = log(16), log(2)
    for name in ("trust/ratio/min", "trust/ratio/max", "dispo/weight/max"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4)
    assert whole["trust/ratio/max"] > 1.01


def test_extrema_are_over_all_there_is_and_means_over_micro_batches():
    # two steps of two micro-batches on two processes; NaN: no live token there
    step = lambda *values: ([*["a/max"] * 2, *["b"] * 2, *["clip_ratio/high_max"] * 2], torch.tensor(values))
    one = step([[1.0, 1], [5, 1], [1, 1], [3, 1], [1, 1], [5, 1]], [[2, 1], [3, 1], [1, 1], [3, 1], [2, 1], [3, 1]])
    two = step(
        [[4.0, 1], [-INF, 0], [5, 1], [7, 1], [4, 1], [0, 1]], [[0, 1], [-INF, 0], [5, 1], [7, 1], [0, 1], [0, 1]]
    )
    found = read_gathered([one, two])
    assert found == {"a/max": [5.0], "b": [1.0, 3.0, 5.0, 7.0], "clip_ratio/high_max": [2.0, 5.0, 4.0, 0.0]}
    assert math.isnan(read_gathered([(["a/min"], torch.tensor([[[INF, 0.0]]]))])["a/min"][0])


def test_a_batch_loss_is_added_after_aggregation_and_divided_by_the_accumulation(tiny_model_path, tmp_path):
    class Pairwise(TrustGRPOTrainer):
        def policy_loss(self, batch):
            return PolicyLoss(torch.zeros_like(batch.logps), batch_loss=(batch.logps * batch.mask).sum())

    trainer = tiny_trainer(Pairwise, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    trainer.model.train()
    inputs = micro_batch(trainer, 0, ())
    losses = {}
    for accumulation in (1, 4):
        trainer.current_gradient_accumulation_steps = accumulation
        losses[accumulation] = trainer.compute_loss(trainer.model, inputs).item()
    logps, _, _ = trainer.score_completions(trainer.model, inputs)
    assert losses[1] == pytest.approx((logps * inputs["completion_mask"]).sum().item(), rel=1e-5)
    assert losses[4] == pytest.approx(losses[1] / 4)
