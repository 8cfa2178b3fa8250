"""Rows as a rollout worker returns them, without a model, and a worker that hands out what it was given."""

import queue

import numpy as np
import torch
from transformers import PrinterCallback
from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from trl_trust.asynchronous.local import LocalWeightTransfer, on_a_cpu
from trl_trust.quickstart.task import problems


VOCABULARY = 56  # of the task's tokenizer


def row(ids, mask, logps=None, advantage=1.0, group=0, version=1, **fields) -> RolloutSample:
    values = dict(
        prompt=[],
        completion=[],
        input_ids=np.asarray(ids, dtype=np.int64),
        completion_mask=np.asarray(mask, dtype=np.int64),
        old_log_probs=np.asarray(np.full(len(ids), -4.0) if logps is None else logps, dtype=np.float32),
        advantage=advantage,
        model_version=version,
        group_id=group,
        metrics={"reward": advantage / 2 + 0.5, "reward_std": 0.5},
    )
    return RolloutSample(**{**values, **fields})


def rows(n: int, seed: int = 0, generations: int = 4) -> list[RolloutSample]:
    """`n` rows: groups share a prompt, some a prefix of what was said; gaps where a tool spoke; every sixth row is
    tokenized anew from the one before it, with its advantage (a fork)."""
    g, made = torch.Generator().manual_seed(seed), []
    draw = lambda low, high, *size: torch.randint(low, high, size, generator=g)
    while len(made) < n:
        i = len(made)
        if i % generations == 0:
            prompt = draw(3, VOCABULARY, int(draw(3, 7, 1))).tolist()
        said = draw(3, 9, int(draw(2, 9, 1))).tolist()  # from few tokens, so that beginnings are shared
        if i % generations == 1:
            said = made[-1].input_ids[len(prompt) : len(prompt) + 2].tolist() + said
        mask = [0] * len(prompt) + [1] * len(said)
        if len(said) > 4:
            mask[len(prompt) + 2] = 0  # the tool's answer
        advantage = float(torch.randn(1, generator=g))
        ids = prompt + said
        if i % 6 == 5:
            ids, advantage = [*made[-1].input_ids[:-1].tolist(), *said], made[-1].advantage
            mask = [0] * (len(ids) - len(said)) + [1] * len(said)
        # the sampler thought not quite as an untrained model does
        logps = -4.0 + 0.6 * torch.randn(len(ids), generator=g)
        made.append(row(ids, mask, logps.numpy(), advantage, group=i // generations))
    return made


class GivenRows:
    """A `RolloutWorkerProtocol` that hands out what it was given, and has `health` after that."""

    def __init__(self, given, health=None):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        self.given, self.health, self.stopped = given, health, False

    def start(self):
        for each in self.given:
            self.rollout_buffer.put_nowait(each)

    def stop(self):
        self.stopped = True

    def update_model_version(self, model_version): ...

    def check_health(self, stale_after_s):
        raise self.health or RuntimeError("the rows that were given are used up")


def async_config(config_class=AsyncGRPOConfig, output_dir="unused", **changes):
    defaults = dict(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=3,
        per_device_train_batch_size=4,
        token_budget=0,
        max_staleness=100,
        optim="sgd",
        learning_rate=0.5,
    )
    return config_class(output_dir=str(output_dir), **{**defaults, **changes})


def async_trainer(trainer_class, path, args, worker):
    with on_a_cpu():
        trainer = trainer_class(
            path,
            args=args,
            train_dataset=problems("train", 32),
            rollout_worker=worker,
            weight_transfer=LocalWeightTransfer(),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def async_run(trainer_class, path, args, worker):
    trainer = async_trainer(trainer_class, path, args, worker)
    with on_a_cpu():
        trainer.train()
    return trainer


def history(trainer) -> list[dict[str, float]]:
    """What was logged at each update, without times."""
    return [
        {k: v for k, v in record.items() if not k.startswith("perf/") and k != "sample/time_in_queue_s"}
        for record in trainer.state.log_history
        if "loss" in record
    ]
