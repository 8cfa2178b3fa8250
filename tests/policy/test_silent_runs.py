"""Runs that would end well and have learned nothing."""

import logging

import pytest
from tiny import tiny_config, tiny_run, tiny_trainer

from trl_trust.policy.base import TrustGRPOConfig, TrustGRPOTrainer
from trl_trust.policy.dispo import DISPOConfig, DISPOTrainer
from trl_trust.quickstart.task import problems


def test_a_data_set_smaller_than_a_generation_batch_is_refused(tiny_model_path, tmp_path):
    args = tiny_config(DISPOConfig, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has 3 rows, and a generation batch takes 4 prompts") as error:
        tiny_trainer(DISPOTrainer, tiny_model_path, args, train_dataset=problems("train", 3))
    assert "generation_batch_size=16 / num_generations=4" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))  # the folder alone is made by then
    tiny_trainer(DISPOTrainer, tiny_model_path, args, train_dataset=problems("train", 4))


@pytest.mark.parametrize(
    ("settings", "reward", "reason"),
    [
        ({}, lambda completions, **kwargs: [1.0] * len(completions), "in no group did the rewards differ"),
        ({}, lambda completions, **kwargs: [None] * len(completions), "in no group did the rewards differ"),
        (
            {"mask_truncated_completions": True, "max_completion_length": 1},
            lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))],
            "every completion was masked",
        ),
    ],
)
def test_a_run_without_gradient_says_so(settings, reward, reason, tiny_model_path, tmp_path, caplog):
    args = tiny_config(TrustGRPOConfig, tmp_path, **settings)
    with caplog.at_level(logging.WARNING):
        tiny_run(TrustGRPOTrainer, tiny_model_path, args, reward_funcs=reward)
    (line,) = [r.getMessage() for r in caplog.records if "had a gradient" in r.getMessage()]
    assert "No update of 4 had a gradient" in line and reason in line


def test_a_run_that_learns_does_not(tiny_model_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_run(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    assert not [r for r in caplog.records if "had a gradient" in r.getMessage()]
