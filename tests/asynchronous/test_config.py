"""The configs of the asynchronous trainers: made of the synchronous ones, minus what cannot be there."""

import inspect
from dataclasses import fields

import pytest
from given_rows import async_config
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

import trl_trust
from trl_trust.asynchronous import trainers
from trl_trust.asynchronous.config import REFUSED, AsyncTrustGRPOConfig
from trl_trust.methods import ASYNCHRONOUS, METHODS, get_method
from trl_trust.policy.config import TrustGRPOConfig


def synchronous(row):
    return getattr(trl_trust, get_method(row.name.removeprefix("async-")).config)


@pytest.mark.parametrize("row", ASYNCHRONOUS, ids=lambda row: row.name)
def test_a_config_has_its_methods_fields(row):
    config, sync = getattr(trl_trust, row.config), synchronous(row)
    ours, theirs = ({f.name: f for f in fields(c)} for c in (config, sync))
    own = theirs.keys() - {f.name for f in fields(TrustGRPOConfig)}
    assert own and own <= ours.keys()
    for name in own:
        assert ours[name].default == theirs[name].default and ours[name].metadata == theirs[name].metadata
    assert ours.keys() - own == {f.name for f in fields(AsyncTrustGRPOConfig)}
    assert config.__name__ == row.config and getattr(trl_trust, row.trainer).config_class is config


@pytest.mark.parametrize("row", ASYNCHRONOUS, ids=lambda row: row.name)
def test_a_trainer_shows_the_parameters_of_trls(row):
    ours, theirs = (inspect.signature(c) for c in (getattr(trl_trust, row.trainer), AsyncGRPOTrainer))
    assert list(ours.parameters) == list(theirs.parameters)


def test_the_module_holds_what_the_table_says():
    made = {name for name in vars(trainers) if name.startswith("Async") and not name.startswith("AsyncTrust")}
    assert made == {name for row in ASYNCHRONOUS for name in (row.config, row.trainer)}
    assert all(method.asynchronous for method in METHODS if method.host == "grpo"), "a method that nobody looked at"
    assert REFUSED.keys() <= {row.name.removeprefix("async-") for row in ASYNCHRONOUS}


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("DISPO", {"select": "correct"}, "select='correct' is for the synchronous trainer: rewards do not reach"),
        ("DPPO", {"anchor": "old"}, "anchor='old' is for the synchronous trainer"),
        ("ETR", {"lambda_macro": 0.5}, "lambda_macro=0.5 is for the synchronous trainer"),
        ("DHPO", {"entropy_normalizer": "min_max"}, "entropy_normalizer='min_max' is for the synchronous trainer"),
        ("MDPO", {"level": "sequence"}, "level='sequence' is for the synchronous trainer"),
        ("MDPO", {"divergence": "full"}, "divergence='full' is for the synchronous trainer"),
        ("MDPO", {"max_steps": -1}, "max_steps=-1 must be set for step_size_schedule='linear'"),
        # the method's own checks, made by its synchronous config
        ("DISPO", {"epsilon_pos_low": -1.0}, "epsilon_pos_low=-1.0 must be"),
        ("DPPO", {"divergence": "js"}, "divergence='js' must be"),
        ("DPPO", {"epsilon": 0.1}, "epsilon=0.1: AsyncDPPOConfig does not read `epsilon`"),
        ("ETR", {"scale_min": 4.0}, "scale_min=4.0 must be"),
        ("DHPO", {"token_weight": 2}, "token_weight=2 must be"),
        ("MDPO", {"step_size": 0}, "step_size=0 must be"),
        ("MDPO", {"epsilon_high": 0.3}, "epsilon_high=0.3: AsyncMDPOConfig does not read"),
        # of the trainer
        ("TrustGRPO", {"max_staleness": -1}, "max_staleness=-1 must be a whole number >= 0"),
        ("TrustGRPO", {"weight_sync_steps": 0}, "weight_sync_steps=0 must be a whole number >= 1"),
        ("TrustGRPO", {"learning_rate": float("nan")}, "learning_rate=nan must be"),
        ("TrustGRPO", {"num_generations": 1}, "num_generations=1 must be"),
        ("TrustGRPO", {"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy=.*has no evaluation"),
        ("TrustGRPO", {"step_control": "stop"}, "step_control='stop' leaves out what remains of a generation"),
        ("TrustGRPO", {"step_control": "ess", "target_kl": 0.1}, "target_kl=0.1: .*step_control='kl' or 'backtrack'"),
        ("TrustGRPO", {"step_control": "kl", "step_scale_init": 2.0}, r"step_scale_init=2.0 must lie in \[step_scale"),
        ("TrustGRPO", {"step_control": "kl", "target_kl": 0.0}, "target_kl=0.0 must be a finite number > 0"),
    ],
)
def test_what_cannot_be_is_refused_in_words(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        async_config(getattr(trl_trust, f"Async{name}Config"), tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_a_plain_config_is_taken_for_the_defaults(tmp_path):
    plain = async_config(AsyncGRPOConfig, tmp_path, max_staleness=7)
    config = trl_trust.AsyncDPPOConfig.from_async_grpo_config(plain)
    assert type(config) is trl_trust.AsyncDPPOConfig and config.max_staleness == 7 and config.divergence == "tv"
    assert type(plain) is AsyncGRPOConfig
    for other in (
        async_config(trl_trust.AsyncMDPOConfig, tmp_path),
        TrustGRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
    ):
        with pytest.raises(ValueError, match="use AsyncDPPOConfig, or AsyncGRPOConfig"):
            trl_trust.AsyncDPPOConfig.from_async_grpo_config(other)
