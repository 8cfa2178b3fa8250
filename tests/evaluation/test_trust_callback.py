"""The callback in real trainers: training with it is training without it, to the bit."""

import json
import logging

import pytest
import torch
from tiny import parameter_gap, tiny_config
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_trust import DISPOTrainer
from trl_trust.evaluation import CompressionCallback, TrustEvalCallback, tiny
from trl_trust.evaluation.suite import TrustSuite


SUITE = TrustSuite(dims=("honesty", "privacy"), n_per_dim=8, terse=True, max_new_tokens=8)


def model_and_tokenizer():
    tokenizer = tiny.build_tokenizer()
    return tiny.build_model(tokenizer, hidden_size=16, layers=1, heads=2), tokenizer


def length_reward(completions, **_):
    return [float(len(c[0]["content"]) % 3) for c in completions]


def train(kind, tmp_path, callback=None, **kwargs):
    model, tokenizer = model_and_tokenizer()
    data = SUITE.dataset("honesty", n=32, demonstrate=kind == "sft")
    if kind == "sft":
        args = SFTConfig(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
            logging_steps=1, save_strategy="steps", save_steps=4, learning_rate=1e-2, gradient_checkpointing=False,
            disable_tqdm=True, assistant_only_loss=False,
        )  # fmt: skip
        data = data.select_columns(["prompt", "completion"])
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **kwargs)
    else:
        cls = {"grpo": GRPOTrainer, "dispo": DISPOTrainer}[kind]
        trainer = cls(
            model, reward_funcs=[SUITE.reward_func("honesty"), length_reward],
            args=tiny_config(GRPOConfig, tmp_path), train_dataset=data, processing_class=tokenizer, **kwargs,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["sft", "grpo", "dispo"])
def test_training_with_it_is_training_without_it(kind, tmp_path):
    plain = train(kind, tmp_path / "plain")
    watched = train(kind, tmp_path / "watched", lambda t: TrustEvalCallback(t, SUITE, every_n_steps=2))
    assert parameter_gap(plain.model, watched.model) == 0.0
    logs = watched.state.log_history
    ours = [entry for entry in logs if "trusteval/worst_drop" in entry]
    timeless = lambda entry: {k: v for k, v in entry.items() if "time" not in k and "second" not in k}
    assert [timeless(e) for e in logs if e not in ours] == [timeless(e) for e in plain.state.log_history]
    assert [entry["step"] for entry in ours] == [2, 4]
    assert {f"trusteval/honesty/{key}" for key in ("score", "no_answer", "low", "high", "delta")} <= set(ours[0])
    saved = sorted(path.name for path in (tmp_path / "watched" / "trusteval").iterdir())
    assert saved == ["start.json", "step-2.json", "step-4.json"]
    assert json.loads((tmp_path / "watched" / "trusteval" / "step-2.json").read_text())["meta"]["evaluation"] == 1


def test_it_runs_with_lora(tmp_path):
    from peft import LoraConfig

    trainer = train(
        "sft", tmp_path, lambda t: TrustEvalCallback(t, SUITE, every_n_steps=4, baseline=None),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    (entry,) = [entry for entry in trainer.state.log_history if "trusteval/honesty/score" in entry]
    assert "trusteval/worst_drop" not in entry


def test_an_alert_is_told_and_may_stop(tmp_path, caplog):
    from profiles import PROFILES, report_on

    good = report_on(PROFILES["oracle"], SUITE)
    with caplog.at_level(logging.WARNING, logger="trl_trust"):
        trainer = train(
            "sft", tmp_path, lambda t: TrustEvalCallback(t, SUITE, every_n_steps=2, baseline=good, stop_on_alert=True)
        )
    assert trainer.state.global_step == 2
    assert "trust at step 2 became worse beyond chance: honesty 1.000 to 0.000" in caplog.text


def test_compression_of_each_checkpoint(tmp_path):
    plain = train("sft", tmp_path / "plain")
    options = dict(methods=("rtn4",), n_tokens=64, group_size=16)
    watched = train("sft", tmp_path / "watched", lambda t: CompressionCallback(t, SUITE, **options))
    assert parameter_gap(plain.model, watched.model) == 0.0
    assert (tmp_path / "watched" / "checkpoint-4" / "compression" / "report.json").exists()
    assert any(entry.get("compression/rtn4/kl", 0) > 0 for entry in watched.state.log_history)


@pytest.mark.parametrize(
    "options, message",
    [({"every_n_steps": 0}, "every_n_steps=0"), ({"baseline": "begin"}, "baseline='begin'"),
     ({"baseline": "reference"}, "no reference model")],
)  # fmt: skip
def test_bad_settings_of_the_callback(options, message):
    with pytest.raises(ValueError, match=message):
        TrustEvalCallback(object(), SUITE, **options)


def test_torch_is_seeded_as_before():
    torch.manual_seed(3)
    expected = torch.rand(1)
    model, tokenizer = model_and_tokenizer()
    torch.manual_seed(3)
    from trl_trust.evaluation import run_trust_suite

    sampled = {"do_sample": True}
    suite = TrustSuite(dims="ethics", n_per_dim=8, terse=True, max_new_tokens=8, generate_kwargs=sampled)
    run_trust_suite(model, tokenizer, suite)
    assert torch.equal(torch.rand(1), expected)
