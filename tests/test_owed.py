"""A method is one module and one row; what else it owes is named, piece by piece, by [`owed`]."""

from importlib import import_module
from pathlib import Path

import pytest
from owed import owed
from tiny import digits_reward

from trl_trust import cli, methods
from trl_trust.methods import METHODS, Method


STRANGER = Method(
    name="cautious",
    title="Cautious GRPO",
    module="tests.stranger",  # found in this repository, as the help page finds modules
    trainer="CautiousTrainer",
    config="CautiousConfig",
    paper="2602.99999",
    grade="inspired",
    summary="GRPO in which tokens count less where the policy is sure",
    loss="cautious_loss",
)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_a_method_owes_nothing(row):
    assert owed(row) == []


@pytest.fixture
def stranger(monkeypatch):
    """A method that somebody has just added: a module and a row."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    for module in (methods, cli):
        monkeypatch.setattr(module, "METHODS", (*METHODS, STRANGER))
    return import_module(STRANGER.module)


def test_a_module_under_60_lines_and_a_row_are_in_the_command_line_and_train(
    stranger, tiny_model_path, tmp_path, capsys
):
    assert len(Path(stranger.__file__).read_text().splitlines()) < 60
    assert cli.main(["methods"]) == 0
    assert "cautious" in capsys.readouterr().out
    assert cli.main(["cautious", "--help"]) == 0
    assert "--sure_weight (0.5)" in capsys.readouterr().out

    (tmp_path / "data.jsonl").write_text("\n".join(f'{{"prompt": "{a}+1="}}' for a in range(8)))
    words = f"cautious --model_name_or_path {tiny_model_path} --dataset_name {tmp_path / 'data.jsonl'} --use_cpu "
    words += (
        f"--output_dir {tmp_path / 'out'} --reward_funcs tiny.{digits_reward.__name__} --max_steps 2 --bf16 false "
    )
    words += "--per_device_train_batch_size 4 --num_generations 4 --steps_per_generation 2 --logging_steps 1 "
    words += "--max_completion_length 8 --report_to none --learning_rate 1e-2 --gradient_checkpointing false "
    assert cli.main(words.split(), launch=False) == 0
    assert "'cautious/weight'" in capsys.readouterr().out.replace('"', "'")
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--sure_weight", "2"], launch=False)
    assert "sure_weight=2.0 must be a number in [0, 1]" in capsys.readouterr().err


def test_each_missing_piece_is_named(stranger):
    lines = owed(STRANGER)
    for piece in (
        "trl_trust/__init__.py: under TYPE_CHECKING",
        "trl_trust/methods.py: asynchronous=",
        "README.md: the row `| [Cautious GRPO](docs/cautious.md) | 2602.99999 | inspired | GRPO in which",
        "docs/cautious.md: the page",
        "recipes/cautious/: two recipes",
        "tests/: test_cautious.py",
    ):
        (line,) = [line for line in lines if line.startswith(piece)]
        lines.remove(line)
    assert lines == []


def test_a_row_that_names_what_is_not_there_is_told_so(stranger, monkeypatch):
    monkeypatch.setattr(stranger.CautiousTrainer, "_paper", {"id": "1"})
    monkeypatch.setattr(stranger.CautiousTrainer, "_tag_names", [])
    assert {line.split(" ", 1)[1] for line in owed(STRANGER) if line.startswith("tests.stranger")} == {
        "CautiousTrainer._paper is not `paper(title, '2602.99999', authors)`",
        "CautiousTrainer._tag_names lacks 'cautious'",
    }
    monkeypatch.delattr(stranger, "cautious_loss")
    assert "tests.stranger: no cautious_loss, which the row names" in owed(STRANGER)
