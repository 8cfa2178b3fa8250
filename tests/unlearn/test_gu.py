"""The trainer: what a step hands to the optimizer, and that layouts, resumes and adapters change nothing."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import on_two_processes
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from trl_trust.unlearn import GUConfig, GUTrainer, load_unlearning
from trl_trust.unlearn.data import ForgetRetainDataset, PairCollator
from trl_trust.unlearn.gu import Epochs
from trl_trust.unlearn.losses import FORGET_LOSSES, answer_logps, nll_loss
from trl_trust.unlearn.offline import knowledge


BASE = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=1,
    max_steps=3,
    per_device_train_batch_size=10,
    learning_rate=3e-4,
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
)


def build(path, tmp, trainer=GUTrainer, data=None, **settings):
    kwargs = {k: settings.pop(k) for k in ("peft_config", "callbacks", "eval_dataset") if k in settings}
    call = settings.pop("call", None)
    if call is not None:
        kwargs["forget_loss"] = call
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    args = GUConfig(output_dir=str(tmp), **{**BASE, **settings})
    data = load_unlearning("facts").train if data is None else data
    return trainer(model, args, data, AutoTokenizer.from_pretrained(path), **kwargs)


def weights(trainer):
    return parameters_to_vector(trainer.model.parameters()).detach()


class Plain(Trainer):
    """The plain procedure, as one would write it."""

    def compute_loss(self, model, inputs, **kwargs):
        forget, retain = (
            nll_loss(*answer_logps(model(**inputs[side]).logits, inputs[side]["labels"]))
            for side in ("forget", "retain")
        )
        return -forget + retain


def test_off_is_the_plain_procedure_to_the_bit(knowing, tmp_path):
    trainer = build(knowing, tmp_path, gu_mode="off", gradient_accumulation_steps=2, per_device_train_batch_size=5)
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(knowing, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(knowing)
    plain = Plain(model, trainer.args, PairCollator(tokenizer), load_unlearning("facts").train)
    plain.model_accepts_loss_kwargs = False
    plain.add_callback(Epochs(plain.train_dataset))
    plain.train()
    assert torch.equal(weights(trainer), weights(plain))
    assert (weights(plain) - parameters_to_vector(build(knowing, tmp_path).model.parameters())).abs().max() > 1e-4


class Recorder(TrainerCallback):
    """Keeps what the optimizer is handed."""

    def __init__(self):
        self.grads, self.trainer = [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]).double())


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_what_the_optimizer_gets_is_orthogonal_to_all_covectors(knowing, tmp_path, metric):
    seen, recorder = [], Recorder()

    class Watched(GUTrainer):
        def _project(self, forget, retain, covectors):
            out = super()._project(forget, retain, covectors)
            seen.append((out.double(), covectors.double().clone(), self.metric().double()))
            return out

    trainer = build(
        knowing,
        tmp_path,
        Watched,
        gu_metric=metric,
        alpha=0.0,
        max_steps=4,
        gu_rank=2,
        max_grad_norm=1.0,
        callbacks=[recorder],
    )
    trainer.train()
    assert [covectors.shape[1] for _, covectors, _ in seen] == [1, 2, 3, 3]
    for (projected, covectors, P), handed in zip(seen, recorder.grads, strict=True):
        slopes = covectors.T @ (P * handed)
        sizes = (P[:, None] * covectors**2).sum(0).sqrt() * (P * handed**2).sum().sqrt()
        assert (slopes / sizes).abs().max() < 1e-5  # clipping is one factor, so it survives
        assert torch.nn.functional.cosine_similarity(projected, handed, 0) > 1 - 1e-6
    if metric == "adam":
        assert seen[0][2].unique().numel() == 1 and seen[1][2].unique().numel() > 100
    logged = trainer.state.log_history[1]
    assert {"gu/residual", "gu/coverage", "gu/forget_kept", "gu/step_norm", "forget/loss"} <= logged.keys()
    assert 0 < logged["gu/forget_kept"] < 1


def test_joint_step_moves_the_retain_loss_as_retain_training_does(knowing, tmp_path):
    slopes = {}

    class Watched(GUTrainer):
        def _write(self, flat):
            retain = self._buffers["retain"].double()
            slopes[self.args.weights["alpha"]] = (retain @ flat.double(), retain @ retain)
            super()._write(flat)

    for alpha in (0.5, 2.0):
        build(knowing, tmp_path, Watched, alpha=alpha, max_steps=1).train()  # the first metric is the identity
        got, whole = slopes[alpha]
        assert got.item() == pytest.approx(alpha * whole.item(), rel=1e-3)


@pytest.mark.parametrize("name", [*FORGET_LOSSES, "callable"])
def test_every_loss_forgets(knowing, tmp_path, name):
    settings = {"forget_loss": name, "max_steps": 4, "learning_rate": 1e-3}
    if name == "rmu":
        settings |= {"rmu_layer": 0, "rmu_scale": 20.0}
    if name == "callable":
        settings |= {"forget_loss": "graddiff", "call": lambda model, ref, x: -model(**x["forget"]).loss}
    trainer = build(knowing, tmp_path, **settings)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(20)])
    before = knowledge(trainer.model, batch["forget"])[0]
    trainer.train()
    after = knowledge(trainer.model, batch["forget"])[0]
    assert after > before, "the facts to be forgotten are known less"
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    if name == "callable":
        other = build(knowing, tmp_path, max_steps=4, learning_rate=1e-3)
        other.train()
        assert (weights(trainer) - weights(other)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"gu_mode": "sign"},
        {"gu_mode": "cone"},
        {"gu_mode": "cone", "gu_stage": "delta"},
        {"gu_mode": "cone", "gu_stage": "delta", "gu_finite_budget": 0.0},
        {"gu_stage": "delta", "alpha": 0.0},
        {"gu_scope": "per_tensor"},
        {"gu_retain_signal": "kl_ref_theta"},
        {"gu_params": ["mlp"]},
        {"gu_params": ["mlp"], "gu_freeze_others": False},
        {"bf16": True},
    ],
    ids=str,
)
def test_every_mode_trains(knowing, tmp_path, settings):
    trainer = build(knowing, tmp_path, **settings)
    start = weights(trainer).clone()
    trainer.train()
    moved = (weights(trainer) - start).abs()
    assert moved.isfinite().all() and trainer.state.global_step == 3
    if settings.get("gu_finite_budget") is None:
        assert moved.max() > 1e-5
    if settings == {"gu_params": ["mlp"]}:
        names = {k for k, p in trainer.model.named_parameters() if p.requires_grad}
        assert names and all("mlp" in name for name in names)
    if settings.get("bf16"):
        assert next(trainer.model.parameters()).dtype == torch.float32


def test_delta_stage_binds_the_realized_step(knowing, tmp_path):
    cosines = {}
    for stage in ("grad", "delta"):

        class Watched(GUTrainer):
            def _remember(self, retain):
                self.seen = retain.double().clone()
                super()._remember(retain)

        class Steps(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                self.before = parameters_to_vector(model.parameters()).detach().double().clone()

            def on_step_end(self, args, state, control, model=None, **kwargs):
                moved = parameters_to_vector(model.parameters()).detach().double() - self.before
                cosines[stage] = torch.nn.functional.cosine_similarity(moved, trainer.seen, 0).abs().item()  # noqa: B023

        trainer = build(knowing, tmp_path, Watched, gu_stage=stage, alpha=0.0, callbacks=[Steps()])
        trainer.train()
    assert cosines["delta"] < 1e-4 < cosines["grad"]


def test_accumulation_is_one_large_batch(knowing, tmp_path):
    one = build(knowing, tmp_path, per_device_train_batch_size=4)
    one.train()
    four = build(knowing, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    four.train()
    assert (weights(one) - weights(four)).abs().max() < 5e-5


def test_resume_repeats_the_uninterrupted_run(knowing, tmp_path):
    settings = {"max_steps": 8, "gu_rank": 3, "save_strategy": "steps", "save_steps": 5}
    whole = build(knowing, tmp_path / "a", **settings)
    whole.train()
    again = build(knowing, tmp_path / "a", **settings)
    checkpoint = tmp_path / "a" / "checkpoint-5"  # within an epoch, and the history has gone round
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole), weights(again))
    assert torch.equal(whole.history, again.history) and again.projections == 8
    for rank, kept in ((2, 2), (6, 3), (0, 0)):
        other = build(knowing, tmp_path / "b", gu_rank=rank)
        other._take_up(str(checkpoint / "gu_history.safetensors"))
        assert other.history.shape[0] == kept and (other.history.norm(dim=1) - 1).abs().sum() < 1e-3
    os.remove(checkpoint / "gu_history.safetensors")
    with pytest.raises(ValueError, match="holds no gu_history"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_lora_takes_the_model_without_adapter_as_reference(knowing, tmp_path):
    from peft import LoraConfig

    trainer = build(
        knowing,
        tmp_path,
        forget_loss="npo",
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        learning_rate=1e-2,
    )
    assert trainer.ref_model is None
    trainer.train()
    logs = [entry["forget/loss"] for entry in trainer.state.log_history if "forget/loss" in entry]
    assert logs[0] == pytest.approx(13.862944, abs=1e-4)  # at the start policy and reference agree
    assert logs[-1] < logs[0] - 1e-3
    trainer.save_model(str(tmp_path / "adapter"))
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    batch = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    torch.testing.assert_close(loaded(**batch).logits, trainer.model.eval()(**batch).logits)


def test_a_gradient_that_is_not_finite_changes_nothing(knowing, tmp_path):
    def sometimes(model, ref, inputs):
        loss = -model(**inputs["forget"]).loss
        return loss * float("nan") if trainer.state.global_step == 1 else loss

    trainer = build(knowing, tmp_path, call=sometimes)
    trainer.train()
    assert weights(trainer).isfinite().all() and trainer.projections == 2
    counts = [e["trust/skipped_nonfinite"] for e in trainer.state.log_history if "loss" in e]
    assert counts == [0, 1, 1] and trainer.history.shape[0] == 2


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"gu_rank": 9}, "gu_rank=9"),
        ({"gamma": 0.0, "alpha": 0.0}, "gamma"),
        ({"gu_stage": "delta"}, "gu_mode='null'"),
        ({"gu_stage": "delta", "gu_mode": "sign"}, "gu_mode='sign'"),
        ({"gu_finite_budget": 0.1}, "gu_finite_budget=0.1"),
        ({"beta": 0.5}, "beta=0.5"),
        ({"gu_residual_tol": 1.0}, "gu_residual_tol=1.0"),
        ({"fp16": True}, "fp16=True"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"gu_params": ["nothing"]}, "gu_params='nothing'"),
        ({"optim": "adafactor"}, "optim='adafactor'"),
        ({"forget_loss": "rmu"}, "rmu_layer=7"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_settings_are_refused_in_words(knowing, tmp_path, settings, words):
    with pytest.raises(ValueError) as error:
        build(knowing, tmp_path, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bad_data_are_refused_in_words(knowing, tmp_path):
    data = load_unlearning("facts")
    with pytest.raises(ValueError, match="forget split is empty"):
        ForgetRetainDataset(data.forget.select([]), data.retain)
    with pytest.raises(ValueError, match="1 rows are both"):
        ForgetRetainDataset(data.forget, copy.copy(data.retain).add_item(data.forget[0]))
    with pytest.raises(ValueError, match="no column 'answer'; it has"):
        ForgetRetainDataset(data.forget.remove_columns("answer"), data.retain)
    bare = ForgetRetainDataset(data.forget.remove_columns("alternate"), data.retain)
    with pytest.raises(ValueError, match="forget split has no column 'alternate'"):
        build(knowing, tmp_path, data=bare, forget_loss="dpo")


def test_pairs_that_are_held_out_are_evaluated(knowing, tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "logging_steps": 1, "gu_mode": "null"}
    data = load_unlearning("facts")
    held = ForgetRetainDataset(data.forget.select(range(5)), data.retain.select(range(5)))
    trainer = build(knowing, tmp_path, eval_dataset=held, **args)
    trainer.train()
    (found,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert found["eval_loss"] == pytest.approx(found["eval_forget/loss"] + found["eval_retain/loss"], abs=1e-6)
    assert found["eval_forget/loss"] < 0 < found["eval_retain/loss"] and "forget/loss" not in found


def test_without_a_forget_loss_it_is_retain_training(knowing, tmp_path):
    trained = [build(knowing, tmp_path, gamma=0.0, gu_mode=mode) for mode in ("null", "off")]
    for trainer in trained:
        trainer.train()
    assert (weights(trained[0]) - weights(trained[1])).abs().max() < 1e-5


WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from tiny import leave
from unlearn.test_gu import build, weights
for mode in ("null", "off"):
    trainer = build({path!r}, {tmp!r}, gu_mode=mode, per_device_train_batch_size=2, ddp_backend="gloo", max_steps=3)
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(weights(trainer), {out!r} + mode)
leave()
"""


