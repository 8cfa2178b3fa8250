"""One run of the comparison: an entry, trained from one start in one regime, watched and measured.

    from work import run_one                                  # with benchmarks/compare on the path
    record = run_one("addition", "reuse", "dapo", start=0, learning_rate=3e-4)
    record = run_one("addition", "reuse", "dapo_here", 0, 3e-3, {"step_control": "kl", "target_kl": 0.0013})

The record is what [`run.py`] writes and [`report.py`] reads. Two entries that are given the same start see the same
prompts in the same order and turn the same random numbers into tokens.
"""

import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml


sys.path.insert(0, str(Path(__file__).parents[1]))

import cells


HERE = Path(__file__).parent
NUM_GENERATIONS = 8  # responses a prompt
CHECKPOINTS = 10  # a run; the score is the mean of the last LAST of them
LAST = 5
SAMPLES = 8  # a held-out problem, at the last checkpoints; at the earlier ones:
FEW_SAMPLES = 2
TEACHER_SEED = 1000

# Fields of every run, whatever the entry; nothing here was tuned for one of them.
TRAINING = {
    "num_generations": NUM_GENERATIONS,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
SMOKE = {"generations": 10, "problems": 8, "start": {"steps": 20}, "batch": 8}  # a batch of one update, in rows / 64


@dataclass(frozen=True)
class Entry:
    """A row of the comparison, entries/NAME.yaml.

    Attributes:
        kind: `stock` (TRL's own), `control`, `ours`, `teacher` (has more to go by than the others), `extra` (another
            constant than the default), `optimizer` (the reference's term under another optimizer).
        trainer, config: Dotted paths of classes.
        fields: Of the config.
        teacher: Field that takes the path of a teacher.
    """

    name: str
    title: str
    kind: str
    trainer: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    teacher: str | None = None


@dataclass(frozen=True)
class Regime:
    """What an entry has to stand; see regimes.yaml."""

    name: str
    title: str
    generations: int
    fields: dict[str, Any] = field(default_factory=dict)
    lag: int = 0
    logit_noise: float = 0.0
    int8: bool = False
    flip: float = 0.0

    @property
    def updates_per_generation(self) -> int:
        return self.fields["steps_per_generation"] * self.fields.get("num_iterations", 1)


def _construct(cls, name: str, content: dict):
    unknown = set(content) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__.lower()} {name!r} states {', '.join(sorted(unknown))}, which is not known")
    return cls(name=name, **content)


@cache
def entries() -> dict[str, Entry]:
    """Every entry by its name, in the order of the file names."""
    paths = sorted((HERE / "entries").glob("*.yaml"))
    return {path.stem: _construct(Entry, path.stem, yaml.safe_load(path.read_text())) for path in paths}


@cache
def regimes() -> dict[str, Regime]:
    """Every regime by its name."""
    content = yaml.safe_load((HERE / "regimes.yaml").read_text())
    return {name: _construct(Regime, name, values) for name, values in content.items()}


def find(table: dict, what: str, name: str):
    """Return `table[name]`, or raise `KeyError` naming what there is."""
    if name not in table:
        raise KeyError(f"unknown {what} {name!r}; known: {', '.join(table)}")
    return table[name]


