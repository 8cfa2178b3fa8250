import copy
import json
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_config, tiny_run
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames
from trl import GRPOTrainer, SFTConfig, SFTTrainer, TrlParser

from trl_trust.methods import METHODS
from trl_trust.optim import AuON, HybridAuON, Muon, plug
from trl_trust.optimizers import OPTIMIZERS, OptimizerInfo, get_optimizer


QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
MATRIX = ["auon", "hybrid_auon", "muon"]


def arguments(path="unused", **overrides):
    return TrainingArguments(output_dir=str(path), **{**QUIET, "max_steps": 2, "learning_rate": 0.01, **overrides})


def language_model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def rows(n=16):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 13, (n, 8), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def trainer_for(path, args):
    return Trainer(model=language_model(path), args=args, train_dataset=rows())


def inner(trainer):
    """The optimizer itself, out of accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


# ------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("row", OPTIMIZERS, ids=lambda row: row.name)
def test_names_are_members_choices_and_handlers(row):
    assert OptimizerNames(row.name) == row.name
    assert row.name in [member.value for member in OptimizerNames]
    assert OptimizerNames[row.name.upper()] is OptimizerNames(row.name) is getattr(OptimizerNames, row.name.upper())
    assert row.name in _OPTIMIZER_HANDLERS and OptimizerNames(row.name) in _OPTIMIZER_HANDLERS
    args = arguments(optim=row.name)
    assert args.optim == row.name == args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"]
    assert arguments().set_optimizer(name=row.name).optim == row.name
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args)), replace(args, seed=1)):
        assert other.optim == row.name and other.optim in _OPTIMIZER_HANDLERS


def test_registering_again_changes_nothing():
    state = lambda: (list(OptimizerNames), dict(_OPTIMIZER_HANDLERS), Trainer.create_optimizer, Trainer.train)
    before = state()
    plug.register()
    assert state() == before


def test_names_of_transformers_are_left_alone():
    assert arguments(optim="sgd").optim is OptimizerNames.SGD
    assert pickle.loads(pickle.dumps(OptimizerNames.SGD)) is OptimizerNames.SGD
    with pytest.raises(ValueError, match="optim='sgdd' is not a valid OptimizerNames; did you mean 'sgd'"):
        arguments(optim="sgdd")
    with pytest.raises(ValueError, match="there are: .*sgd.*auon, hybrid_auon"):
        arguments(optim="zzzz")


def test_unknown_rows_raise():
    assert get_optimizer("auon").load() is AuON
    with pytest.raises(KeyError, match="unknown optimizer 'auonn'; did you mean 'auon'"):
        get_optimizer("auonn")
    with pytest.raises(KeyError, match="unknown optimizer 'zzz'; there are: auon, hybrid_auon"):
        get_optimizer("zzz")


def test_the_table_needs_no_torch():
    script = "import sys, trl_trust.optimizers; assert not {'torch', 'transformers', 'trl'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], check=True)


ROOMS = {row.module.rpartition(".")[0]: row for row in METHODS}  # a row of each room


@pytest.mark.parametrize("row", ROOMS.values(), ids=ROOMS)
def test_any_trainer_or_config_of_ours_registers_them(row):
    script = f"""
        import sys, trl_trust
        assert not {{"torch", "transformers"}} & sys.modules.keys()
        from {row.module} import {row.config}
        from transformers.training_args import OptimizerNames
        print(OptimizerNames("auon").value)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    assert run.stdout == "auon\n"


def test_yaml(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path}\noptim: hybrid_auon\noptim_args: variant=repo, momentum=0.9\nuse_cpu: true\n"
        "bf16: false\nreport_to: none\n"
    )
    (args,) = TrlParser((SFTConfig,)).parse_args_and_config(["--config", str(recipe)])
    assert (args.optim, args.optim_args) == ("hybrid_auon", "variant=repo, momentum=0.9")


@pytest.mark.parametrize("name", [row.name for row in OPTIMIZERS])
def test_command_line(tmp_path, name):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    (args,) = TrlParser((SFTConfig,)).parse_args_and_config([*words, "--optim", name])
    assert args.optim == name


def test_command_line_still_refuses_unknown_names(tmp_path, capsys):
    with pytest.raises(SystemExit):
        TrlParser((SFTConfig,)).parse_args_and_config(["--output_dir", str(tmp_path), "--optim", "auonn"])
    assert "invalid choice: 'auonn'" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- trainers


