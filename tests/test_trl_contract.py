"""The alarm: the installed TRL is the one that `trl_trust.policy.base` was written against.

The base re-does what `GRPOTrainer._compute_loss` does, and relies on the schedule and the keys of the other methods
below. If one of them changes, tests that compare with stock TRL may still pass while an option is silently lost. So a
change of their source, even of a comment, fails here and says what to do.
"""

import hashlib
import inspect
import re
import subprocess
import sys

import pytest
import trl
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental import async_grpo
from trl.experimental.async_grpo import async_grpo_trainer, packing

from trl_trust.policy.base import MULTIMODAL_INPUTS, TrustGRPOConfig, TrustGRPOTrainer
from trl_trust.support import check_trl


WRITTEN_AGAINST = "1.16.0"
RELIES_ON = {
    "compute_loss": "a2d6ef8bd29c3e26",
    "_compute_loss": "80295546bbdbf6f7",
    "_prepare_inputs": "f824e7fb07147956",
    "_calculate_rewards": "736ae29b083840b5",
    "_generate_and_score_completions": "1fa48922792dcd5c",
    "log": "1e7772819cc8cf09",
}


def fingerprint(function) -> str:
    # the text, not the syntax tree: how a tree prints depends on the Python version
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", RELIES_ON)
def test_trl_has_not_changed_under_us(name):
    found = fingerprint(getattr(GRPOTrainer, name))
    assert found == RELIES_ON[name], (
        f"GRPOTrainer.{name} of the installed TRL {trl.__version__} differs from TRL {WRITTEN_AGAINST}, which "
        f"trl_trust/policy/base.py was written against. Read what changed, carry it over to TrustGRPOTrainer, extend "
        f"OPTIONS in tests/policy/test_base.py if an option is new, and only then write {found!r} here."
    )


# what trl_trust/asynchronous relies on
ASYNC_RELIES_ON = {
    "compute_loss": "5c0c485d130acb07",
    "get_train_dataloader": "2950938428f1c183",
    "log": "f16119a908c28611",
    "_sync_weight_merged": "ab2541763c20cba1",
}
ASYNC_MODULE_RELIES_ON = {
    async_grpo_trainer._reduce_metric: "87342ac2f9c63f11",
    async_grpo_trainer.RolloutQueueDataset.__iter__: "d92a084c61a3511c",
    async_grpo_trainer.DataCollatorForRollout.torch_call: "fc1ce59367d57b6f",
    async_grpo_trainer.FixedCountBatcher.__iter__: "121e176022912d3b",
    async_grpo_trainer.TokenBudgetBatcher: "ae55ae5b53839a6b",
    async_grpo.async_rollout_worker.RolloutSample: "2b9590d047cf4810",
    packing.TreeRow.pack: "c33de3e4ab8253f0",
    packing.tree_attention: "558ae72eccb3310e",
}


@pytest.mark.parametrize(
    "function, expected",
    [
        *((getattr(async_grpo.AsyncGRPOTrainer, name), expected) for name, expected in ASYNC_RELIES_ON.items()),
        *ASYNC_MODULE_RELIES_ON.items(),
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_the_asynchronous_trainer_has_not_changed_under_us(function, expected):
    """What trl_trust/asynchronous reads: the flat tensors and the accounting around one call of the model, the queue
    that its dataset reads, and how metrics are joined."""
    found = fingerprint(function)
    assert found == expected, (
        f"{function.__qualname__} of TRL {trl.__version__} differs from TRL {WRITTEN_AGAINST}: read trl_trust/"
        f"asynchronous against it, run tests/asynchronous, and only then write {found!r}."
    )


def test_what_a_cpu_replaces_is_where_it_is_replaced():
    assert {"get_peak_flops_per_device", "VLLMClient"} <= set(vars(async_grpo_trainer)) and packing._flash_attn
    source = inspect.getsource(async_grpo.AsyncGRPOTrainer.__init__)
    assert "self.rollout_queue = self.rollout_worker.rollout_buffer" in source


# the first of transformers 5.23 and 5.24, the second of 5.10, which has no norm over several device meshes
@pytest.mark.parametrize("name, expected", [("_get_grad_norm", ["913ba6f52f074d10", "159a31c7dfa2beaa"])])
def test_transformers_has_not_changed_under_us(name, expected):
    """What trl_trust/steps.py touches of `Trainer`: called once an update, between clipping and the step."""
    found = fingerprint(getattr(Trainer, name))
    assert found in expected, f"Trainer.{name} has changed: read trl_trust/steps.py against it, then write {found!r}."


# what trl_trust/flow/sage.py replaces; that `Trainer` still calls it so, tests/flow/test_flow_runs.py sees: it resumes
REPLACED_BY_FLOW = {
    "_prepare_inputs": ["self", "inputs"],
    "_save": ["self", "output_dir", "state_dict"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_get_output_dir": ["self", "trial"],
}


@pytest.mark.parametrize("name", REPLACED_BY_FLOW)
def test_what_the_flow_trainer_replaces_is_called_as_before(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == REPLACED_BY_FLOW[name]


def test_the_alarm_can_ring():
    class Changed(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, inputs) * 1.0

    assert fingerprint(Changed._compute_loss) != RELIES_ON["_compute_loss"]


def test_every_multimodal_input_is_known():
    parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    ours = {"self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"}
    assert set(parameters) - ours - {"compute_entropy", "compute_aux_loss"} == set(MULTIMODAL_INPUTS)


def test_the_loss_reads_no_config_field_that_the_base_does_not_know():
    """Fields of GRPOConfig that stock's loss names: each is honoured by the base or refused by its config."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    base = "".join(inspect.getsource(inspect.getmodule(ours)) for ours in (TrustGRPOTrainer, TrustGRPOConfig))
    fields = [name for name in GRPOConfig.__dataclass_fields__ if f"args.{name}" in source]
    assert len(fields) > 5
    assert [name for name in fields if name not in base] == []


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "1.160.0", "2.0.0.dev0"])
def test_an_unread_trl_is_refused_in_one_line(version):
    with pytest.raises(
        ImportError, match=re.escape(f"trl=={version} is installed") + r".*pip install 'trl~=1\.16\.0'"
    ):
        check_trl(version)


def test_an_unread_trl_is_refused_where_a_trainer_is_imported():
    code = """
import importlib.metadata as m
real, m.version = m.version, lambda name: "1.17.3" if name == "trl" else real(name)
from trl_trust import {}
"""
    for name, refused in {"DISPOTrainer": True, "ERPDConfig": True, "AuON": False}.items():
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True)
        assert ("ImportError: trl==1.17.3 is installed" in done.stderr) == refused == (done.returncode != 0), (
            done.stderr
        )
