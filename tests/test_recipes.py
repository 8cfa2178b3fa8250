"""Every file under recipes/ is read by its method's own parser and run for two steps on a tiny model and tiny data."""

import json
import os

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_trust import cli, script
from trl_trust.methods import METHODS, get_method


# a method with a script of its own has recipes of its own form, which its tests run
FOLDERS = {method.recipes for method in METHODS if method.host == "grpo"}
RECIPES = {name: path for name, path in cli.recipes().items() if name.split("/")[0] in FOLDERS}

# Put in place of what needs a GPU, the network or time. Everything else is as the recipe has it.
ON_A_CPU = {"use_cpu": True, "bf16": False, "dtype": "float32", "use_vllm": False, "report_to": "none"}
SMALL = {
    "dataset_config": None,
    "dataset_train_split": "train",
    "prompt_column": "prompt",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "max_completion_length": 16,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """A byte-level Qwen2 of hidden size 16 with a chat template, and two problems with plain answers, on disk."""
    folder = tmp_path_factory.mktemp("tiny-math")
    vocab = {token: i for i, token in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_only = Tokenizer(models.BPE(vocab, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=list(range(64)),  # every fourth token ends a completion: most end before they are cut off
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    puzzle = {"solution_text_format": "(1) Zoey is a knave"}
    groups = [{"problem_type": "AG"[a % 2], "question": a // 2, "wording": a % 2} for a in range(8)]
    rows = [{"prompt": f"{a} + 1 = ?", "solution": str(a + 1), **puzzle, **groups[a]} for a in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model": str(folder / "model"), "data": str(folder / "train.jsonl")}


def some_reward(completions, **kwargs):
    """Differs within a group, unlike the accuracy of an untrained model, so that there is a gradient."""
    return [float(i % 2) for i in range(len(completions))]


def settings(name: str) -> dict:
    return yaml.safe_load(RECIPES[name].read_text())


def write(path, **values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def trainers_run(monkeypatch) -> list:
    """Collects the trainers that the script builds and runs."""
    run, trainers = script.run, []

    def recording_run(trainer, *rest):
        trainers.append(trainer)
        run(trainer, *rest)

    monkeypatch.setattr(script, "run", recording_run)
    return trainers


def test_every_method_has_a_recipe():
    assert {name.split("/")[0] for name in cli.recipes()} >= {method.name for method in METHODS}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_read_and_its_ratio_is_live(name, tmp_path):
    recipe = settings(name)
    parser = script.make_parser(get_method(name.split("/")[0]))
    on_a_cpu = write(tmp_path / "recipe.yaml", **{**recipe, **ON_A_CPU})
    script_args, args, model_args, _ = parser.parse(["--config", on_a_cpu])

    assert RECIPES[name].read_text().startswith("# "), "the first line says what the recipe is"
    assert model_args.model_name_or_path == recipe["model_name_or_path"]
    assert script_args.dataset_name and script_args.reward_funcs
    # TRL 1.16 keeps log-probabilities from before the update only then; without them the ratio is 1 by construction
    assert args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
    # and a rollout ends on an update: otherwise gradients of two rollouts are mixed in one
    assert args.steps_per_generation % args.gradient_accumulation_steps == 0
    # and a checkpoint falls between two rollouts: resuming there repeats the uninterrupted run
    updates = args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations
    assert args.save_steps % updates == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_on_two_rollouts(name, tiny, tmp_path, monkeypatch):
    recipe = settings(name)
    updates = SMALL["steps_per_generation"] * recipe.get("num_iterations", 1)  # of a rollout
    small = {**recipe, **ON_A_CPU, **SMALL, "output_dir": str(tmp_path / "out"), "dataset_name": tiny["data"]}
    small["max_steps"] = updates + 1
    small |= {key: tiny["model"] for key in recipe if key.endswith("model_name_or_path")}  # a teacher's too
    small["reward_funcs"] = [*recipe["reward_funcs"], f"{__name__}.some_reward"]
    if "reward_weights" in recipe:
        small["reward_weights"] = [*recipe["reward_weights"], 1.0]
    trainers = trainers_run(monkeypatch)

    assert cli.main([name.split("/")[0], "--config", write(tmp_path / "small.yaml", **small)], launch=False) == 0

    (trainer,) = trainers
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(log) == updates + 1
    assert all(torch.isfinite(torch.tensor(entry["loss"])) and entry["grad_norm"] > 0 for entry in log)
    # the second step trains on the rollout of the first: the policy has moved away from the one that generated
    if trainer.args.needs_stale_rollouts:  # otherwise something else than updates separates them too, such as noise
        # and the first step on the next one is fresh again: dropout would show here, where LoRA's B is no longer 0
        for fresh in (log[0], log[updates]):
            assert fresh["trust/ratio/min"] == pytest.approx(1.0, abs=1e-5)
            assert fresh["trust/ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert max(abs(log[1][f"trust/ratio/{extreme}"] - 1) for extreme in ("min", "max")) > 1e-4
    saved = "adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors"
    assert os.path.getsize(tmp_path / "out" / saved) > 0
