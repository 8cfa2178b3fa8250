"""Step control in the asynchronous trainer: the ratios to the sampler (ess), or one update's before and after."""

import json
import math

import pytest
import torch
from given_rows import GivenRows, async_config, async_run, async_trainer, history, rows
from tiny import parameter_gap

from trl_trust import AsyncTrustGRPOConfig, AsyncTrustGRPOTrainer
from trl_trust.asynchronous.local import on_a_cpu


def steered(path, folder, given=None, **changes):
    args = async_config(AsyncTrustGRPOConfig, folder, **changes)
    return async_run(AsyncTrustGRPOTrainer, path, args, GivenRows(given or rows(80)))


def test_ess_is_the_root_of_the_share(tiny_model_path, tmp_path):
    given = rows(8)
    trainer = steered(tiny_model_path, tmp_path, given, step_control="ess", max_steps=1, learning_rate=1e-3)
    plain = steered(tiny_model_path, tmp_path, given, max_steps=1, learning_rate=1e-3)
    (record,), (without,) = history(trainer), history(plain)
    scale = record["trust/step_scale"]
    assert 1e-3 < scale < 1 and record["trust/step_lr"] == pytest.approx(scale * 1e-3)
    # SGD: the step is shortened by just this factor
    start = steered(tiny_model_path, tmp_path, given, max_steps=1, learning_rate=0.0).model
    moved = []
    for trained in (trainer, plain):
        pairs = zip(trained.model.parameters(), start.parameters(), strict=True)
        moved.append(sum((p - q).square().sum().item() for p, q in pairs))
    assert math.sqrt(moved[0] / moved[1]) == pytest.approx(scale, rel=1e-2)
    assert record["loss"] == without["loss"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_kl_holds_an_update_to_its_target(accumulation, tiny_model_path, tmp_path):
    """A rate that is far too high: after the first updates each moves the policy about as far as it may."""
    changes = dict(learning_rate=5.0, gradient_accumulation_steps=accumulation, max_steps=8)
    trainer = steered(tiny_model_path, tmp_path, rows(120), step_control="kl", target_kl=1e-3, **changes)
    free = steered(tiny_model_path, tmp_path, rows(120), **changes)
    kl = [record["trust/step_kl"] for record in history(trainer)]
    scales = [record["trust/step_scale"] for record in history(trainer)]
    assert scales[0] == 0.1 and all(record["trust/step_target"] == 1e-3 for record in history(trainer))
    assert max(kl[-3:]) < 3e-3 and kl[0] > 1e-3, (kl, scales)
    assert scales[-1] < scales[0]
    # against the sampler, which stayed behind, the free run has left
    assert history(free)[-1]["kl"] > 2 * history(trainer)[-1]["kl"]


def test_backtrack_takes_a_step_back(tiny_model_path, tmp_path):
    trainer = steered(tiny_model_path, tmp_path, step_control="backtrack", target_kl=1e-4, learning_rate=5.0)
    log = history(trainer)
    assert all(record["trust/step_scale"] < 1 for record in log) and len(log) == 3
    loose = steered(tiny_model_path, tmp_path, step_control="backtrack", target_kl=100.0, learning_rate=0.1)
    plain = steered(tiny_model_path, tmp_path, learning_rate=0.1)
    assert parameter_gap(loose.model, plain.model) == 0.0, "a bound that nothing meets changes nothing"


def test_the_controller_survives_a_resumed_run(tiny_model_path, tmp_path):
    changes = dict(step_control="kl", learning_rate=1.0, save_strategy="steps", save_steps=2)
    trainer = steered(tiny_model_path, tmp_path, max_steps=2, **changes)
    (folder,) = tmp_path.glob("checkpoint-*")
    state = json.loads((folder / "trl_trust_state.json").read_text())
    assert state["step_control"]["log_a"] == trainer.step_control.controller.log_a is not None
    args = async_config(AsyncTrustGRPOConfig, tmp_path, max_steps=3, **changes)
    again = async_trainer(AsyncTrustGRPOTrainer, tiny_model_path, args, GivenRows(rows(80)))
    with on_a_cpu():
        again.train(resume_from_checkpoint=str(folder))
    assert history(again)[-1]["trust/step_scale"] == pytest.approx(state["step_control"]["scale"])
    assert torch.isfinite(torch.tensor(history(again)[-1]["trust/step_kl"]))
