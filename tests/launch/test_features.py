"""Every method under each feature of TRL that needs no second process: it trains, with a ratio other than 1.

One method runs with the suite; all of them, about two minutes, with `pytest -m "slow or not slow"`.
"""

import math
from importlib import import_module

import layouts
import pytest
import torch
from peft import LoraConfig
from tiny import parameter_gap, tiny_config, tiny_trainer
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from trl_trust.methods import get_method, hosted
from trl_trust.quickstart.task import build_tokenizer, problems


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
# column of docs/support.md -> settings of the config
FEATURES = {
    "lora": {},
    "moe": {},
    "moe_router": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "resume": {"save_strategy": "steps", "save_steps": 4},
    "evaluation": EVALUATION,
}
SHORT = {"dispo"}
CASES = [
    pytest.param(feature, method.name, marks=[] if method.name in SHORT else [pytest.mark.slow])
    for feature in FEATURES
    for method in hosted("grpo")
]


def save_moe(path, router: bool) -> str:
    """An untrained Qwen2-MoE of four experts, two a token; with `router`, its balancing loss is on."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=router,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def build(name, feature, model_path, folder, **changes):
    method, extra = get_method(name), layouts.SETTINGS.get(name, {})
    extra = extra() if callable(extra) else extra
    module = import_module(method.module)
    settings = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 1, "per_device_train_batch_size": 16}
    args = tiny_config(
        getattr(module, method.config),
        folder,
        **{**settings, **extra.get("config", {}), **FEATURES[feature], **changes},
    )
    arguments = dict(extra.get("trainer", {}))
    if feature == "lora":
        arguments["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
    if feature == "evaluation":
        arguments["eval_dataset"] = problems("test", 4)
    return tiny_trainer(layouts.scripted(getattr(module, method.trainer)), model_path, args, **arguments)


@pytest.mark.parametrize(("feature", "name"), CASES)
def test_a_method_trains_under_a_feature(feature, name, tiny_model_path, tmp_path):
    path = tiny_model_path
    if feature.startswith("moe"):
        path = save_moe(tmp_path / "moe", router=feature == "moe_router")
    trainer = build(name, feature, path, tmp_path / "run", **({"max_steps": 6} if feature == "resume" else {}))
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history
    assert any(not torch.equal(before[key], p) for key, p in trainer.model.named_parameters())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(math.isfinite(record["loss"]) for record in log if "loss" in record)
    ratios = [record.get(f"trust/ratio/{end}") for record in log for end in ("min", "max")]
    assert max(abs(ratio - 1) for ratio in ratios if ratio is not None) > 1e-3
    if feature == "lora":
        assert all("lora_" in key for key, p in trainer.model.named_parameters() if p.requires_grad)
    if feature == "moe_router":
        assert all(record["aux_loss"] > 0 for record in log if "loss" in record)
    if feature == "gradient_checkpointing":
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing
    if feature == "bf16":
        assert trainer.accelerator.mixed_precision == "bf16"
    if feature == "evaluation":
        assert sum("eval_reward" in record for record in log) == 2
    if feature == "resume":
        again = build(name, feature, path, tmp_path / "again", max_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert parameter_gap(trainer.model, again.model) == 0
