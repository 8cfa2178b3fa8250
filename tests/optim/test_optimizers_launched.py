"""The optimizers under DeepSpeed and FSDP2 as a launcher starts them.

Two processes of a CPU, `optim` and `optim_args` in the training arguments: through four steps, and from a checkpoint
after two, the parameters are those of one process without either:
`pytest -m slow tests/optim/test_optimizers_launched.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from layouts import whole_parameters
from test_plug import arguments, rows
from tiny import leave
from transformers import AutoModelForCausalLM, Trainer


HERE = Path(__file__).parent
OPTIMIZERS = {
    "auon": "",
    "auon-repo": "variant=repo,brake_scale=rms",
    "hybrid_auon": "variant=repo",
    "muon": "ns_dtype=float32",
    "muon-split": "ns_dtype=float32,split_sizes=q_proj:4:12;up_proj:7:25",
    "muon-half": "ns_dtype=float32,momentum_dtype=bfloat16",  # whose chance sees the last bits of gradients
    "fismo": "update_interval=2",
}
REFUSED = {
    "tram_adamw": ("", "TRAM cannot run under DeepSpeed"),
    "muon-skip": ("skip_nonfinite=true", "skip_nonfinite=True cannot run under DeepSpeed ZeRO"),
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_cpu_ram_efficient_loading": False,
}
LAUNCHES = {
    "fsdp2": FSDP2,
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    # the model in bf16, and DeepSpeed's float32 masters; the first is DeepSpeed's `BF16_Optimizer`
    "zero1_bf16": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero2_bf16": {"zero_optimization": {"stage": 2}},
    "zero3_bf16": {"zero_optimization": {"stage": 3}},
}
# Of what a parameter moved. Float32: the largest difference over the largest movement. With bf16: norm over norm.
TOLERANCE, ROUGH_TOLERANCE = 2e-3, 0.25


def train(name, optim_args, model_path, folder, processes, resume=None, partitioned=False, **changes):
    given = dict(
        optim=name.partition("-")[0],
        optim_args=optim_args or None,
        learning_rate=0.01,
        weight_decay=0.1,
        max_grad_norm=0.5,
        max_steps=4,
        per_device_train_batch_size=8 // processes,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        seed=3,
    )
    args = arguments(folder, **{**given, **changes})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    assert hasattr(model.lm_head.weight, "ds_shape") == partitioned  # before there is an optimizer
    trainer = Trainer(model=model, args=args, train_dataset=rows(64))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def masters(trainer):
    """The float32 parameters, of which DeepSpeed keeps a part on each process."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).cpu() for name, p in trainer.model.named_parameters()}


def assert_partitioned(trainer, launch):
    if launch == "fsdp2":
        states = trainer.optimizer.optimizer.state.values()
        matrices = [v for s in states for k, v in s.items() if k == "momentum_buffer" or k.endswith("_factor")]
        assert matrices and all(v.to_local().numel() < v.numel() for v in matrices)
        return
    stage = int(launch[4])
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    name = type(trainer.model_wrapped.optimizer).__name__
    expected = "BF16_Optimizer" if launch == "zero1_bf16" else "DeepSpeedZeroOptimizer"
    assert name == expected + ("_Stage3" if stage == 3 else "")
    ours = trainer.model_wrapped.optimizer.optimizer
    held = sum(v.numel() for v in ours._layouts)
    total = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    assert total / 2 <= held < 0.6 * total
    moments = [s["momentum_buffer"].numel() for s in ours.state.values() if "momentum_buffer" in s]
    assert all(v.ndim == 1 for v in ours._layouts) and (moments or trainer.args.optim == "fismo")
    assert any(m.moved for layout in ours._layouts.values() for r in layout.rounds(2**19) for m in r.matrices)


def main():
    folder, model_path, launch = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    if launch == "fsdp2":
        from worker import as_if_on_gpus

        as_if_on_gpus()
    bf16 = launch.endswith("bf16")
    parameters = masters if bf16 else whole_parameters
    for name, optim_args in OPTIMIZERS.items():
        changes = dict(bf16=bf16, partitioned=launch.startswith("zero3"))
        trainer = train(name, optim_args, model_path, folder / name, world, **changes)
        assert_partitioned(trainer, launch)
        found = {"whole": parameters(trainer), "log": trainer.state.log_history}
        resume = str(folder / name / "checkpoint-2")
        again = train(name, optim_args, model_path, folder / name, world, resume, **changes)
        found["resumed"] = parameters(again)
        torch.save(found, folder / f"{name}-{rank}.pt")
    for name, (optim_args, _) in (REFUSED if launch != "fsdp2" else {}).items():
        try:
            train(name, optim_args, model_path, folder / name, world, **changes)
        except ValueError as error:
            (folder / f"{name}-{rank}.json").write_text(json.dumps(str(error)))
    leave()


@pytest.fixture(scope="module")
def alone(tiny_model_path, tmp_path_factory):
    """{name: trainer after training on one process without DeepSpeed}."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = train(name, OPTIMIZERS[name], tiny_model_path, tmp_path_factory.mktemp("alone"), 1)
        return found[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_processes_train_like_one(launch, alone, tiny_model_path, tmp_path):
    if launch.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    config = dict(compute_environment="LOCAL_MACHINE", num_machines=1, num_processes=2, use_cpu=True, machine_rank=0)
    engine = "fsdp" if launch == "fsdp2" else "deepspeed"
    config |= {"distributed_type": engine.upper(), f"{engine}_config": LAUNCHES[launch]}
    if bf16 := launch.endswith("bf16"):
        auto = dict.fromkeys(
            ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
        )
        (tmp_path / "ds.json").write_text(json.dumps({**LAUNCHES[launch], **auto, "bf16": {"enabled": "auto"}}))
        config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": False}
    else:
        config["mixed_precision"] = "no"
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launch.yaml")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE, HERE.parent / "launch"))),
    }
    words = [str(Path(__file__)), str(tmp_path), tiny_model_path, launch]
    done = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-6000:]
    start = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    for name in OPTIMIZERS:
        one = alone(name)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        losses = [[r["loss"] for r in log if "loss" in r] for log in (ranks[0]["log"], one.state.log_history)]
        torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2 if bf16 else 1e-4, atol=1e-4)
        for key, expected in whole_parameters(one).items():
            found = ranks[0]["whole"][key]
            torch.testing.assert_close(found, ranks[1]["whole"][key], rtol=0, atol=0)
            torch.testing.assert_close(found, ranks[0]["resumed"][key], rtol=0, atol=0)
            rough = bf16 or name == "muon-half"
            size = (lambda t: t.norm()) if rough else (lambda t: t.abs().max())
            begun = start[key].bfloat16().float() if bf16 else start[key]  # as the model was loaded
            moved, gap = size(expected - start[key]), size((found - begun) - (expected - start[key]))
            said = f"{launch} {name} {key}: moved {moved:.1e}, apart {gap:.1e}"
            print(said)
            if not (rough and key.endswith("k_proj.bias")):  # its gradient is 0, and what is seen of it rounding
                assert moved > 1e-5 and gap < (ROUGH_TOLERANCE if rough else TOLERANCE) * moved, said
    for name, (_, words) in (REFUSED if engine == "deepspeed" else {}).items():
        for rank in (0, 1):
            said = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert words in said and "\n" not in said


if __name__ == "__main__":
    main()
