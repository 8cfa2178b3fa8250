"""What a checkpoint holds beside TRL's: resume inside a generation, and every way a file can be wrong."""

import json
import logging
import shutil
from importlib import import_module
from pathlib import Path

import layouts
import pytest
import torch
from tiny import parameter_gap, tiny_config, tiny_run, tiny_trainer

from trl_trust.distill.vpd import VPDConfig, VPDTrainer
from trl_trust.methods import get_method, hosted
from trl_trust.policy.base import TrustGRPOConfig, TrustGRPOTrainer
from trl_trust.policy.checkpoint import GENERATION_FILE, METHOD_STATE_FILE
from trl_trust.policy.mdpo import MDPOConfig, MDPOTrainer


VPD = {"e_step_every": 1, "success_reward_threshold": 0.2}  # which an untrained model meets now and then


def of_method(name):
    """Trainer, config, and the arguments of a method that test_layouts.py trains with."""
    method, extra = get_method(name), layouts.settings_of(name)
    module = import_module(method.module)
    config = {"opmd": {"loss_type": "grpo"}, "vpd": VPD}.get(name, {})
    return getattr(module, method.trainer), getattr(module, method.config), config, extra.get("trainer", {})


CASES = {
    **{method.name: lambda name=method.name: of_method(name) for method in hosted("grpo")},
    "grpo+kl": lambda: (TrustGRPOTrainer, TrustGRPOConfig, {"step_control": "kl"}, {}),
    "mdpo full": lambda: (MDPOTrainer, MDPOConfig, {"divergence": "full"}, {}),
    "vpd replace": lambda: (
        VPDTrainer,
        VPDConfig,
        {**VPD, "e_step_mode": "replace"},
        {"feedback_func": layouts.feedback},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_inside_a_generation_goes_on_as_it_would_have(case, tiny_model_path, tmp_path):
    trainer_class, config_class, settings, arguments = CASES[case]()

    def run(folder, resume=None, **changes):
        args = tiny_config(
            config_class,
            folder,
            **{"num_iterations": 2, "max_steps": 12, "save_strategy": "steps", "save_steps": 5, **settings, **changes},
        )
        trainer = tiny_trainer(trainer_class, tiny_model_path, args, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    saved = run(tmp_path / "whole", save_generation_state=True)  # 8 updates a generation
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    resumed = run(tmp_path / "resumed", checkpoint, save_generation_state=True)
    assert parameter_gap(saved.model, resumed.model) == 0.0
    losses = [[round(r["loss"], 6) for r in t.state.log_history if "loss" in r] for t in (saved, resumed)]
    assert losses[0] == losses[1]
    for file in Path(checkpoint).glob(GENERATION_FILE.format(rank="*")):
        file.unlink()
    lost = run(tmp_path / "lost", checkpoint)  # or the test would hold where nothing is kept
    assert parameter_gap(saved.model, lost.model) > 0.0


def test_without_it_one_line_says_what_is_lost(tiny_model_path, tmp_path, caplog):
    args = {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 5}
    tiny_run(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path, **args))
    assert not list((tmp_path / "checkpoint-5").glob(GENERATION_FILE.format(rank="*")))
    again = tiny_trainer(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path, **args))
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    (line,) = [r.getMessage() for r in caplog.records if "inside a generation" in r.getMessage()]
    assert "save_generation_state=True" in line and "multiple of 8" in line


def test_a_checkpoint_at_a_generations_end_holds_none(tiny_model_path, tmp_path):
    args = {"save_generation_state": True, "save_strategy": "steps", "save_steps": 4}
    tiny_run(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path, **args))
    assert not list((tmp_path / "checkpoint-4").glob(GENERATION_FILE.format(rank="*")))


@pytest.fixture(scope="module")
def steered(tiny_model_path, tmp_path_factory):
    """A checkpoint inside a generation of a run under step control."""
    folder = tmp_path_factory.mktemp("steered")
    settings = {"step_control": "kl", "save_generation_state": True, "save_strategy": "steps", "save_steps": 2}
    args = tiny_config(TrustGRPOConfig, folder, max_steps=2, **settings)
    tiny_run(TrustGRPOTrainer, tiny_model_path, args)
    return folder / "checkpoint-2"


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def of_another_method(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "DISPO"}))


def without_its_key(path):
    state = json.loads(path.read_text())
    del state["step_control"]["k"]
    path.write_text(json.dumps(state))


def of_two_processes(path):
    torch.save(torch.load(path, weights_only=True) | {"processes": 2}, path)


@pytest.mark.parametrize(
    ("file", "harm", "says"),
    [
        (METHOD_STATE_FILE, remove, "is missing"),
        (METHOD_STATE_FILE, cut, "is damaged"),
        (METHOD_STATE_FILE, empty, "is damaged"),
        (METHOD_STATE_FILE, without_its_key, "KeyError"),
        (METHOD_STATE_FILE, of_another_method, "was written by DISPO"),
        (GENERATION_FILE.format(rank=0), cut, "is damaged"),
        (GENERATION_FILE.format(rank=0), empty, "is damaged"),
        (GENERATION_FILE.format(rank=0), of_two_processes, "one of 2 processes"),
    ],
)
def test_a_harmed_file_is_one_line_that_names_it(file, harm, says, steered, tiny_model_path, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(steered, checkpoint)
    harm(checkpoint / file)
    args = tiny_config(TrustGRPOConfig, tmp_path, max_steps=4, step_control="kl")
    trainer = tiny_trainer(TrustGRPOTrainer, tiny_model_path, args)
    with pytest.raises(ValueError, match=says) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert str(checkpoint / file) in str(error.value) and "\n" not in str(error.value)
