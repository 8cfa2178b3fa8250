"""The trainer end to end on tiny pipelines: ratios, KL, rules, rewards, files, resume."""

import math
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from trl_trust.flow import SAGEGRPOConfig, SAGEGRPOTrainer, brightness_reward
from trl_trust.flow.adapters.tiny import tiny_sd3_pipeline, tiny_wan_pipeline
from trl_trust.flow.steps import SDE_TYPES


PROMPTS = Dataset.from_list([{"prompt": text} for text in ("a red ball", "a blue cat", "the ball", "a cat at night")])
QUIET = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", log_level="error")
# 4 samples a mini-batch, 2 mini-batches and 4 steps a phase: 8 micro-batches
SMALL = dict(
    height=16,
    width=16,
    num_frames=5,
    num_inference_steps=4,
    shift=3.0,
    eta=0.7,
    num_generations=4,
    per_device_train_batch_size=4,
    steps_per_generation=2,
    gradient_accumulation_steps=4,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    max_steps=4,
    logging_steps=1,
    max_grad_norm=1.0,
)
LORA = dict(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(**settings):
    return SAGEGRPOConfig(**{"output_dir": "out", **SMALL, **QUIET, **settings})


def redness(samples, prompts, **columns):
    """Red minus blue, of pictures (n, 3, H, W)."""
    return (samples[:, 0] - samples[:, 2]).flatten(1).mean(1).tolist()


def build(pipeline=None, reward=brightness_reward, data=PROMPTS, lora=False, eval_dataset=None, **settings):
    trainer = SAGEGRPOTrainer(
        tiny_sd3_pipeline() if pipeline is None else pipeline,
        config(**settings),
        reward,
        data,
        peft_config=LoraConfig(**LORA) if lora else None,
        eval_dataset=eval_dataset,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def micro_batches(trainer, phase=0):
    trainer._phase, trainer._phase_number = trainer._sample(phase), phase
    return [trainer._micro_batch(phase, index) for index in range(trainer.phase_length)]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


# -- on-policy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [tiny_sd3_pipeline, tiny_wan_pipeline])
@pytest.mark.parametrize("rule", SDE_TYPES)
def test_fresh_roll_outs_have_ratio_one(rule, pipeline):
    trainer = build(pipeline(), sde_type=rule, beta=0.1, kl_schedule="constant", gradient_accumulation_steps=1)
    batches = micro_batches(trainer)
    losses = [trainer.compute_loss(trainer.model, batch) for batch in batches]
    ratios = torch.stack(trainer._metrics["trust/ratio/min"] + trainer._metrics["trust/ratio/max"])
    assert (ratios - 1).abs().max() < 1e-6
    assert torch.stack(trainer._metrics["sage/kl_pos"]).max() < 1e-9  # the anchor is the policy
    assert torch.stack(trainer._metrics["sage/kl_vel"]).max() < 1e-9
    for loss, batch in zip(losses, batches, strict=True):  # first loss: -mean(S A)
        scale = trainer.table.scale[batch["steps"]].float().unsqueeze(1)
        assert loss.item() == pytest.approx(-(scale * batch["advantages"]).mean().item(), abs=1e-5)
    seen = torch.cat([batch["steps"] for batch in batches]).bincount(minlength=4)
    assert seen.tolist() == [8 if i in trainer.table.random else 0 for i in range(4)]  # each step of each sample once


def test_the_kl_to_the_old_policy_has_no_gradient_on_policy():
    trainer = build(kl_pos_weight=0.0, kl_vel_weight=1.0, beta=1.0, kl_schedule="constant")
    assert trainer.anchor == []
    batch = micro_batches(trainer)[0]
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer.compute_loss(trainer.model, batch).backward()
    assert max(p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None) < 1e-6


def test_equal_rewards_leave_the_policy_alone():
    trainer = build(
        reward=lambda samples, prompts, **columns: [0.1] * len(samples), beta=0.0, max_steps=2, weight_decay=0.0
    )
    before = parameters(trainer)
    trainer.train()
    assert trainer.state.log_history[0]["sage/zero_std_groups"] == 1.0
    assert trainer.state.log_history[0]["grad_norm"] == 0.0
    assert_equal(parameters(trainer), before)


def test_anchor_stays_until_it_is_moved_as_trl_moves_it():
    trainer = build(beta=1e-3, kl_schedule="constant", ref_model_sync_steps=3, ref_model_mixup_alpha=0.6)
    start = [value.clone() for value in trainer.anchor]
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([value.clone() for value in trainer.anchor])

    trainer.add_callback(Watch())
    reference = tiny_sd3_pipeline().transformer
    trainer.train(), trainer._trained()
    for value, old in zip(seen[1], start, strict=True):
        torch.testing.assert_close(value, old, rtol=0, atol=0)
    again = build(beta=1e-3, kl_schedule="constant", ref_model_sync_steps=3, ref_model_mixup_alpha=0.6, max_steps=3)
    again.train()
    SyncRefModelCallback.sync_target_model(again.model.transformer, reference, 0.6)
    for value, theirs in zip(seen[2], reference.parameters(), strict=True):
        torch.testing.assert_close(value, theirs.data, rtol=0, atol=0)
    logs = [log["sage/kl_pos"] for log in trainer.state.log_history if "sage/kl_pos" in log]
    assert logs[0] < 1e-9 < logs[1]


def test_the_anchor_is_no_alias_and_evaluation_at_it_leaves_the_policy():
    trainer = build(beta=1e-3, max_steps=1, ref_model_sync_steps=1)
    trainer.train()
    policy = parameters(trainer)
    for p in trainer._trained():
        p.data.add_(1.0)
    assert all((a - p).abs().max() > 0.5 for a, p in zip(trainer.anchor, trainer._trained(), strict=True))
    with trainer.at_anchor():
        assert_equal(parameters(trainer), policy)
    assert all(torch.allclose(p, policy[name] + 1.0) for name, p in trainer.model.named_parameters())


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SDE_TYPES)
@pytest.mark.parametrize(("equalizer", "moving"), [(True, True), (True, False), (False, True), (False, False)])
def test_matrix(rule, equalizer, moving):
    fewer = 3 if rule == "cps" else 4  # the last step of cps has no noise
    trainer = build(
        sde_type=rule,
        grad_equalizer=equalizer,
        sync_ref_model=moving,
        ref_model_sync_steps=1,
        num_iterations=2,
        gradient_accumulation_steps=fewer,
        beta=0.1,
        kl_schedule="constant",
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in logs)
    assert logs[0]["trust/ratio/max"] == pytest.approx(1.0, abs=1e-6) and logs[1]["trust/ratio/max"] != 1.0
    assert (logs[0]["sage/step_scale/max"] > 1.0) == equalizer
    assert logs[3]["sage/kl_pos"] > 0


def test_one_update_of_many_micro_batches_is_the_update_of_one():
    # SGD: AdamW turns rounding, where a gradient is next to nothing, into a whole step
    once = dict(optim="sgd", learning_rate=1.0, max_steps=1, beta=0.0)
    whole = build(per_device_train_batch_size=8, steps_per_generation=1, gradient_accumulation_steps=4, **once)
    parts = build(per_device_train_batch_size=2, steps_per_generation=4, gradient_accumulation_steps=16, **once)
    before = parameters(whole)
    whole.train(), parts.train()
    one, other = parameters(whole), parameters(parts)
    for name in before:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert max((one[name] - before[name]).abs().max() for name in before) > 1e-3


def test_the_order_of_steps_does_not_matter_at_fixed_parameters():
    trainer = build(num_iterations=2)
    batches = micro_batches(trainer)
    order = [torch.cat([batch["steps"] for batch in batches[half : half + 8]]).tolist() for half in (0, 8)]
    assert order[0] != order[1]  # each pass has an order of its own
    sums = []
    for half in (0, 8):
        trainer.model.zero_grad()
        for batch in batches[half : half + 8]:
            trainer.compute_loss(trainer.model, batch).backward()
        sums.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-5)


def test_a_fraction_of_the_steps():
    trainer = build(timestep_fraction=0.5, gradient_accumulation_steps=2)
    assert trainer.trained_steps == 2 and trainer.phase_length == 4
    steps = trainer._sample(0)["steps"]
    assert all(len(set(row)) == 2 for row in steps.tolist()) and len({tuple(row) for row in steps.tolist()}) > 1
    trainer.train()


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_reward_rises_from_a_pipeline_object(seed):
    data = PROMPTS.select([0, 1])
    trainer = build(
        tiny_sd3_pipeline(seed),
        redness,
        data,
        seed=seed,
        num_generations=8,
        per_device_train_batch_size=16,
        steps_per_generation=1,
        learning_rate=1e-2,
        max_steps=16,
        eval_dataset=data,
    )
    first = trainer.evaluate()["eval_reward"]
    trainer.train()
    logs = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert sum(logs[-3:]) / 3 > logs[0] + 0.15, logs
    assert trainer.evaluate()["eval_reward"] > first + 0.15
    assert os.path.getsize("out/samples/step-000000.png") and os.path.getsize("out/samples/step-000016.png")
