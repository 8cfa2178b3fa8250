"""`trl-trust sage`: every recipe of the method is read, and run on a tiny pipeline; and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from trl_trust import cli
from trl_trust.flow.script import make_parser
from trl_trust.methods import get_method


RECIPES = {name: path for name, path in cli.recipes().items() if name.startswith("sage/")}
# Put in place of what needs a GPU, the network or time. Everything else is as the recipe has it.
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "report_to": "none",
    "dataset_config": None,
    "dataset_train_split": "train",
    "eval_on_start": True,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 4,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "steps_per_generation": 1,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "max_steps": 3,
}


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a recipe made small, changed by keywords; returns the folder it leaves."""
    rows = [{"prompt": text, "Prompt": text} for text in ("a red ball", "a blue cat", "the ball", "a cat at night")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def call(name: str, **changes):
        recipe = yaml.safe_load(RECIPES[name].read_text())
        small = {**recipe, **SMALL, "output_dir": str(tmp_path / "out")}
        small["model_name_or_path"] = "tiny-sd3" if "sd3" in name else "tiny-wan"
        if "dataset_name" in recipe:
            small["dataset_name"] = str(tmp_path / "prompts.jsonl")
        small["reward_funcs"] = ["brightness_reward"] * len(recipe["reward_funcs"])
        small = {key: value for key, value in {**small, **changes}.items() if value is not None or key == "shift"}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
        assert cli.main(["sage", "--config", str(tmp_path / "small.yaml")], launch=False) == 0
        return tmp_path / "out"

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read(name, tmp_path):
    recipe = yaml.safe_load(RECIPES[name].read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "use_cpu": True, "bf16": False}))
    script_args, args, model_args, _ = make_parser(get_method("sage")).parse(
        ["--config", str(tmp_path / "recipe.yaml")]
    )
    assert RECIPES[name].read_text().startswith("# ") and model_args.model_name_or_path == recipe["model_name_or_path"]
    assert script_args.reward_funcs and script_args.eval_prompts and args.num_generations == recipe["num_generations"]
    # several updates a phase: otherwise the ratio is 1 throughout
    per_phase = (args.steps_per_generation or 1) * args.num_inference_steps * args.num_iterations
    assert per_phase > args.gradient_accumulation_steps and per_phase % args.gradient_accumulation_steps == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_from_the_command_line(name, run):
    out = run(name)
    log = [entry for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert len(log) == 3 and all(entry["grad_norm"] > 0 for entry in log)
    assert log[0]["trust/ratio/max"] == pytest.approx(1.0, abs=1e-5) == log[2]["trust/ratio/max"]  # fresh roll-outs
    assert abs(log[1]["trust/ratio/max"] - 1) > 1e-5
    lora = yaml.safe_load(RECIPES[name].read_text()).get("use_peft")
    assert (
        (out / ("pytorch_lora_weights.safetensors" if lora else "diffusion_pytorch_model.safetensors")).stat().st_size
    )
    assert len(list((out / "samples").glob("step-000000.*"))) == 1
    card = (out / "README.md").read_text()
    assert "Provenance of this implementation of SAGE-GRPO: **exact**" in card and "author = {Mingzhe Zheng" in card
    assert f"| `eta` | {yaml.safe_load(RECIPES[name].read_text())['eta']} |" in card and ("- lora\n" in card) == bool(
        lora
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_funcs": None}, "no reward: set `reward_funcs`"),
        ({"reward_funcs": ["clip_reward"]}, "reward_funcs='clip_reward' is unknown; there are brightness_reward"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere': set it to a diffusers pipeline"),
        ({"model_name_or_path": "no/such-pipeline"}, "is no pipeline, and cannot be had from the Hub"),
        ({"load_in_4bit": True}, "load_in_4bit=True is not read for flow models"),
        ({"dataset_name": "there.jsonl"}, "prompts: set either them or dataset_name='there.jsonl'"),
        ({"eval_prompts": None}, "eval_strategy='steps' needs `eval_prompts`"),
        ({"dataset_streaming": True}, "dataset_streaming=True"),
        ({"sde_type": "cps", "eta": 1.5}, "eta=1.5 must be at most 1 for sde_type='cps'"),
        ({"eta": 2.5}, "eta=2.5 must be"),
        ({"resume_from_checkpoint": "true"}, "there is no checkpoint in output_dir"),
        ({"use_peft": True, "lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3 must divide the 4 micro-batches"),
        ({"num_generations": 3}, "steps_per_generation=1: a phase has 4 samples"),
    ],
)
def test_what_is_wrong_is_one_line(changes, message, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("sage/offline-tiny-wan", **changes)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-trust: error")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_pipelines_are_loaded_in_the_types_asked_for(tmp_path):
    from argparse import Namespace

    from trl_trust.flow.adapters.tiny import tiny_wan_pipeline
    from trl_trust.flow.script import load_pipeline

    tiny_wan_pipeline().save_pretrained(tmp_path / "pipe")
    asked = Namespace(model_name_or_path=str(tmp_path / "pipe"), dtype="bfloat16", model_revision="main")
    loaded = load_pipeline(asked, 0)
    assert (
        loaded.transformer.dtype == loaded.text_encoder.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    )


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    """With a tiny Wan in the place of the real one, brightness in that of CLIP, and small settings."""
    import diffusers
    from datasets import Dataset

    import trl_trust.flow.rewards as rewards
    from trl_trust.flow import SAGEGRPOConfig, brightness_reward
    from trl_trust.flow.adapters.tiny import tiny_wan_pipeline

    monkeypatch.chdir(tmp_path)
    page = Path(cli.__file__).parent.parent / "docs" / "sage.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda *args, **kwargs: tiny_wan_pipeline())
    for name in ("clip_score_reward", "pick_score_reward"):
        monkeypatch.setattr(rewards, name, lambda: brightness_reward)
    small = {
        name: SMALL[name] for name in ("use_cpu", "bf16", "report_to", "height", "width", "num_frames", "max_steps")
    }
    whole = SAGEGRPOConfig.__init__
    monkeypatch.setattr(
        SAGEGRPOConfig, "__init__", lambda self, **own: whole(self, **own, **small, num_inference_steps=3)
    )
    prompts = Dataset.from_list([{"prompt": "a red ball"}, {"prompt": "a blue cat"}])
    names = {"prompts": prompts}
    exec(compile(code, str(page), "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