def load(path: str):
    """The class at a dotted path; `work.X` is one of this module."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[__name__] if module == "work" else import_module(module), name)


def missing_fields(entry: Entry, overrides: dict | None = None) -> list[str]:
    """Fields that an entry sets and its config does not have (yet)."""
    known = {f.name for f in fields(load(entry.config))}
    return sorted(set({**entry.fields, **(overrides or {})}) - known)


# --------------------------------------------------------------------------------------------------------------------
# The sampler of a regime
# --------------------------------------------------------------------------------------------------------------------


@contextmanager
def swapped(model, tensors) -> Iterator[None]:
    """Within it, the parameters of `model` have the values `tensors`."""
    import torch

    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), tensors, strict=True):
            p.copy_(value)
        yield
        for p, value in zip(model.parameters(), own, strict=True):
            p.copy_(value)


def rounded_to_int8(parameter):
    """The parameter with every row of a matrix rounded to 255 levels."""
    if parameter.ndim < 2:
        return parameter.detach()
    step = (parameter.detach().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    return (parameter.detach() / step).round() * step


class World:
    """Generation and reward as a regime has them: TRL's `rollout_func` and `reward_funcs`.

    With a lag, TRL's computation of `old_per_token_logps`, which lies between the two, sees the weights that drew;
    the reward function, called next, puts the trained ones back.
    """

    def __init__(self, task, regime: Regime, seed: int):
        self.task, self.regime, self.seed = task, regime, seed
        self.generation = 0
        self.tokens = 0  # of the completions
        self.past = deque(maxlen=regime.lag + 1)  # weights after each of the last updates
        self._window = None

    def remember(self, model) -> None:
        """To be called before training and after every update."""
        if self.regime.lag:
            self.past.append([p.detach().clone() for p in model.parameters()])

    def rollout(self, prompts: list[str], trainer) -> dict[str, list]:
        import torch

        from trl_trust.tasks.sampling import sample

        regime, model = self.regime, trainer.model
        key = hashlib.blake2b(f"{self.seed} {self.generation}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        inputs = trainer.processing_class(prompts[::NUM_GENERATIONS], return_tensors="pt", padding=True)
        if regime.lag:
            self._window = swapped(model, self.past[0])
            self._window.__enter__()
        draw = lambda: sample(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            samples=NUM_GENERATIONS,
            max_new_tokens=self.task.max_completion_length,
            generator=generator,
            logit_noise=regime.logit_noise,
        )
        if regime.int8:
            with swapped(model, [rounded_to_int8(p) for p in model.parameters()]):
                drawn = draw()
        else:
            drawn = draw()
        self.generation += 1
        self.tokens += int(drawn.mask.sum())
        rows = lambda values, mask: [v[m].tolist() for v, m in zip(values, mask.bool(), strict=True)]
        mismatch = regime.logit_noise or regime.int8
        return {
            "prompt_ids": rows(drawn.prompt_ids, drawn.prompt_mask),
            "completion_ids": rows(drawn.ids, drawn.mask),
            "logprobs": rows(drawn.logps, drawn.mask) if mismatch else None,
        }

    def reward(self, prompts, completions, trainer_state=None, completion_ids=None, **columns) -> list[float]:
        if self._window is not None:
            self._window.__exit__(None, None, None)
            self._window = None
        rewards = self.task.reward(completions=completions, prompts=prompts, **columns)
        rng = random.Random(f"{self.seed} {self.generation} flip")
        return [1 - r if rng.random() < self.regime.flip else r for r in rewards] if self.regime.flip else rewards


# --------------------------------------------------------------------------------------------------------------------
# What is watched
# --------------------------------------------------------------------------------------------------------------------


class Watch:
    """Ratios and gradients of every update, read in the same way from every trainer, TRL's or ours.

    The forward of the model tells the log-probabilities, the backward their gradient. The ratio is to the policy that
    drew the tokens.
    """

    def __init__(self):
        self.updates = defaultdict(list)
        self._logps = None

    def attach(self, model) -> None:
        def forward(module, args, output):
            import torch

            logps = getattr(output, "log_probs", None)
            if torch.is_grad_enabled() and logps is not None and logps.requires_grad:
                self._logps = logps

        model.register_forward_hook(forward)

    def trainer(self, trainer_class: type) -> type:
        """A subclass of `trainer_class` that is watched."""
        watch = self

        class Watched(trainer_class):
            def compute_loss(self, model, inputs, *args, **kwargs):
                watch._logps = None
                loss = super().compute_loss(model, inputs, *args, **kwargs)
                watch.look(inputs)
                return loss

        Watched.__name__ = trainer_class.__name__
        return Watched

    def look(self, inputs) -> None:
        import torch

        mask = inputs["completion_mask"].bool()  # (B, T)
        if self._logps is None or len(self._logps) != len(mask) or not mask.any():
            return  # a loss without a policy gradient, or no token to speak of
        tokens = mask.shape[1]
        with torch.no_grad():
            logps = self._logps[:, -tokens:].detach()
            anchor = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps", logps))
            log_ratio = (logps - anchor)[mask].clamp(-20, 20)
            w = log_ratio.exp()
            self.updates["ess"].append((w.sum() ** 2 / (len(w) * w.square().sum())).item())
            self.updates["ratio_p99"].append(w.kthvalue(max(1, round(0.99 * len(w)))).values.item())
            self.updates["ratio_max"].append(w.max().item())
            self.updates["old_kl"].append((w - 1 - log_ratio).mean().item())
        acted = (inputs["advantages"] != 0).view(len(mask), -1) & mask

        def backward(gradient):
            zero = gradient[:, -tokens:] == 0
            self.updates["zero_grad"].append(zero[mask].float().mean().item())
            self.updates["cut"].append(zero[acted].float().mean().item())  # of what has an advantage

        self._logps.register_hook(backward)
        self._logps = None

    def by_generation(self, updates_per_generation: int) -> dict[str, list]:
        """Means (maxima for the largest ratio) over the updates of a generation."""
        join = {"ratio_max": max}
        mean = lambda values: sum(values) / len(values)
        return {
            name: [
                join.get(name, mean)(values[i : i + updates_per_generation])
                for i in range(0, len(values), updates_per_generation)
            ]
            for name, values in self.updates.items()
        }


def _corrected_trainer():
    from trl_trust import PolicyLoss, TrustGRPOTrainer

    class CorrectedTrainer(TrustGRPOTrainer):
        """GRPO's term times TRL's correction for the sampler with its defaults, as stock has it under vLLM."""

        def policy_loss(self, batch):
            import torch

            policy = super().policy_loss(batch)
            if batch.sampling_logps is None:
                return policy
            log_ratio = ((batch.old_logps - batch.sampling_logps) * batch.mask).sum(-1, keepdim=True)  # (B, 1)
            ratio = torch.exp(log_ratio)
            ratio = ratio.masked_fill(ratio > self.args.vllm_importance_sampling_clip_max, 0.0)
            return PolicyLoss(policy.per_token_loss * ratio, policy.metrics)

    return CorrectedTrainer


def __getattr__(name: str):
    if name == "CorrectedTrainer":  # trainers are imported when one is needed
        return _corrected_trainer()
    raise AttributeError(name)


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


def _peak_memory(reset: bool = False) -> float | None:
    """Peak resident set of this process since the last reset, in MiB; `None` where Linux's /proc is missing."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _plain(value):
    """For JSON: five digits, `None` for what is not finite."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def run_one(
    task: str,
    regime: str,
    entry: str,
    start: int,
    learning_rate: float,
    overrides: dict[str, Any] | None = None,
    *,
    generations: int | None = None,
    smoke: bool = False,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train one entry from one start in one regime, and return the record of the run.

    Args:
        task: Name of a task, see [`trl_trust.tasks`].
        regime: A key of regimes.yaml.
        entry: Name of a file in entries/.
        start: Number of the start, which is the seed of everything else too.
        learning_rate: Peak learning rate.
        overrides: Fields of the entry's config, over all others; they are part of the record.
        generations: In place of the regime's.
        smoke: Toy sizes: every stage runs, nothing is learnt.
        on_step: Called after each update with updates done and in all.

    Returns:
        The keys `entry`, `task`, `regime`, `start`, `seed`, `learning_rate`, `overrides`; `score`, the mean pass@1 of
        the last five checkpoints; `checkpoints` (the last one with the divergence from the start), `curves` by
        generation, `start_metrics`; `worst_drop`, `tokens`, `updates`, `cpu_seconds`, `peak_memory_mib`; `machine`,
        `versions`. A run that failed has `error`, and `score` 0.

    Raises:
        KeyError: for an unknown name. ValueError: for a field that the config does not have or takes otherwise.
    """
    entry_, regime_ = find(entries(), "entry", entry), find(regimes(), "regime", regime)
    absent = missing_fields(entry_, overrides)
    if absent:
        raise ValueError(f"entry {entry!r}: {entry_.config} has no field {', '.join(absent)}")
    if generations is not None or smoke:
        regime_ = Regime(**{**vars(regime_), "generations": generations or SMOKE["generations"]})
    record = {
        "entry": entry,
        "task": task,
        "regime": regime,
        "start": start,
        "seed": start,
        "learning_rate": learning_rate,
        "overrides": overrides or {},
        "generations": regime_.generations,
    }
    record |= _plain(_train_and_measure(task, entry_, regime_, start, learning_rate, overrides or {}, smoke, on_step))
    return record | {"machine": cells.machine(), "versions": cells.versions()}


