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
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

from trl_trust.methods import get_method, hosted
from trl_trust.quickstart.task import build_tokenizer, problems
from trl_trust.tasks.coopetition import coopetition_dataset, coopetition_env_factory, coopetition_metrics
from trl_trust.tasks.coopetition.game import Game
from trl_trust.tasks.coopetition.start import build_start


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
    "tools": {},
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


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    """A tiny policy that writes legal tool calls."""
    return str(build_start(tmp_path_factory.mktemp("player"), Game(rounds=2), steps=60))


def build_player(name, path, folder):
    """A trainer in an environment of two rounds, whose calls come from the policy itself."""
    method, extra = get_method(name), layouts.settings_of(name)
    module, env = import_module(method.module), coopetition_env_factory(rounds=2)
    settings = {"num_iterations": 2, "max_steps": 4, "steps_per_generation": 1, "per_device_train_batch_size": 16}
    if name == "vpd":  # episodes that invest more than nothing count as solved: without one there is no teacher
        settings |= {"success_reward_threshold": -1.0, "max_teacher_prompt_length": 1024}
    settings |= {"learning_rate": 5e-3, **env.grpo_kwargs(tokenizer=AutoTokenizer.from_pretrained(path))}
    args = tiny_config(getattr(module, method.config), folder, **{**settings, **extra.get("config", {})})
    arguments = dict(extra.get("trainer", {}))
    if "teacher_model" in arguments:
        arguments["teacher_model"] = AutoModelForCausalLM.from_pretrained(path)
    return tiny_trainer(
        getattr(module, method.trainer),
        path,
        args,
        reward_funcs=coopetition_metrics,
        train_dataset=coopetition_dataset(32),
        environment_factory=env,
        **arguments,
    )


def build(name, feature, model_path, folder, **changes):
    method, extra = get_method(name), layouts.settings_of(name)
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
@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
def test_a_method_trains_under_a_feature(feature, name, tiny_model_path, tmp_path, request):
    path = tiny_model_path
    if feature.startswith("moe"):
        path = save_moe(tmp_path / "moe", router=feature == "moe_router")
    if feature == "tools":
        trainer = build_player(name, request.getfixturevalue("player"), tmp_path / "run")
    else:
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
    if feature == "tools":
        assert max(record.get("tools/call_frequency", 0) for record in log) > 1
        assert max(record.get("coopetition/rounds_played", 0) for record in log) > 1
    if feature == "evaluation":
        assert sum("eval_reward" in record for record in log) == 2
    if feature == "resume":
        again = build(name, feature, path, tmp_path / "again", max_steps=6)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert parameter_gap(trainer.model, again.model) == 0
