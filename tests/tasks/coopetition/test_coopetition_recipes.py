"""The recipes by the command line, as a user starts them; and the game in a single turn under RLOO."""

import json
import math
from pathlib import Path

import pytest
import yaml
from trl import RLOOConfig, RLOOTrainer

from trl_trust import cli, script
from trl_trust.methods import get_method
from trl_trust.tasks.coopetition import coopetition_dataset, coopetition_env_factory, invest_reward
from trl_trust.tasks.coopetition.command import main
from trl_trust.tasks.coopetition.game import Game
from trl_trust.tasks.coopetition.start import build_start


FOLDER = Path(__file__).parents[3] / "recipes" / "coopetition"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_data_and_start_are_what_the_recipe_names(tmp_path, capsys):
    assert main(["data", "--n", "5", "--partners", "grim", "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["partner"] for row in rows} == {"grim"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, tmp_path, monkeypatch):
    start = build_start(tmp_path / "start", Game(rounds=8), steps=30, batch_size=4)
    coopetition_dataset(8).to_json(start / "train.jsonl")
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert "environment" in recipe and recipe["max_tool_calling_iterations"] > recipe["environment_options"]["rounds"]
    small = {
        "model_name_or_path": str(start),
        "dataset_name": str(start / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "num_generations": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 2,
        "max_steps": 1,
        "warmup_steps": 0,
        "max_completion_length": 128,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "use_vllm": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**recipe, **small}))
    ran, trainers = script.run, []

    def recording_run(trainer, *rest):
        trainers.append(trainer)
        ran(trainer, *rest)

    monkeypatch.setattr(script, "run", recording_run)
    assert cli.main(["dispo", "--config", str(tmp_path / "small.yaml")], launch=False) == 0
    (log,) = [record for record in trainers[0].state.log_history if "loss" in record]
    assert log["coopetition/rounds_played"] > 0 and "rewards/CoopetitionEnv/mean" in log


def test_the_real_models_recipe_says_that_it_was_not_run():
    assert "NOT RUN" in (FOLDER / "qwen3-1.7b-dispo.yaml").read_text().splitlines()[0]
    rough = coopetition_env_factory(rounds=8).grpo_kwargs()["max_completion_length"]
    assert yaml.safe_load((FOLDER / "qwen3-1.7b-dispo.yaml").read_text())["max_completion_length"] >= rough


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"environment": "trl_trust.tasks.coopetition.nothing"}, "environment=.*cannot be imported"),
        ({"environment_options": {"rounds": 8}}, "`environment`, which is not set"),
        ({"environment": "a.b", "environment_options": "{"}, "environment_options='{' is no JSON"),
        ({"environment": "a.b", "environment_options": 3}, "must map names to values"),
    ],
)
def test_a_wrong_environment_is_refused_in_words(options, words, tmp_path):
    start = tmp_path / "rows.jsonl"
    start.write_text('{"prompt": "x"}')
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(tmp_path),
                "dataset_name": str(start),
                "use_cpu": True,
                "bf16": False,
                **options,
            }
        )
    )
    with pytest.raises(ValueError, match=words):
        script.prepare(
            ["--config", str(tmp_path / "r.yaml"), "--output_dir", str(tmp_path / "o")], get_method("dispo")
        )


def test_a_single_turn_under_rloo(tmp_path):
    start = build_start(tmp_path / "start", Game(rounds=8), steps=2, batch_size=2)
    data = coopetition_dataset(4, mode="single", rounds=2)
    args = RLOOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = RLOOTrainer(str(start), invest_reward, args, train_dataset=data)
    trainer.train()
    log = trainer.state.log_history[0]
    # two rounds leave little between the myopic plan, 0, and the best, 1: a bad answer is far below
    assert math.isfinite(log["rewards/invest_reward/mean"]) and log["rewards/invest_reward/mean"] <= 1