def environment(tests: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}


def test_two_processes_are_one(knowing, tmp_path):
    tests, out = Path(__file__).parent.parent, str(tmp_path / "two-")
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(tests), path=knowing, tmp=str(tmp_path), out=out))
    on_two_processes(script, timeout=500)
    for mode in ("null", "off"):
        one = build(knowing, tmp_path, per_device_train_batch_size=4, gu_mode=mode)
        one.train()
        assert (weights(one) - torch.load(out + mode)).abs().max() < 5e-5


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from transformers import TrainerCallback
from unlearn.test_gu import build

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

build({path!r}, {tmp!r}, max_steps=8, gu_rank=3, save_strategy="steps", save_steps=5, callbacks=[Kill()]).train()
"""


def test_a_killed_run_is_resumed(knowing, tmp_path):
    tests = Path(__file__).parent.parent
    settings = {"max_steps": 8, "gu_rank": 3, "save_strategy": "steps", "save_steps": 5}
    code = KILLED.format(tests=str(tests), path=knowing, tmp=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", code], timeout=500, env=environment(tests), capture_output=True)
    assert done.returncode == -9
    again = build(knowing, tmp_path / "killed", **settings)
    again.train(resume_from_checkpoint=True)
    whole = build(knowing, tmp_path / "whole", **settings)
    whole.train()
    assert torch.equal(weights(whole), weights(again)) and torch.equal(whole.history, again.history)