@pytest.mark.parametrize("name", MATRIX)
def test_plain_trainer(tiny_model_path, name):
    trainer = trainer_for(tiny_model_path, arguments(optim=name))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert type(inner(trainer)) is get_optimizer(name).load()
    assert all(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == 0.01  # the matrices', not a tenth of it


def test_sft_trainer_from_yaml(tiny_model_path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}\noptim: hybrid_auon\nmax_steps: 2\nlearning_rate: 0.02\nbf16: false\n")
    words = ["--config", str(recipe), "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    (args,) = TrlParser((SFTConfig,)).parse_args_and_config(words)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    data = Dataset.from_dict({"text": ["12+34=46"] * 16})
    trainer = SFTTrainer(language_model(tiny_model_path), args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert type(inner(trainer)) is HybridAuON and trainer.state.global_step == 2
    assert inner(trainer).param_groups[0]["initial_lr"] == 0.02


def test_grpo_trainer(tiny_model_path, tmp_path):
    args = tiny_config(output_dir=tmp_path, optim="hybrid_auon", max_steps=2, learning_rate=0.02)
    trainer = tiny_run(GRPOTrainer, tiny_model_path, args)
    start = language_model(tiny_model_path)
    assert type(inner(trainer)) is HybridAuON and trainer.state.global_step == 2
    assert any(not torch.equal(p, q) for p, q in zip(start.parameters(), trainer.model.parameters(), strict=True))


def test_model_init_and_set_after_construction(tiny_model_path):
    args = arguments()
    args.optim = "muon"
    trainer = Trainer(model_init=lambda: language_model(tiny_model_path), args=args, train_dataset=rows())
    trainer.train()
    assert type(inner(trainer)) is Muon


def test_gradient_accumulation_and_lora(tiny_model_path):
    from peft import LoraConfig, get_peft_model

    args = arguments(optim="auon", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    model = get_peft_model(language_model(tiny_model_path), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(model=model, args=args, train_dataset=rows())
    trainer.train()
    assert trainer.state.global_step == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_continues_exactly(tiny_model_path, tmp_path, name, dtype):
    def trainer(folder, steps):
        args = arguments(
            tmp_path / folder,
            optim=name,
            weight_decay=0.1,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="linear",
        )
        model = language_model(tiny_model_path).to(dtype)
        return Trainer(model=model, args=args, train_dataset=rows(64))

    whole = trainer("whole", 4)
    whole.train()
    resumed = trainer("resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
        left, right = inner(whole).state[p], inner(resumed).state[q]
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert value.dtype == right[key].dtype == torch.float32 and torch.equal(value, right[key])


def test_checkpoint_is_readable_without_the_package(tiny_model_path, tmp_path):
    args = arguments(tmp_path, optim="auon", optim_args="momentum=0.9", save_strategy="steps", save_steps=2)
    trainer_for(tiny_model_path, args).train()
    script = f"""
        import sys
        import torch
        from transformers.training_args import OptimizerNames
        args = torch.load({str(tmp_path / "checkpoint-2" / "training_args.bin")!r}, weights_only=False)
        assert not any(name.startswith("trl_trust") for name in sys.modules)
        assert type(args.optim) is str and args.optim == "auon" and "auon" not in [m.value for m in OptimizerNames]
        torch.load({str(tmp_path / "checkpoint-2" / "optimizer.pt")!r}, weights_only=True)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


# ------------------------------------------------------------------------------------------- settings on their way


def build(tiny_model_path, **overrides):
    return trainer_for(tiny_model_path, arguments(**overrides)).create_optimizer()


def test_optim_args_are_parsed_by_their_declared_type(tiny_model_path):
    text = (
        "momentum=0.9, nesterov=false, variant=repo, gamma=none, ns_steps=3, ns_coefficients=3:-4.5:2, aux_lr=1e-4, "
        "aux_betas=0.8:0.99, shape_scale=match_rms_adamw, adamw_pattern=q_proj, split_sizes=gate_proj:8:24"
    )
    groups = build(tiny_model_path, optim="hybrid_auon", optim_args=text).param_groups
    expected = {
        "momentum": 0.9,
        "nesterov": False,
        "variant": "repo",
        "gamma": None,
        "ns_steps": 3,
        "ns_coefficients": (3.0, -4.5, 2.0),
        "shape_scale": "match_rms_adamw",
        "lr": 0.01,
    }
    assert expected.items() <= groups[0].items()
    assert [group["split_sizes"] for group in groups if group.get("split_sizes")] == [(8, 24)]
    assert groups[-1]["betas"] == (0.8, 0.99) and groups[-1]["lr"] == 1e-4
    assert any(
        "q_proj.weight" in name for group in groups if group["rule"] == "adamw" for name in group["param_names"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "momentun=0.9",
            r"unknown keys: momentun; did you mean 'momentum'. valid: .*momentum \(float\).*variant \(paper or repo\)",
        ),
        ("matrix_defaults=1", "unknown keys: matrix_defaults"),
        ("no_decay=1", "unknown keys: no_decay"),
        ("momentum=much", "optim_args of optim='auon': momentum=much is not float"),
        ("ns_steps=1.5", "ns_steps=1.5 is not int"),
        ("nesterov=maybe", "nesterov=maybe is not true or false"),
        ("variant=papers", "variant=papers is not paper or repo"),
        ("aux_betas=0.9", "aux_betas=0.9 is not float:float"),
        ("gamma=no", "gamma=no is not float or none"),
        ("momentum=2", r"momentum=2.0 must be a number in \[0, 1\)"),
    ],
)
def test_bad_optim_args_raise(tiny_model_path, text, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_model_path, optim="auon", optim_args=text)


@pytest.mark.parametrize(
    ("optim", "lr", "text", "said"),
    [
        (
            "muon",
            2e-5,
            None,
            "shape_scale=match_rms_adamw,aux_lr=2e-05', with which AdamW's rates fit, or a rate of .01",
        ),
        ("auon", 1e-6, None, "optim='auon' at learning_rate=1e-06, a rate of AdamW's size"),
        ("tram_adamw", 2e-5, "base=fismo", "optim='tram_adamw' at learning_rate=2e-05"),
        ("tram_adamw", 2e-2, None, "optim='tram_adamw' at learning_rate=0.02: its updates are of AdamW's size"),
        ("muon", 2e-2, "shape_scale=match_rms_adamw", "or leave shape_scale=match_rms_adamw out of optim_args"),
        ("muon", 2e-2, None, None),
        ("muon", 2e-5, "shape_scale=match_rms_adamw,aux_lr=2e-5", None),
        ("tram_adamw", 2e-5, None, None),
        ("tram_adamw", 2e-2, "base=hybrid_auon", None),
    ],
)
def test_a_rate_of_the_wrong_size_is_told_once(tiny_model_path, caplog, optim, lr, text, said):
    build(tiny_model_path, optim=optim, learning_rate=lr, optim_args=text)
    warnings = [record.getMessage() for record in caplog.records if record.name == "trl_trust.optim.plug"]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_optim_args_go_before_training_arguments(tiny_model_path):
    optimizer = build(tiny_model_path, optim="muon", optim_args="lr=0.3,weight_decay=0.2", weight_decay=0.1)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.3, 0.2)


def test_weight_decay_keeps_the_list_of_the_trainer():
    # Its experts have two-dimensional biases, which only the list tells from matrices.
    config = GptOssConfig(
        num_hidden_layers=1, num_local_experts=2, hidden_size=16, intermediate_size=8, head_dim=8, vocab_size=16,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    args = arguments(optim="auon", weight_decay=0.1)
    trainer = Trainer(model=GptOssForCausalLM(config), args=args, train_dataset=rows())
    listed = set(trainer.get_decay_parameter_names(trainer.model))
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert group["weight_decay"] == (0.1 if name in listed and p.ndim > 1 else 0.0), name  # vectors never


def test_adam_settings_reach_adamw_only_when_they_were_changed(tiny_model_path):
    group = build(tiny_model_path, optim="auon").param_groups[-1]
    assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)
    group = build(tiny_model_path, optim="auon", adam_beta2=0.98, adam_epsilon=1e-6).param_groups[-1]
    assert (group["betas"], group["eps"]) == ((0.9, 0.98), 1e-6)


def test_what_zero_cannot_do_is_refused_before_training(tiny_model_path):
    trainer = trainer_for(tiny_model_path, arguments(optim="muon", optim_args="skip_nonfinite=true"))
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    for stage in (1, 2, 3):
        trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={})
        with pytest.raises(ValueError, match="optim='muon': skip_nonfinite=True cannot run under DeepSpeed ZeRO"):
            trainer.create_optimizer()
        trainer.args.deepspeed_plugin.deepspeed_config = offload
        with pytest.raises(ValueError, match="optim='muon': .* offload_optimizer.* set its device to none"):
            trainer.create_optimizer()
    trainer.args.deepspeed_plugin.zero_stage = 0
    assert isinstance(trainer.create_optimizer(), Muon)


def test_an_optimizer_of_deepspeeds_own_is_refused(tiny_model_path):
    trainer = trainer_for(tiny_model_path, arguments(optim="auon"))
    trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=0, deepspeed_config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(
        ValueError, match="optim='auon' would be ignored: DeepSpeed's config has an 'optimizer' section"
    ):
        trainer.train()
    trainer.args.deepspeed_plugin.deepspeed_config = {}
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_target_with_attach_gets_the_trainer(tiny_model_path, monkeypatch):
    class Attached(torch.optim.SGD):
        def attach(self, trainer):
            self.trainer = trainer

    def target(model: nn.Module, *, lr: float, rate: float = 1.0):
        return Attached(model.parameters(), lr=lr * rate)

    monkeypatch.setattr(plug, "sgd_target", target, raising=False)
    row = OptimizerInfo("attached", "Attached", "trl_trust.optim.plug:sgd_target", "", "exact", "for this test")
    monkeypatch.setitem(_OPTIMIZER_HANDLERS, "attached", lambda context: plug._handle(row, context))
    trainer = trainer_for(tiny_model_path, arguments(optim_args="rate=3"))
    trainer.args.optim = "attached"
    optimizer = trainer.create_optimizer()
    assert optimizer.trainer is trainer and optimizer.param_groups[0]["lr"] == pytest.approx(0.03)
