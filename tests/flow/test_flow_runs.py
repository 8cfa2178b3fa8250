"""What a run leaves and takes up: files, checkpoints, a killed process, two processes, bfloat16; and bad input."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
import yaml
from datasets import Dataset
from test_flow_trainer import PROMPTS, assert_equal, build, config, micro_batches, parameters, redness
from tiny import on_two_processes

from trl_trust import cli
from trl_trust.flow import SAGEGRPOTrainer
from trl_trust.flow.adapters.tiny import tiny_sd3_pipeline, tiny_wan_pipeline
from trl_trust.flow.rollouts import row_noise
from trl_trust.flow.toys import RingAdapter, RingFlow


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_lora_reloads_through_diffusers_and_draws_the_same():
    trainer = build(lora=True, learning_rate=0.05, max_steps=2, eval_dataset=PROMPTS)
    before = trainer.sample(PROMPTS)
    trainer.train()
    trainer.save_model("out")
    ours = trainer.sample(PROMPTS)
    assert (ours - before).abs().max() > 0.02

    pipeline = tiny_sd3_pipeline()
    pipeline.load_lora_weights("out")
    pipeline.set_progress_bar_config(disable=True)
    noise = row_noise(trainer.adapter.latent_shape({}), trainer.args.seed, -1, range(len(PROMPTS)), -1)
    sigmas = np.linspace(1.0, 0.0, trainer.args.num_inference_steps + 1)[:-1]
    theirs = pipeline(
        list(PROMPTS["prompt"]), height=16, width=16, latents=noise, sigmas=sigmas.tolist(), guidance_scale=1.0,
        num_inference_steps=len(sigmas), output_type="pt",
    )[0]  # fmt: skip
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_a_video_lora_and_a_whole_transformer_reload():
    trainer = build(tiny_wan_pipeline(), lora=True, learning_rate=0.05, max_steps=1)
    trainer.train()
    trainer.save_model("lora")
    pipeline = tiny_wan_pipeline()
    pipeline.load_lora_weights("lora")
    x, s = torch.randn(1, *trainer.adapter.latent_shape({})), torch.tensor([0.5])
    condition = {key: value[None] for key, value in trainer.conditions.by_prompt["a red ball"].items()}
    ours = trainer.adapter.velocity(trainer.model.transformer, x, s, condition)
    torch.testing.assert_close(trainer.adapter.velocity(pipeline.transformer, x, s, condition), ours)

    whole = build(max_steps=1)
    whole.train()
    whole.save_model("whole")
    again = type(whole.model.transformer).from_pretrained("whole")
    assert_equal(dict(again.named_parameters()), dict(whole.model.transformer.named_parameters()))


# -- resuming --------------------------------------------------------------------------------------------------------

LONG = dict(
    max_steps=8,
    save_strategy="steps",
    save_steps=3,  # a phase has two updates: it is saved at 4 and 6
    num_iterations=2,
    gradient_accumulation_steps=8,
    kl_schedule="controller",
    beta=0.1,
    beta_warmup=3,
    ref_model_sync_steps=3,
    logging_steps=1,
)


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resuming_is_exact(lora):
    whole = build(lora=lora, **LONG)
    whole.train()
    kept = sorted(path.name for path in Path("out").glob("checkpoint-*"))
    assert kept == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]  # never within a phase, whose roll-outs are lost
    again = build(lora=lora, **LONG)
    torch.manual_seed(99)
    again.train(resume_from_checkpoint="out/checkpoint-4")
    assert_equal(parameters(again), parameters(whole))
    for one, other in zip(again.anchor, whole.anchor, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert again.kl_weight.state_dict() == whole.kl_weight.state_dict()
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    strip = lambda log: [{key: value for key, value in entry.items() if key not in timing} for entry in log]
    assert strip(again.state.log_history) == strip(whole.state.log_history)


def test_what_is_no_checkpoint_is_refused():
    build(max_steps=2, save_strategy="steps", save_steps=2).train()
    os.remove("out/checkpoint-2/sage_state.pt")
    with pytest.raises(ValueError, match="resume_from_checkpoint='out/checkpoint-2' is no checkpoint of SAGEGRPO"):
        build(max_steps=4).train(resume_from_checkpoint="out/checkpoint-2")


def deadly_reward(samples, prompts, **columns):
    """Redness; the fifth phase of a run kills the process, if the file `kill` is there."""
    calls = int(Path("calls").read_text()) + 1 if Path("calls").exists() else 1
    Path("calls").write_text(str(calls))
    if calls == 5 and Path("kill").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(samples, prompts)


def test_a_killed_run_goes_on_from_the_command_line():
    recipe = {
        "model_name_or_path": "tiny-sd3", "prompts": ["a red ball", "a blue cat"], "height": 16, "width": 16,
        "reward_funcs": ["test_flow_runs.deadly_reward"], "num_inference_steps": 4, "num_generations": 4,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 12,
        "save_steps": 4, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "output_dir": "out",
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["sage", "--config", "recipe.yaml"]
    assert cli.main([*words, "--output_dir", "whole"], launch=False) == 0
    os.remove("calls")

    Path("kill").touch()
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-m", "trl_trust", *words], env=env, capture_output=True, timeout=540)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]

    os.remove("kill")
    assert cli.main([*words, "--resume_from_checkpoint", "true"], launch=False) == 0
    name = "diffusion_pytorch_model.safetensors"
    assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


# -- processes and precision -----------------------------------------------------------------------------------------


def test_two_processes_train_like_one(tmp_path):
    on_two_processes(two_processes.__file__, tmp_path / "two", timeout=540)
    start = dict(tiny_sd3_pipeline().transformer.named_parameters())
    one = two_processes.run(tmp_path / "one", 1)
    ranks = [torch.load(tmp_path / "two" / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    own = {name: p.detach() for name, p in one.model.named_parameters()}
    assert_equal(ranks[0]["parameters"], ranks[1]["parameters"])
    for name, value in own.items():
        torch.testing.assert_close(ranks[0]["parameters"][name], value, rtol=1e-4, atol=1e-5)
    assert max((own[f"transformer.{name}"] - p).abs().max() for name, p in start.items()) > 1e-3
    for anchor, value in zip(ranks[0]["anchor"], one.anchor, strict=True):
        torch.testing.assert_close(anchor, value, rtol=1e-4, atol=1e-5)
    assert ranks[0]["weight"]["value"] == pytest.approx(one.kl_weight.value, rel=1e-3)
    for log, alone in zip(ranks[0]["log"], one.state.log_history, strict=True):
        for key in ("reward", "sage/reward_std", "sage/kl_pos", "sage/kl_vel", "trust/ratio/max", "eval_reward"):
            assert log.get(key, 0) == pytest.approx(alone.get(key, 0), rel=1e-3, abs=1e-5), key
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 1


@pytest.mark.parametrize("lora", [True, False])
def test_in_bfloat16_fresh_roll_outs_have_ratio_one(lora):
    pipeline = tiny_sd3_pipeline().to(torch.bfloat16)
    trainer = build(pipeline, lora=lora, bf16=True, beta=0.1, gradient_checkpointing=True, learning_rate=1e-2)
    trainer.train()
    fresh = [log for log in trainer.state.log_history if "loss" in log][::2]
    assert all(log["trust/ratio/min"] == log["trust/ratio/max"] == 1.0 for log in fresh)
    assert fresh[0]["sage/kl_pos"] == 0.0 and all(math.isfinite(log["loss"]) for log in fresh)
    assert {p.dtype for p in trainer._trained()} == {torch.float32 if lora else torch.bfloat16}


# -- bad input -------------------------------------------------------------------------------------------------------


def test_rewards_that_are_not_numbers_are_left_out():
    bad = iter([math.nan, math.inf, None, -math.inf] * 100)
    mixed = lambda samples, prompts, **columns: [
        next(bad) if i % 2 else value for i, value in enumerate(redness(samples, prompts))
    ]
    trainer = build(reward=mixed)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[0]["sage/unscored"] == 0.5 and all(math.isfinite(log["loss"]) for log in logs)
    phase = trainer._sample(7)
    assert (phase["advantages"][1::2] == 0).all() and (phase["advantages"][::2] != 0).any()

    none = build(reward=lambda samples, prompts, **columns: [None] * len(samples), beta=0.0, weight_decay=0.0)
    before = parameters(none)
    none.train()
    assert_equal(parameters(none), before)


def test_a_model_that_is_not_finite_changes_nothing_and_stops():
    trainer = build(max_steps=20)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    before = parameters(trainer)
    with pytest.raises(RuntimeError, match="10 updates in a row"):
        trainer.train()
    torch.testing.assert_close(parameters(trainer), before, rtol=0, atol=0, equal_nan=True)


class Sideways(RingAdapter):
    def velocity(self, model, x, sigma, cond):
        return torch.cat([model(x, sigma), x], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reward=[]), r"reward_funcs=\(\): give at least one"),
        (dict(reward="clip_reward"), "reward_funcs='clip_reward' is unknown"),
        (dict(reward=lambda samples, prompts, **columns: [0.0]), "returned 1 rewards for 8 samples"),
        (dict(reward_weights=[1.0, 2.0]), "must have one weight for each of 1 rewards"),
        (dict(reward_weights=[math.nan]), "reward_weights=.* must be finite"),
        (dict(data=PROMPTS.select([0])), "train_dataset has 1 prompts, but a phase takes 2"),
        (dict(data=Dataset.from_list([{"text": "x"}] * 4)), "prompt=None in row 0 must be a text"),
        (dict(data=None), "train_dataset=None"),
        (dict(eta=2.5), "eta=2.5"),
        (dict(eta=0.0), "eta=0.0"),
        (dict(sde_type="cps", eta=1.2), "eta=1.2 must be at most 1"),
        (dict(sde_type="ode"), "sde_type='ode' must be one of"),
        (dict(sigma_clamp=0.5), "sigma_clamp=0.5"),
        (dict(num_inference_steps=1), "num_inference_steps=1"),
        (dict(shift=-1.0), "shift=-1.0"),
        (dict(deterministic_steps=[4]), r"deterministic_steps=\[4\] must be a list of step indices in \[0, 3\]"),
        (dict(first_step="flow_cap", sde_type="flow"), "first_step='flow_cap' does nothing for sde_type='flow'"),
        (dict(beta_init=1.0), "beta_init=1.0 must be at most beta"),
        (dict(cps_logprob="published"), "cps_logprob='published' is for sde_type='cps'"),
        (dict(kl_schedule="controller", beta=0.0, beta_init=0.0), "kl_schedule='controller' needs a KL to follow"),
        (dict(fsdp="full_shard"), "fsdp"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments).train()


def test_a_model_without_the_convention_is_refused():
    model = RingFlow()
    trainer = SAGEGRPOTrainer(
        model, config(per_device_train_batch_size=8), redness, PROMPTS, adapter=Sideways(transformer=model)
    )
    with pytest.raises(ValueError, match=r"Sideways.velocity returned \(8, 4\) for latents \(8, 2\); it must predict"):
        trainer.train()
    with pytest.raises(ValueError, match="no adapter knows 'RingFlow' to predict a flow's velocity"):
        SAGEGRPOTrainer(model, config(), redness, PROMPTS)
    with pytest.raises(ValueError, match="args is a str; it must be a SAGEGRPOConfig"):
        SAGEGRPOTrainer(model, "out", redness, PROMPTS, adapter=RingAdapter(transformer=model))


def test_embeddings_come_from_columns_too():
    pipeline = tiny_sd3_pipeline()
    encoded = build(pipeline).conditions.by_prompt
    rows = [{"prompt": text, **{name: value.tolist() for name, value in encoded[text].items()}} for text in encoded]
    with_columns = build(
        tiny_sd3_pipeline().transformer,
        lambda samples, prompts, **columns: samples.flatten(1).mean(1).tolist(),
        Dataset.from_list(rows),
        height=8,
        width=8,
    )
    batch, own = micro_batches(with_columns)[0], micro_batches(build(tiny_sd3_pipeline()))[0]
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        torch.testing.assert_close(batch["condition"][name], own["condition"][name])
    torch.testing.assert_close(batch["x"], own["x"])  # the same noise, since the latents have one shape
