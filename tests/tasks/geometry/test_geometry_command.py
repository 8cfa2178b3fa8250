"""The command line of the room, and its recipes as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset

from trl_trust import cli, script
from trl_trust.evaluation.report import TrustReport
from trl_trust.evaluation.tiny import build_model, build_tokenizer
from trl_trust.tasks.geometry.command import main, read, settings_of


FOLDER = Path(__file__).parents[3] / "recipes" / "geometry"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry") / "data"
    assert main(["build", "--n", "8", "--set", "trace=backtrack", "max_steps=8", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_build_verify_and_a_build_that_was_stopped(data, capsys):
    assert main(["verify", str(data)]) == 0
    assert len(load_dataset(str(data), split="train")) == 8  # the folder as a recipe names it
    before = json.loads((data / "MANIFEST").read_text())
    (data / "part-00000.parquet").unlink()
    words = ["build", "--n", "8", "--set", "trace=backtrack", "max_steps=8", "--workers", "2", "--out", str(data)]
    assert main(words) == 0 and json.loads((data / "MANIFEST").read_text()) == before
    assert before["rows"] == 8 and before["digest"] in (data / "README.md").read_text()


def test_verify_names_the_first_bad_row(data, tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    rows = read(data)
    rows[3]["answer"] += "1"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "part-00000.parquet")
    assert main(["verify", str(tmp_path)]) == 1
    assert f"row 3 ({rows[3]['scene_id']}): " in capsys.readouterr().out


def test_show(capsys):
    assert main(["show", "3"]) == 0
    first = capsys.readouterr().out
    assert "\\boxed{" in first and "canonical form" in first
    assert main(["show", "3"]) == 0 and capsys.readouterr().out == first


def test_eval_writes_a_report(data, model, tmp_path):
    report = tmp_path / "report.json"
    words = ["eval", "--model", str(model), "--data", str(data), "--max-new-tokens", "8", "--out", str(report)]
    assert main(words) == 0
    scores = {score.name: score for score in TrustReport.from_json(report.read_text()).scores}
    assert scores["accuracy"].n == 8 and {row["tier"] for row in read(data)} == {
        int(n[-1]) for n in scores if "tier" in n
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--n", "0", "--out", "x"], "--n 0: at least 1"),
        (["build", "--split", "dev", "--out", "x"], "--split dev: choose from train, eval, test"),
        (["build", "--set", "max_step=4", "--out", "x"], "did you mean 'max_steps'"),
        (["build", "--set", "max_steps", "--out", "x"], "did you mean 'max_steps'"),
        (["build", "--set", "min_steps=0", "--out", "x"], "min_steps=0"),
        (["verify", "nowhere"], "holds no part-"),
    ],
)
def test_mistakes_are_told(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        main(words)


def test_another_recipe_in_the_same_folder_is_refused(data):
    with pytest.raises(ValueError, match="begun with n=8: give another --out"):
        main(["build", "--n", "9", "--set", "trace=backtrack", "max_steps=8", "--out", str(data)])


def test_settings_from_words():
    settings = settings_of(["kinds=angle,length", "clauses=[1,2]", "trace=multi"])
    assert (settings.kinds, settings.clauses, settings.trace) == (("angle", "length"), (1, 2), "multi")


SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "warmup_steps": 0,
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def shrunk(name, data, model, tmp_path, **more):
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    names = {"model_name_or_path": str(model), "dataset_name": str(data), "output_dir": str(tmp_path / "out")}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**recipe, **SMALL, **names, **more}))
    return str(path)


def test_the_grpo_recipe_trains_on_both_rewards(data, model, tmp_path, monkeypatch):
    ran, trainers = script.run, []

    def run(trainer, *rest):
        trainers.append(trainer)
        ran(trainer, *rest)

    monkeypatch.setattr(script, "run", run)
    small = {"use_vllm": False, "num_generations": 2, "steps_per_generation": 2, "max_completion_length": 8}
    small |= {"mask_truncated_completions": False}
    path = shrunk("qwen3-1.7b-dispo", data, model, tmp_path, **small)
    assert cli.main(["dispo", "--config", path], launch=False) == 0
    (log,) = [record for record in trainers[0].state.log_history if "loss" in record]
    assert log["rewards/geometry_reward/mean"] == 0 and log["rewards/geometry_step_reward/mean"] == 0


def test_the_sft_recipe_trains_on_traces(data, model, tmp_path):
    path = shrunk("sft-traces", data, model, tmp_path)
    command = [
        sys.executable,
        "-c",
        "from trl_trust.cli import main; raise SystemExit(main())",
        "sft",
        "--config",
        path,
    ]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_recipes_say_that_they_were_not_run():
    for path in FOLDER.glob("*.yaml"):
        assert path.read_text().splitlines()[0].endswith("NOT RUN.")
