"""`trl-trust async-NAME`: the recipes run, with rollouts from this process; what cannot run says so in one line."""

import json
import re

import pytest
import yaml
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from trl_trust import cli
from trl_trust.asynchronous import script
from trl_trust.methods import ASYNCHRONOUS, METHODS, get_method


RECIPES = {name: path for name, path in cli.recipes().items() if name.startswith("async/")}
# in place of what needs GPUs, the network or time
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataset_config": None,
    "gradient_checkpointing": False,
    "local_lag": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "token_budget": 0,
    "max_completion_length": 8,
    "max_steps": 4,
    "save_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
}


def some_reward(completions, **columns):
    """Differs within a group, unlike the accuracy of an untrained model, so that there is a gradient."""
    return [float(i % 2) for i in range(len(completions))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model, tmp_path):
    """Writes a recipe, small and for this machine, and returns its path."""
    rows = [{"prompt": f"{a}+1=", "solution": str(a + 1)} for a in range(10, 20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"model_name_or_path": model, "dataset_name": str(tmp_path / "train.jsonl")}

    def write(name="async/dppo-qwen3-1.7b-math", **changes) -> str:
        settings = yaml.safe_load(RECIPES[name].read_text())
        values = settings | SMALL | given | {"output_dir": str(tmp_path / "out")}
        values["reward_funcs"] = [*settings["reward_funcs"], f"{__name__}.some_reward"]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
        return str(path)

    return write


def refusal(words, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main(words, launch=False)
    assert left.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-trust: error")]
    return line


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_is(name):
    method = get_method(f"async-{name.split('/')[1].split('-')[0]}")
    parser = script.make_parser(method)
    recipe = yaml.safe_load(RECIPES[name].read_text())
    words = ["--config", str(RECIPES[name]), "--use_cpu", "true", "--bf16", "false"]
    script_args, args, model_args, _ = parser.parse(words)
    assert model_args.model_name_or_path == recipe["model_name_or_path"] and script_args.reward_funcs
    assert args.max_steps > 0 and args.token_budget > args.max_completion_length
    text = RECIPES[name].read_text()
    assert "# Not run: " in text and f"trl-trust {method.name} --config {name}" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_saves_and_resumes(name, recipe, tmp_path, capsys):
    command = f"async-{name.split('/')[1].split('-')[0]}"
    assert cli.main([command, "--config", recipe(name)], launch=False) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [record for record in log if "loss" in record]
    assert len(losses) == 4 and all(record["grad_norm"] > 0 for record in losses)
    assert [record["trust/lag/max"] for record in losses] == [0.0, 1.0, 1.0, 1.0]
    assert losses[-1]["trust/ratio/max"] > 1.0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Provenance of this implementation of {get_method(command).title}" in card and "async-grpo" in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    words = ["--resume_from_checkpoint", "true", "--max_steps", "6"]
    assert cli.main([command, "--config", recipe(name), *words], launch=False) == 0
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in log if "loss" in record] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"local_lag": 9, "max_staleness": 8}, "local_lag=9 must be a whole number from 0 to max_staleness=8"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size=3: .* whole groups of num_generations=4"),
        ({"reward_model_name_or_path": "org/judge"}, "reward_model_name_or_path='org/judge': .* without a GPU"),
        ({"reward_funcs": None}, "no reward: set `reward_funcs`"),
        ({"epsilon": 0.1}, "epsilon=0.1: AsyncDPPOConfig does not read `epsilon`"),
        ({"num_iterations": 2}, "unknown field 'num_iterations' in the recipe"),
        ({"attn_implementation": "sdpa"}, "unknown field 'attn_implementation' in the recipe"),
        ({"anchor": "old"}, "anchor='old' is for the synchronous trainer: old log-probabilities are the sampler's"),
        ({"step_control": "stop"}, "step_control='stop' is not known"),
        ({"local_lag": None}, "no GPU: .* for a first look on a CPU set `local_lag`"),
    ],
)
def test_bad_input_is_one_line(changes, message, recipe, capsys):
    line = refusal(["async-dppo", "--config", recipe(**changes)], capsys)
    assert re.search(message, line), line


@pytest.mark.parametrize("method", [m for m in METHODS if m.asynchronous not in ("yes", "")], ids=lambda m: m.name)
def test_a_method_that_cannot_is_refused_in_words(method, capsys):
    line = refusal([f"async-{method.name}", "--config", "whatever"], capsys)
    assert f"{method.title} is not in TRL's asynchronous trainer, because {method.asynchronous}" in line
    assert f"use `{method.name}`, or async-dispo" in line


def test_help_shows_a_methods_fields(capsys):
    for row in ASYNCHRONOUS:
        assert cli.main([row.name, "--help"]) == 0
        page = capsys.readouterr().out
        assert f"{row.title} in TRL's asynchronous trainer" in page
        assert all(word in page for word in ("--step_control", "--local_lag", "async/dppo-qwen3-1.7b-math"))