@cache
def _held_out(task: str, n: int | None):
    from trl_trust.tasks import get_task

    return get_task(task).problems("test", n)


@cache
def _start_metrics(task: str, path: Path, n: int | None) -> dict[str, float]:
    """The start itself, measured as a checkpoint is: the same for all entries."""
    from transformers import AutoModelForCausalLM

    from trl_trust.tasks import get_task

    task_, model = get_task(task), AutoModelForCausalLM.from_pretrained(path)
    return task_.evaluate(model, task_.build_tokenizer(), _held_out(task, n), samples=SAMPLES, greedy=False)


def _train_and_measure(
    task_name: str,
    entry: Entry,
    regime: Regime,
    start: int,
    learning_rate: float,
    overrides: dict,
    smoke: bool,
    on_step,
) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from trl_trust.tasks import get_task
    from trl_trust.tasks.start import cached_start

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)  # sums in one order: same seed, same bits; and a model of this size loses by two
    task = get_task(task_name)
    options = SMOKE["start"] if smoke else {}
    start_path = cached_start(task, start, **options)
    held_out = _held_out(task_name, SMOKE["problems"] if smoke else None)
    tokenizer = task.build_tokenizer()
    reference = AutoModelForCausalLM.from_pretrained(start_path)

    config_fields = {**TRAINING, **regime.fields, "max_completion_length": task.max_completion_length}
    if smoke:
        rows = config_fields["per_device_train_batch_size"] * config_fields["steps_per_generation"]
        config_fields["per_device_train_batch_size"] = max(8, 64 // config_fields["steps_per_generation"])
        assert rows == 256
    if entry.teacher:
        config_fields[entry.teacher] = str(cached_start(task, TEACHER_SEED, **(options or task.teacher)))
    config_fields |= {"learning_rate": learning_rate, "seed": start, **entry.fields, **overrides}
    total = regime.generations * regime.updates_per_generation
    every = regime.generations // CHECKPOINTS * regime.updates_per_generation

    world, watch = World(task, regime, start), Watch()
    checkpoints: list[dict[str, float]] = []
    history: list[dict[str, float]] = []
    measuring = 0.0

    def measure(model, samples, reference=None) -> dict[str, float]:
        return task.evaluate(model, tokenizer, held_out, samples=samples, greedy=False, reference=reference)

    class Follow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            nonlocal measuring
            world.remember(model)
            if state.global_step % every == 0:
                began, late = time.process_time(), len(checkpoints) >= CHECKPOINTS - LAST
                at = {"generation": state.global_step // regime.updates_per_generation}
                against = reference if state.global_step == total else None
                checkpoints.append(at | measure(model, SAMPLES if late else FEW_SAMPLES, against))
                measuring += time.process_time() - began
            on_step(state.global_step, total)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                history.append(dict(logs))

    folder = tempfile.mkdtemp(prefix="compare-")
    _peak_memory(reset=True)
    result: dict[str, Any] = {}
    cpu_began = time.process_time()
    try:
        config = load(entry.config)(output_dir=folder, max_steps=total, **config_fields)
        trainer = watch.trainer(load(entry.trainer))(
            model=str(start_path),
            reward_funcs=world.reward,
            args=config,
            train_dataset=task.problems("train", seed=start),
            rollout_func=world.rollout,
            callbacks=[Follow()],
        )
        trainer.remove_callback(PrinterCallback)
        watch.attach(trainer.model)
        world.remember(trainer.model)
        result["start_metrics"] = _start_metrics(task_name, start_path, SMOKE["problems"] if smoke else None)
        cpu_began = time.process_time()
        measuring = 0.0
        trainer.train()
        cpu = time.process_time() - cpu_began
    except (RuntimeError, ArithmeticError) as error:  # what training may end in; settings that are refused still raise
        result["error"], cpu = f"{type(error).__name__}: {error}"[:500], time.process_time() - cpu_began
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    scores = [c["pass@1"] for c in checkpoints]
    last = scores[-LAST:]
    best = [max(scores[: i + 1]) - s for i, s in enumerate(scores)]
    return {
        "score": 0.0 if "error" in result or not last else sum(last) / len(last),
        **result,
        "checkpoints": checkpoints,  # the last one holds kl_to_reference too
        "worst_drop": max(best, default=None),
        "curves": {
            "reward": [r["reward"] for r in history if "reward" in r],
            "length": [r["completions/mean_length"] for r in history if "completions/mean_length" in r],
            **_curves(history, regime, ("entropy", "grad_norm", "trust/step_kl", "trust/step_scale")),
            **watch.by_generation(regime.updates_per_generation),
        },
        "updates": len(history),
        "tokens": world.tokens,
        "cpu_seconds": cpu - measuring,
        "measuring_cpu_seconds": measuring,
        "peak_memory_mib": _peak_memory(),
    }


def _curves(history: list[dict], regime: Regime, names: tuple[str, ...]) -> dict[str, list]:
    """Means over the updates of a generation, of what the trainer logs at every update."""
    n, found = regime.updates_per_generation, {}
    for name in names:
        parts = [[r[name] for r in history[i : i + n] if name in r] for i in range(0, len(history), n)]
        if all(parts) and parts:
            found[name] = [sum(part) / len(part) for part in parts]
    return found


if __name__ == "__main__":  # python work.py TASK REGIME ENTRY START LEARNING_RATE [OVERRIDES as JSON]
    from trl_trust.quickstart.run import quiet

    task_, regime_, entry_, start_, rate_, *more = sys.argv[1:]
    with quiet():
        print(json.dumps(run_one(task_, regime_, entry_, int(start_), float(rate_), *map(json.loads, more))))
