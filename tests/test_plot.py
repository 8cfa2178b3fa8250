"""`trl-trust plot`: which runs are one line, what is drawn, and what a run leaves so that it can be."""

import json
import math

import pytest
import yaml

from trl_trust import cli, plot


def write_run(folder, command="grpo", seed=0, kept="trainer_state.json", steps=40, level=1.0, **settings):
    history = [
        {"step": step, "loss": 0.1, "entropy": level + seed, "trust/kl": level * (1 + step % 4), "trust/cut": None}
        | ({"reward": step / 40} if step % 4 == 1 else {})
        for step in range(1, steps + 1)
    ]
    history.append({"step": steps, "train_runtime": 1.0})
    state = folder / kept
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"global_step": steps, "log_history": history}))
    settings |= {"seed": seed, "output_dir": str(folder)}
    (folder / plot.RECIPE_FILE).write_text(f"# trl-trust {command}, as it was run\n{yaml.safe_dump(settings)}")
    return folder


def test_runs_that_differ_by_their_seed_are_one_line(tmp_path):
    folders = [write_run(tmp_path / f"a{seed}", seed=seed, learning_rate=1e-3) for seed in (0, 1)]
    folders += [write_run(tmp_path / "b", command="dispo", learning_rate=1e-3, epsilon_pos_low=0.5)]
    groups = plot.group_runs([plot.read_run(folder) for folder in folders])
    assert {label: len(runs) for label, runs in groups.items()} == {"grpo": 2, "dispo, epsilon_pos_low=0.5": 1}
    for folder in folders:  # without a recipe, only the folder's name tells
        (folder / plot.RECIPE_FILE).unlink()
    assert list(plot.group_runs([plot.read_run(folder) for folder in folders])) == ["a0", "a1", "b"]


def test_the_log_of_the_last_checkpoint_serves_too(tmp_path):
    write_run(tmp_path, kept="checkpoint-8/trainer_state.json", steps=8)
    write_run(tmp_path, kept="checkpoint-20/trainer_state.json", steps=20)
    run = plot.read_run(tmp_path)
    assert run.history[-1]["step"] == 20 and run.settings["command"] == "grpo"


def test_numbers_are_of_the_steps_that_all_runs_have():
    first = [{"step": 1, "x": 1.0}, {"step": 2, "x": math.nan}, {"step": 3, "x": 3.0}]
    second = [{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3, "x": 7.0}, {"step": 4, "x": 9.0}]
    histories = [first, second]
    assert plot.series(histories, "x") == ([1, 3], [[1.0, 2.0], [3.0, 7.0]])
    assert plot.smooth([0.0, 3.0, 6.0, 9.0], 3) == [1.5, 3.0, 6.0, 7.5]
    assert plot.smooth([0.0, 3.0], 1) == [0.0, 3.0]


def test_panels_fall_back_to_what_is_logged():
    chosen = plot.choose({"sft": [[{"step": 1, "loss": 1.0, "learning_rate": 0.1}]]})
    assert [metrics for _, metrics in chosen] == [("loss",), ("learning_rate",)]


def test_the_command_writes_both_pictures_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(write_run(tmp_path / f"run{seed}", seed=seed)) for seed in (0, 2)]
    folders.append(str(write_run(tmp_path / "other", command="dispo", level=3.0)))
    assert cli.main(["plot", *folders]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["entropy"] == ["2", "3"] and rows["seeds"] == ["2", "1"] and rows["trust/cut"] == ["-", "-"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG") and "<svg" in (
        tmp_path / "plot.svg"
    ).read_text()
    assert cli.main(["plot", folders[0], "--metrics", "trust/kl", "--output", "pictures/kl.png"]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["kl.png", "kl.svg"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "'nowhere': no such folder"),
        (["."], "has no trainer_state.json, nor has a checkpoint in it; give its runs, run"),
        (["run", "--metrics", "rewards"], "metrics='rewards' is not logged by these runs; did you mean 'reward'?"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plot", *words])
    assert exit_.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
